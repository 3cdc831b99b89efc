"""The head that is not read whole: what its graph computes, and when an export has one."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
import trained
from sdgm_edge.export.gates import check_parity
from sdgm_edge.export.graph import weights_of
from sdgm_edge.export.screening import find_screen
from sdgm_edge.export.variants import VARIANTS, build, bundle_config, model_as_held

from sdgm_edge.export import export_run, pipeline, screening
from sdgm_edge.models import SDGM
from sdgm_edge.runtime import AccuracyError, Engine, Generator, ParityError, UsageError, read_bundle, verify

SOME = 12
"""Words with exact logits."""


@functools.cache
def screen_of(name="ringing", precision="q4"):
    return find_screen(trained.model(name), SOME, precision)


def engine_of(name, bits=32, screen=None):
    model = trained.model(name)
    graph = build(model.config, weights_of(model), VARIANTS[bits].plan(weights_of(model)), screen)
    return Engine(graph, bundle_config(model.config), name, providers="cpu")


@pytest.mark.parametrize("name", ["ringing", "ringing, bare", "clock"])
def test_the_graph_computes_what_torch_computes(name):
    model, screen = trained.model(name), screen_of(name, "fp32")  # 4 bits round activations too
    engine, preview = engine_of(name, screen=screen), model_as_held(model, {}, screen)
    check_parity(VARIANTS[32], model, engine, 64, preview)
    with pytest.raises(ParityError, match="logits"):
        check_parity(VARIANTS[32], model, engine, 64)
    with pytest.raises(ParityError, match="logits"):
        check_parity(VARIANTS[32], preview, engine, 64)


@pytest.mark.parametrize("bits", [8, 4])
def test_variants_are_near_torch_with_the_same_rounded_weights(bits):
    model, screen = trained.model(), screen_of()
    held, preview = (model_as_held(model, VARIANTS[bits].plan(weights_of(model)), s) for s in (None, screen))
    check_parity(VARIANTS[bits], held, engine_of("ringing", bits, screen), 64, preview)


def test_the_likeliest_words_have_the_logits_of_the_whole_head():
    screen = screen_of(precision="fp32")
    ids = np.random.default_rng(0).integers(0, trained.VOCAB, 40).tolist()
    whole, screened = engine_of("ringing"), engine_of("ringing", screen=screen)
    exact_TV, state = whole.all(ids, whole.zeros())
    found_TV, found_state = screened.all(ids, screened.zeros())
    preview = model_as_held(trained.model(), {}, screen)
    preview_TV = preview(torch.tensor([ids])).logits_BTV[0].detach().numpy()
    first_TN = np.argsort(-preview_TV)[:, :SOME]
    expected_TV = preview_TV.copy()
    np.put_along_axis(expected_TV, first_TN, np.take_along_axis(exact_TV, first_TN, 1), 1)
    assert np.allclose(found_TV, expected_TV, rtol=1e-5, atol=1e-5)
    assert np.array_equal(state, found_state)  # the body is the same
    everything = engine_of("ringing", screen=replace(screen, num_exact=trained.VOCAB))
    assert np.allclose(everything.all(ids, everything.zeros())[0], exact_TV, rtol=1e-5, atol=1e-5)


def test_positions_do_not_see_each_other():
    trained.needs_rows_alone("rows4")
    engine = engine_of("ringing", screen=screen_of(precision="rows4"))
    ids = np.random.default_rng(1).integers(0, trained.VOCAB, 9).tolist()
    together_TV, _ = engine.all(ids, engine.zeros())
    state = engine.zeros()
    for i, logits_V in zip(ids, together_TV, strict=True):
        alone_V, state = engine.last([i], state)
        assert np.array_equal(alone_V, logits_V)


def test_a_preview_of_full_rank_is_the_head_itself(monkeypatch):
    model = trained.model("ringing")
    monkeypatch.setattr(screening, "rank_of", lambda width: width)
    screen = find_screen(model, 1)
    hidden = torch.randn(5, model.config.width)
    preview = hidden @ torch.from_numpy(screen.down_RD).T @ torch.from_numpy(screen.up_VR).T
    assert torch.allclose(preview + torch.from_numpy(screen.bias_V), model.scores(hidden), atol=1e-4)


def test_a_preview_is_nearer_to_the_head_than_random_directions_are():
    model = trained.model("ringing")
    hidden = screening.hidden_vectors(model)
    exact = model.scores(hidden).detach()
    screen = screen_of()

    def error(screen):
        codes = hidden @ torch.from_numpy(screen.down_RD).T
        preview = codes @ torch.from_numpy(screen.up_VR).T + torch.from_numpy(screen.bias_V)
        return float((preview - exact).square().mean())

    weight, mean = model.embedding.weight.detach(), hidden.mean(0)
    for seed in range(3):
        torch.manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(model.config.width, len(screen.down_RD)))[0]
        up, down = weight @ basis, basis.T
        lift = model.scores(mean).detach() - up @ (down @ mean)
        other = replace(screen, down_RD=down.numpy(), up_VR=up.numpy(), bias_V=lift.numpy())
        assert error(screen) < error(other)


@pytest.mark.parametrize(("vocab_size", "width"), [(1, 4), (3, 31), (40, 1), (1, 1)])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_smallest_heads_can_be_screened(vocab_size, width, bits):
    torch.manual_seed(0)
    config = replace(trained.model("ringing").config, vocab_size=vocab_size, width=width)
    model = SDGM(config).eval()
    screen, weights = find_screen(model, SOME), weights_of(model)
    assert screen.num_exact == max(1, vocab_size // 4)
    engine = Engine(
        build(config, weights, VARIANTS[bits].plan(weights), screen),
        bundle_config(config),
        "g",
        providers="cpu",
    )
    logits_TV, _ = engine.all([0] * 5, engine.zeros())
    assert logits_TV.shape == (5, vocab_size)
    assert np.isfinite(logits_TV).all()


def test_the_same_model_gives_the_same_screen():
    again = find_screen(trained.model(), SOME)
    assert np.array_equal(again.up_VR, screen_of().up_VR)
    assert np.array_equal(again.down_RD, screen_of().down_RD)
    assert again.up_VR.shape == (trained.VOCAB, screening.rank_of(trained.model().config.width))


@pytest.mark.parametrize(("width", "rank"), [(16, 4), (24, 8), (256, 64), (384, 128), (512, 128), (1, 1)])
def test_the_rank_is_a_quarter_of_the_width_or_a_little_more(width, rank):
    assert screening.rank_of(width) == rank


@pytest.fixture
def export(monkeypatch, tmp_path):
    """Export the tiny run; messages are collected."""

    def call(bits=(8,), name="ringing", **options):
        monkeypatch.setattr(pipeline, "load_run", lambda folder: trained.run(name))
        monkeypatch.setattr(pipeline, "SPEED_SECONDS", 0.001)
        call.messages = []
        return export_run("runs/tale", tmp_path / "b", bits, progress=call.messages.append, **options)

    return call


def test_a_screened_bundle_tells_so_and_runs(export, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "MAX_INCREASE", 10.0)  # the tiny model has learnt nothing to be sure of
    report = export((8, 4, 32), head="screened", max_loss_increase=10.0)
    screened = {v.name: v.screened for v in report.variants}
    assert screened["fp32"] is None
    assert screened["int8"].num_exact == screened["q4"].num_exact == trained.VOCAB // 4
    told = read_bundle(tmp_path / "b").variant("int8").accuracy["screened"]
    assert told["rank"] == 8
    assert report.to_dict()["variants"]["int8"]["screened"] == told
    assert "preview of rank 8" in (tmp_path / "b" / "README.md").read_text()
    assert verify(tmp_path / "b", providers="cpu").ok
    assert Generator.load(tmp_path / "b", "int8").generate("the", max_new_tokens=4, seed=1).tokens


def test_small_heads_are_read_whole_and_large_ones_screened(export, monkeypatch):
    assert export().variants[0].screened is None
    monkeypatch.setattr(screening, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(pipeline, "MAX_INCREASE", 10.0)
    assert export(max_loss_increase=10.0).variants[0].screened is not None
    assert export(max_loss_increase=10.0, head="whole").variants[0].screened is None


def test_a_head_that_loses_too_much_is_read_whole_or_refused(export, monkeypatch):
    monkeypatch.setattr(screening, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(pipeline, "MAX_INCREASE", -1.0)
    assert export(max_loss_increase=10.0).variants[0].screened is None
    assert any("the head is read whole" in message for message in export.messages)
    with pytest.raises(AccuracyError, match=r"int8: a head screened by rank 8 .* leave --head out"):
        export(head="screened")
    assert export(head="screened", force=True).variants[0].screened is not None


def test_heads_that_make_no_sense_are_refused(export):
    with pytest.raises(UsageError, match="head: expected auto, whole, screened, got 'half'"):
        export(head="half")
    with pytest.raises(UsageError, match="expected 8 or 4 among the bits"):
        export((32, 16), head="screened")
    with pytest.raises(UsageError, match="without a pointer to screen, got copy_window = 7"):
        export(name="ringing with pointer", head="screened")
