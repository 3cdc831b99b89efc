import functools
import math

import numpy as np
import onnx
import pytest
import torch
import trained
from sdgm_edge.export.gates import check_parity, compare, difference, run_graph, run_torch
from sdgm_edge.export.graph import matrix_names, weights_of
from sdgm_edge.export.variants import VARIANTS, build, bundle_config, model_as_held

from sdgm_edge.models import SDGM, ModelConfig, preset
from sdgm_edge.runtime import Engine, ParityError

FEW = 96
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


def engine_of(model, plan, reach=None):
    graph = build(model.config, weights_of(model), plan, reach=reach)
    return Engine(graph, bundle_config(model.config), "graph", providers="cpu")


@functools.cache
def engine(name="ringing", bits=32):
    model = trained.model(name)
    return engine_of(model, VARIANTS[bits].plan(weights_of(model)))


def some_ids(shape, seed=0):
    return np.random.default_rng(seed).integers(0, trained.VOCAB, shape)


def step(engine, ids_BT, state=None, **feeds):
    state = np.zeros((len(ids_BT), engine.config.state_size), np.float32) if state is None else state
    return engine.opened.session.run(None, {"ids": ids_BT, "state": state, **feeds})


@pytest.mark.parametrize("name", trained.CONFIGS)
def test_float32_computes_what_torch_computes_over_512_steps(name):
    figures = check_parity(VARIANTS[32], trained.model(name), engine(name))
    assert figures.steps == 512
    assert max(figures.logits, figures.state, figures.mixing) <= 1e-4


@pytest.mark.parametrize("name", trained.CONFIGS)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_variants_compute_what_torch_computes_with_the_same_rounded_weights(name, bits):
    model = trained.model(name)
    held = model_as_held(model, VARIANTS[bits].plan(weights_of(model)))
    check_parity(VARIANTS[bits], held, engine(name, bits), FEW)


@pytest.mark.parametrize("name", ["ringing with pointer", "clock with pointer", "ringing"])
def test_parity_fails_on_any_perturbed_weight(name):
    model = trained.model(name)
    plan = VARIANTS[32].plan(weights_of(model))
    perturbed = model_as_held(model, plan)
    unnoticed = []
    for weight, parameter in perturbed.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(1.05).add_(0.01)
        try:
            check_parity(VARIANTS[32], perturbed, engine(name), steps=24)
            unnoticed.append(weight)
        except ParityError:
            pass
        with torch.no_grad():
            parameter.copy_(kept)
    assert unnoticed == []
    check_parity(VARIANTS[32], perturbed, engine(name), steps=24)


def unnoticed_where_zero(variant, held, engine, weights):
    """Which of a model's weights may be zero, and parity passes all the same."""
    unnoticed = []
    for weight in weights:
        parameter = held.get_parameter(weight)
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.zero_()
        try:
            check_parity(variant, held, engine, steps=48)
            unnoticed.append(weight)
        except ParityError:
            pass
        with torch.no_grad():
            parameter.copy_(kept)
    return unnoticed


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("name", trained.CONFIGS)
def test_parity_of_a_rounded_variant_fails_where_a_matrix_is_missing(name, bits):
    plan = VARIANTS[bits].plan(weights_of(trained.model(name)))
    held = model_as_held(trained.model(name), plan)
    assert unnoticed_where_zero(VARIANTS[bits], held, engine(name, bits), plan) == []
    check_parity(VARIANTS[bits], held, engine(name, bits), steps=48)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_parity_of_a_rounded_variant_sees_numbers_that_all_stay_small(bits):
    """Keys and mixing vectors of an untrained model of the paper's: none reaches 1."""
    torch.manual_seed(0)
    model = SDGM(preset("paper", vocab_size=300, width=64, num_atoms=32)).eval()
    plan = VARIANTS[bits].plan(weights_of(model))
    held, made = model_as_held(model, plan), engine_of(model, plan)
    synthesis = [f"blocks.0.atoms.{part}" for part in ("amplitude", "frequency", "phase")]
    weights = [*synthesis, "blocks.0.atoms.encoder.weight", "pointer.key.weight"]
    assert unnoticed_where_zero(VARIANTS[bits], held, made, weights) == []
    check_parity(VARIANTS[bits], held, made, steps=48)


def test_parity_tells_all_that_differs():
    with pytest.raises(ParityError) as raised:
        check_parity(VARIANTS[32], trained.model(seed=1), engine(), FEW)
    for part in (
        "logits of seed 0",
        "logits of seed 2",
        "mixing of seed 1",
        "state.layers.1.atoms of seed 0",
    ):
        assert part in str(raised.value)


def test_compare_takes_no_nan_for_equal():
    config = trained.model().config
    ids = some_ids((1, 3))
    expected = run_torch(trained.model(), ids)
    got = {part: values.copy() for part, values in expected.items()}
    assert max(compare(config, expected, got, True).values()) == 0
    got["mixing"][0, 1, 2] = np.nan
    assert compare(config, expected, got, True)["mixing"] == math.inf
    with pytest.raises(ValueError, match="logits: expected shape"):
        compare(config, expected, {**got, "logits": got["logits"][:, 1:]}, True)


