"""A bundle of its strongest atoms alone: held to what the exporter makes of a model of so many atoms."""

import functools
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
import trained
from hypothesis import given
from hypothesis import strategies as st
from sdgm_edge.export.atoms import strongest_first
from sdgm_edge.export.gates import run_graph
from sdgm_edge.export.graph import weights_of
from sdgm_edge.export.variants import VARIANTS, build, bundle_config
from sdgm_edge.runtime.atoms import cut

from sdgm_edge.export import export_run, pipeline
from sdgm_edge.runtime import (
    BundleError,
    Engine,
    Generator,
    ParameterError,
    StateError,
    atoms_step,
    measure_footprint,
    read_bundle,
)

K, KEPT = 64, 32
RINGING = {"num_layers": 2, "width": 24, "num_atoms": K, "glu_width": 20}
TEXT = "Once upon a time there was a small river, and"


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """Export a model of 64 atoms in two layers, or another one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(trained.CONFIGS, "many", RINGING)
        patch.setattr(pipeline, "SPEED_SECONDS", 0.001)

        def call(bits, name="many", **options):
            patch.setattr(pipeline, "load_run", lambda folder: trained.run(name))
            out = tmp_path_factory.mktemp("atoms") / "b.sdgm"
            return export_run("runs/tale", out, bits, force=True, **options).path

        yield call


@pytest.fixture(scope="module")
def whole(export):
    return export((32, 16, 8, 4))


@pytest.fixture(scope="module")
def few(export):
    return export((32, 16, 8, 4), atoms=KEPT)


@pytest.fixture(scope="module")
def drafting(export):
    return export((32, 8, 4), drafts=True)


def load(path, variant=None, **options):
    return Generator.load(path, variant, "cpu", **options)


def run(generator):
    """Logits, state and mixing vectors of a text."""
    session = generator.session()
    session.feed(TEXT)
    return session.logits, session.state, generator.mixing(TEXT)[1]


@pytest.mark.parametrize("variant", ["fp32", "fp16", "q4"])
def test_it_computes_what_the_export_of_so_many_atoms_computes_bit_for_bit(whole, few, variant):
    for a, b in zip(run(load(whole, variant, atoms=KEPT)), run(load(few, variant)), strict=True):
        assert a.shape == b.shape
        assert (a == b).all()


def test_int8_differs_by_the_rounding_of_its_weights(whole, few):
    """A column of the synthesis has one scale, found with all atoms or with those that are left."""
    shortened, exported = run(load(whole, "int8", atoms=KEPT)), run(load(few, "int8"))
    for a, b, exact in zip(shortened, exported, run(load(few, "fp32")), strict=True):
        rounding = abs(b - exact).max()
        assert 0 < abs(a - b).max() < 4 * rounding < 0.5 * abs(exact).max()


@functools.cache
def graph_of(name, count=None, bits=32):
    """The graph of a model with its strongest atoms first, or of these alone, and its sizes."""
    run = strongest_first(trained.run(name), count)
    weights = weights_of(run.model)
    return build(run.config, weights, VARIANTS[bits].plan(weights)), bundle_config(run.config)


@pytest.mark.parametrize("bits", [32, 16])
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("ringing", 1),
        ("ringing", 9),
        ("ringing with pointer", 2),
        ("ringing, one tap", 1),
        ("ringing, bare", 3),
    ],
)
def test_any_number_of_atoms_of_any_model(name, count, bits):
    (whole, config), (expected, smaller) = graph_of(name, bits=bits), graph_of(name, count, bits)
    short = cut(whole, config.model["num_atoms"], count, smaller, name)
    ids = np.random.default_rng(0).integers(0, trained.VOCAB, (2, 40))
    one, other = (run_graph(Engine(g, smaller, name), ids, [1, 1, 7, 31]) for g in (short, expected))
    for part, values in one.items():
        np.testing.assert_array_equal(values, other[part], err_msg=part)


def test_blocks_of_weights_are_kept_whole(whole):
    assert [load(whole, "q4", atoms=count).atoms for count in (1, 32, 33)] == [32, 32, K]
    assert [load(whole, "fp32", atoms=count).atoms for count in (1, 32, 33)] == [1, 32, 33]


def test_a_screened_head_stays_what_it_is(export):
    path = export((8, 4), head="screened")
    assert "screened" in read_bundle(path).manifest.variants["int8"].accuracy
    for variant in ("int8", "q4"):
        assert load(path, variant, atoms=KEPT).generate(TEXT, max_new_tokens=4, seed=1).tokens


@pytest.mark.parametrize("variant", ["fp32", "int8", "q4"])
def test_fewer_atoms_can_be_drafted_where_all_can(drafting, variant):
    trained.needs_rows_alone(variant)
    gen = load(drafting, variant, atoms=KEPT)
    params = {"temperature": 0, "max_new_tokens": 40}
    plain, drafted = (gen.generate(TEXT, draft=draft, **params) for draft in (0, 8))
    assert drafted.tokens == plain.tokens
    assert drafted.drafted.accepted


def test_codes_of_int8_are_left_out_in_pairs(whole, drafting):
    for path in (whole, drafting):
        assert [load(path, "int8", atoms=count).atoms for count in (1, 2, 33)] == [2, 2, 34]


def test_less_is_held_and_less_is_kept(whole, few):
    bundle, short, exported = (
        gen.bundle for gen in (load(whole, "int8"), load(whole, "int8", atoms=KEPT), load(few, "int8"))
    )
    assert short.size() == len(short.graph()) < bundle.size() == bundle.manifest.files["model_int8.onnx"][1]
    assert short.size() <= exported.size()
    assert short.config.state_size == exported.config.state_size == bundle.config.state_size - 10 * (K - KEPT)
    assert short.config.mixing_size == exported.config.mixing_size == 2 * KEPT
    footprint = measure_footprint(whole, ["int8"], tokens=1, repeats=1, atoms=KEPT - 1)
    assert (footprint.atoms, footprint.variants[0].atoms) == (KEPT - 1, KEPT), "int8 keeps pairs"
    assert footprint.variants[0].file == short.size()
    assert footprint.variants[0].state == 4 * short.config.state_size


def test_the_mixture_is_the_marginal(whole, few):
    loaded, exported = load(whole, "fp32", atoms=KEPT), load(few, "fp32")
    assert (loaded.typicality(TEXT) == exported.typicality(TEXT)).all()
    params = {"prior_strength": 0.3, "seed": 2, "max_new_tokens": 8}
    assert loaded.generate(TEXT, **params).tokens == exported.generate(TEXT, **params).tokens


def test_as_many_as_there_are_is_the_model_as_it_is(whole):
    plain = load(whole)
    for count in (K, K + 1, 10**9):
        gen = load(whole, atoms=count)
        assert gen.atoms == plain.atoms == K
        assert gen.session().identity == plain.session().identity


def test_states_of_other_numbers_of_atoms_are_refused(whole, tmp_path):
    gens = [load(whole, "fp32", atoms=count) for count in (None, KEPT, 5)]
    for gen in gens:
        session = gen.session()
        session.feed(TEXT)
        session.save(tmp_path / "s.state")
        assert load(whole, "fp32", atoms=gen.atoms).load_session(tmp_path / "s.state").position
        for other in gens:
            if other is not gen:
                with pytest.raises(StateError, match=r"of another model: .* and as many atoms"):
                    other.load_session(tmp_path / "s.state")
                with pytest.raises(StateError, match="session: of another model or variant"):
                    other.generate(None, session=session, max_new_tokens=1)


def test_what_is_prepared_is_of_so_many_atoms(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("SDGM_EDGE_CACHE", str(tmp_path))
    for made, count in ((1, KEPT), (1, KEPT), (2, None), (3, 5)):
        plain = run(load(whole, "int8", atoms=count))
        for a, b in zip(plain, run(load(whole, "int8", atoms=count, prepared=True)), strict=True):
            assert a == pytest.approx(b, abs=1e-4)
        assert len(list((tmp_path / "prepared").iterdir())) == made


# The commands


def command(*arguments):
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands_run_fewer_atoms(whole, tmp_path):
    gen = load(whole, atoms=KEPT)
    (tmp_path / "text").write_text(TEXT)
    chosen = whole, "--atoms", KEPT
    told = json.loads(
        command("-m", "sdgm_edge", "generate", "-m", *chosen, "-p", TEXT, "-n", 8, "-s", 1, "--json")
    )
    assert (told["atoms"], told["text"]) == (
        KEPT,
        gen.generate(TEXT, max_new_tokens=8, seed=1, heal=True).text,
    )
    score = command("-m", "sdgm_edge", "eval", whole, tmp_path / "text", "--atoms", KEPT)
    assert f"with {KEPT} atoms" in score
    assert f"{gen.score(TEXT).token_perplexity:,.2f}" in score
    quick = "-p", 4, "-n", 2, "-d", 0, "-r", 1
    speed = json.loads(command("-m", "sdgm_edge", "bench", *chosen, *quick, "--json"))[0]
    assert (speed["atoms"], speed["footprint"]["file"]) == (KEPT, gen.bundle.size())


def test_the_curve_of_quality_against_speed(whole, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    curve = Path(__file__).resolve().parent.parent / "benchmarks/atoms.py"
    options = whole, tmp_path / "text", "--variant", "fp32", "--rounds", 1, "--json"
    found = json.loads(command(curve, *options))["budgets"]
    assert [row["atoms"] for row in found] == [64, 32, 16, 8]
    score = load(whole, "fp32", atoms=16).score(TEXT)
    assert found[2]["token_perplexity"] == pytest.approx(score.token_perplexity)
    assert [row["atoms"] for row in json.loads(command(curve, *options, "--variant", "q4"))["budgets"]] == [
        64,
        32,
    ]


# What is refused


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "64"])
def test_what_is_no_number_of_atoms_is_refused(whole, count):
    with pytest.raises(
        ParameterError, match=r"atoms: expected a number from 1, got .*; leave it out for all"
    ):
        load(whole, atoms=count)


def test_a_bundle_that_tells_no_order_is_refused(export, tmp_path):
    for path in (tiny.write(tmp_path / "old"), export((32,), "clock")):
        assert load(path).atoms is None
        with pytest.raises(BundleError, match=r"atoms: expected ringing atoms .* got a bundle that tells no"):
            load(path, atoms=4)


def test_a_variant_whose_blocks_hold_atoms_of_both_parts_is_refused(export):
    path = export((32, 4), "ringing")  # 10 atoms, blocks of 32
    assert load(path, "fp32", atoms=4).atoms == 4
    assert load(path, "q4", atoms=10).atoms == 10
    with pytest.raises(BundleError, match=r"atoms: expected a variant whose atoms can be parted, got q4"):
        load(path, "q4", atoms=4)


@given(data=st.data())
def test_a_damaged_graph_is_refused_by_name_or_read(data):
    graph, config = graph_of("ringing with pointer")
    damaged = bytearray(graph)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with suppress(BundleError):
        atoms_step(bytes(damaged), 5)
        assert cut(bytes(damaged), 5, 2, config, "b")


def test_a_graph_without_marks_has_no_step(whole):
    with pytest.raises(BundleError, match="the graph cannot be read: "):
        atoms_step(b"no graph", K)
    graph = onnx.load_from_string(read_bundle(whole).read("model.onnx"))
    assert atoms_step(graph.SerializeToString(), K) == 1
    for tensor in graph.graph.initializer:
        del tensor.metadata_props[:]
    assert atoms_step(graph.SerializeToString(), K) is None


@pytest.mark.parametrize(
    ("mark", "told"),
    [
        ("1 3 1", "with the mark"),
        ("7 3 1", "with the mark"),
        ("0 0 0", "with the mark"),
        ("-1 3 1", "with the mark"),
        ("0 3", "values to unpack"),
        ("a b c", "invalid"),
    ],
)
def test_marks_that_do_not_fit_are_refused(whole, mark, told):
    bundle = read_bundle(whole)
    graph = onnx.load_from_string(bundle.read("model.onnx"))
    bias = next(t for t in graph.graph.initializer if t.name == "layers.0.atoms.strike.bias")
    bias.metadata_props[0].value = mark
    with pytest.raises(BundleError, match=f"b: its atoms cannot be parted: .*{told}"):
        cut(graph.SerializeToString(), K, KEPT, bundle.config, "b")