def test_differences_of_a_rounded_variant_are_told_by_the_size_of_what_differs():
    small = np.array([0.01, -0.02], np.float32)
    assert difference("mixing", small, small * 0, exact=False) == pytest.approx(1)
    assert difference("mixing", small, small * 0, exact=True) == pytest.approx(0.02)
    assert difference("mixing", small * 0, small * 0, exact=False) == 0
    logits = np.array([-9.5, -10.5], np.float32)  # log probabilities: words lie half a nat from their mean
    assert difference("logits", logits, logits[::-1], exact=False) == pytest.approx(2)
    assert difference("logits", logits, logits + 1, exact=False) == pytest.approx(0, abs=1e-6)
    assert difference("logits", logits, logits + 1, exact=True) == pytest.approx(1)


@pytest.mark.parametrize("exact", [True, False])
def test_counts_in_the_state_are_held_to_the_number_itself(exact):
    ids = np.array([3.0, 30_000.0], np.float32)
    assert difference("state.copy.ids", ids, ids + 1, exact) == 1
    assert difference("state.clock", ids, ids - 1, exact) == 1
    assert difference("state.clock", ids, ids, exact) == 0


@pytest.mark.parametrize("name", trained.CONFIGS)
def test_a_prompt_may_be_cut_anywhere(name):
    ids = some_ids((1, 33))
    longest = engine(name).chunk
    whole = run_graph(engine(name), ids, [longest] * (33 // longest) + [33 % longest])
    for cuts in ([1] * 33, [1, 2, 3, 5, 7, 11, 1, 2, 1], [16, 16, 1]):
        pieces = run_graph(engine(name), ids, cuts)
        for part, values in whole.items():
            np.testing.assert_allclose(pieces[part], values, **CLOSE)


@pytest.mark.parametrize("name", trained.CONFIGS)
@pytest.mark.parametrize("bits", [4, 32])
def test_rows_of_a_batch_do_not_see_each_other(name, bits):
    ids = some_ids((3, 9))
    _, state, _ = step(engine(name, bits), some_ids((3, 5), seed=1))
    together = step(engine(name, bits), ids, state)
    for row in range(3):
        alone = step(engine(name, bits), ids[row : row + 1], state[row : row + 1])
        for whole, single in zip(together, alone, strict=True):
            np.testing.assert_allclose(whole[row : row + 1], single, **CLOSE)


@pytest.mark.parametrize("name", trained.CONFIGS)
def test_start_leaves_out_the_first_logits(name):
    ids = some_ids((2, 9))
    logits, state, mixing = step(engine(name), ids)
    for start in (0, 3, 8):
        fewer, same_state, same_mixing = step(engine(name), ids, start=np.array(start))
        np.testing.assert_allclose(fewer, logits[:, start:], **CLOSE)
        np.testing.assert_array_equal(same_state, state)
        np.testing.assert_array_equal(same_mixing, mixing)


@pytest.mark.parametrize("name", trained.CONFIGS)
def test_blending_with_the_models_own_mixing_vector_changes_nothing(name):
    ids = some_ids((2, 1))
    _, state, _ = step(engine(name), some_ids((2, 6), seed=1))
    logits, after, mixing = step(engine(name), ids, state)
    for eta in (0.0, 0.4, 1.0):
        blended = step(engine(name), ids, state, blend=np.array(eta, np.float32), drawn=mixing)
        for plain, same in zip((logits, after, mixing), blended, strict=True):
            np.testing.assert_allclose(same, plain, **CLOSE)


@pytest.mark.parametrize("name", trained.CONFIGS)
def test_blending_moves_the_logits_and_tells_the_unblended_vector(name):
    ids = some_ids((2, 4))
    logits, _, mixing = step(engine(name), ids)
    drawn = np.ones((1, 1, mixing.shape[2]), np.float32)
    moved, _, same = step(engine(name), ids, blend=np.array(0.5, np.float32), drawn=drawn)
    assert np.abs(moved - logits).max() > 1e-2
    np.testing.assert_array_equal(same, mixing)


def test_blending_is_the_weighted_mean_before_synthesis():
    model, ids = trained.model(), some_ids((2, 4))
    drawn = np.random.default_rng(0).normal(size=(2, 1, model.config.mixing_size)).astype(np.float32)
    z_1BM = torch.from_numpy(drawn).transpose(0, 1)
    hook = model.blocks[-1].atoms.synthesis.register_forward_pre_hook(
        lambda module, inputs: (0.3 * inputs[0] + 0.7 * z_1BM,)
    )
    expected = run_torch(model, ids, exact=False)["logits"]
    hook.remove()
    logits, _, _ = step(engine(), ids, blend=np.array(0.7, np.float32), drawn=drawn)
    np.testing.assert_allclose(logits, expected, **CLOSE)


def test_logits_with_a_pointer_are_log_probabilities():
    for name in ("ringing with pointer", "clock with pointer"):
        logits, _, _ = step(engine(name), some_ids((2, 16)))
        np.testing.assert_allclose(np.exp(logits).sum(-1), 1, rtol=1e-5)


def test_one_repeated_token_is_copied_once():
    """Places of one word must share what they write, however many there are."""
    ids = np.full((1, 16), 7)
    expected = run_torch(trained.model("ringing with pointer"), ids)
    got = run_graph(engine("ringing with pointer"), ids, [16])
    np.testing.assert_allclose(got["logits"], expected["logits"], **CLOSE)


@pytest.mark.parametrize(("window", "context"), [(1, 1), (2, 4), (5, 3), (16, 2), (37, 1)])
def test_a_pointer_goes_on_with_what_followed_the_same_words(window, context):
    torch.manual_seed(0)
    shape = {"width": 16, "num_atoms": 5, "copy_window": window, "copy_width": 6, "copy_context": context}
    model = SDGM(ModelConfig(vocab_size=trained.VOCAB, **shape)).eval()
    with torch.no_grad():
        model.pointer.agreement.copy_(torch.arange(1.0, context + 1))
    ids, made = some_ids((2, 60)) % 3, engine_of(model, VARIANTS[32].plan(weights_of(model)))
    at_once, singly = run_graph(made, ids, [11, 1, 48]), run_graph(made, ids, [1] * 60)
    np.testing.assert_allclose(at_once["logits"], run_torch(model, ids)["logits"], **CLOSE)
    assert all(np.array_equal(at_once[part], singly[part]) for part in singly)


@pytest.mark.parametrize("bits", VARIANTS)
def test_nodes_bear_paths_and_the_embedding_is_there_once(bits):
    model = trained.model("ringing with pointer")
    weights = weights_of(model)
    graph = onnx.load_from_string(build(model.config, weights, VARIANTS[bits].plan(weights))).graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert all(name.startswith("/") for name in names)
    assert any(name.startswith("/layers.0/atoms/synthesis/") for name in names)
    large = [i.name for i in graph.initializer if i.dims and i.dims[0] == trained.VOCAB and len(i.dims) > 1]
    held = {4: "embedding.weight_q4", 8: "embedding.weight_int8"}.get(bits, "embedding.weight")
    assert [name for name in large if "scales" not in name] == [held]


@pytest.mark.parametrize("name", ["ringing", "clock"])
@pytest.mark.parametrize("bits", VARIANTS)
def test_only_matrices_leave_float32(name, bits):
    model = trained.model(name)
    weights = weights_of(model)
    plan = VARIANTS[bits].plan(weights)
    assert sorted(plan) == sorted(matrix_names(weights))
    assert all(weights[matrix].ndim == 2 for matrix in plan)
    graph = onnx.load_from_string(build(model.config, weights, plan)).graph
    held = {i.name: i.data_type for i in graph.initializer}
    half = sorted(name for name, kind in held.items() if kind == onnx.TensorProto.FLOAT16)
    assert len(half) == (len(plan) if bits == 16 else 0)
    assert all(name.endswith(".weight") for name in half)
    for part in ["cosine", "sine"] if name == "ringing" else ["amplitude", "phase"]:
        assert held[f"layers.0.atoms.{part}"] == onnx.TensorProto.FLOAT
    if bits in (4, 8):
        assert not any(n.endswith("strike.weight") or n.endswith("encoder.weight") for n in held)


def test_the_same_model_gives_the_same_bytes():
    weights = weights_of(trained.model())
    plan = VARIANTS[4].plan(weights)
    config = trained.model().config
    assert build(config, weights, plan) == build(config, weights, plan)


@pytest.mark.parametrize("precision", ["fp32", "rows8", "rows8 in fixed steps", "rows4"])
@pytest.mark.parametrize("name", [name for name in trained.CONFIGS if "ringing" in name])
def test_pieces_of_any_length_give_the_same_bit_for_bit(name, precision):
    """What is checked as a draft, many tokens at once, is what single tokens give."""
    model, (precision, _, fixed) = trained.model(name), precision.partition(" ")
    plan = dict.fromkeys(matrix_names(weights_of(model)), precision)
    made = engine_of(model, plan, dict.fromkeys(plan, 3.0) if fixed else None)
    ids = some_ids((2, 33))
    whole = run_graph(made, ids, [33])
    for cuts in ([1] * 33, [1, 2, 3, 5, 7, 11, 1, 2, 1], [16, 17]):
        pieces = run_graph(made, ids, cuts)
        for part, values in whole.items():
            np.testing.assert_array_equal(pieces[part], values, err_msg=part)


def test_no_sine_is_computed():
    model = trained.model()
    weights = weights_of(model)
    graph = onnx.load_from_string(build(model.config, weights, VARIANTS[32].plan(weights))).graph
    found = set(trained.operators(graph))
    assert not found & {"Sin", "Cos"}
    assert "RotaryEmbedding" in found
