"""Graphs of baselines: each computes and remembers what its model does, in steps and in calls, in place."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from sdgm_edge.export.baselines import GRAPHS, block_of, build, chunk_of, model_as_held, plan_of
from sdgm_edge.export.baselines.parity import check_parity
from sdgm_edge.export.graph import weights_of
from sdgm_edge.export.variants import VARIANTS

from sdgm_edge.models import MIXERS, ModelConfig, build_model
from sdgm_edge.runtime import ParityError, Stepper

WINDOW, STEPS = 32, 85
POINTER = {"copy_window": 20, "copy_width": 6, "copy_context": 2}
BASE = {"num_layers": 2, "width": 24, "num_atoms": 7, "conv_width": 3, "window": WINDOW, "glu_width": 10}


@functools.cache
def model(layer, **changes):
    torch.manual_seed(1)
    made = build_model(ModelConfig(vocab_size=40, layer=layer, **{**BASE, **changes}))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made.eval()


@functools.cache
def stepper(layer, bits=32, **changes):
    weights = weights_of(model(layer, **changes))
    config = model(layer, **changes).config
    graph = build(config, weights, plan_of(VARIANTS[bits], weights))
    return Stepper(graph, chunk=chunk_of(config), block=block_of(config), capacity=config.window)


def held(layer, bits, **changes):
    made = model(layer, **changes)
    return model_as_held(made, plan_of(VARIANTS[bits], weights_of(made)))


@pytest.mark.parametrize("layer", GRAPHS)
@pytest.mark.parametrize("head", [{}, POINTER], ids=["plain", "pointer"])
def test_float32_computes_and_remembers_what_torch_does(layer, head):
    for seed in range(3):
        assert check_parity(VARIANTS[32], model(layer, **head), stepper(layer, **head), STEPS, seed) <= 1e-4


@pytest.mark.parametrize("layer", GRAPHS)
@pytest.mark.parametrize("window", [1, 5, 37])
def test_windows_of_any_length(layer, window):
    changes = {"window": window, "width": 15, "conv_width": 1 if window == 1 else 3}
    steps = 3 * window - 1  # a window that is not full at the end, unless it has but one place
    assert check_parity(VARIANTS[32], model(layer, **changes), stepper(layer, **changes), steps) <= 1e-4


def test_every_baseline_has_a_graph():
    assert GRAPHS.keys() == MIXERS.keys()


def test_heads_of_no_multiple_of_8_are_filled_up():
    assert check_parity(VARIANTS[32], model("gpt2", width=20), stepper("gpt2", width=20), STEPS) <= 1e-4
    assert stepper("gpt2", width=20).piece("layers.0.keys").shape == (1, 1, WINDOW, 24)


@pytest.mark.parametrize("layer", GRAPHS)
@pytest.mark.parametrize("head", [{}, POINTER], ids=["plain", "pointer"])
def test_int8_computes_what_torch_does_with_the_same_rounded_weights(layer, head):
    assert check_parity(VARIANTS[8], held(layer, 8, **head), stepper(layer, 8, **head), STEPS) > 0


@pytest.mark.parametrize("layer", GRAPHS)
@pytest.mark.parametrize("head", [{}, POINTER], ids=["plain", "pointer"])
def test_the_head_is_held_as_an_sdgm_s_is(layer, head):
    sdgm, baseline = weights_of(model("ringing", **head)), weights_of(model(layer, **head))
    of_head = {name for name in sdgm if not name.startswith("blocks.")}
    for variant in VARIANTS.values():
        expected, found = variant.plan(sdgm), plan_of(variant, baseline)
        assert {name: expected.get(name) for name in of_head} == {name: found.get(name) for name in of_head}


@pytest.mark.parametrize("layer", GRAPHS)
@pytest.mark.parametrize("head", [{}, POINTER], ids=["plain", "pointer"])
def test_parity_fails_on_any_perturbed_weight(layer, head):
    perturbed = held(layer, 32, **head)
    unnoticed = []
    for name, parameter in perturbed.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(1.05).add_(0.01)
        try:
            check_parity(VARIANTS[32], perturbed, stepper(layer, **head), STEPS)
            unnoticed.append(name)
        except ParityError:
            pass
        with torch.no_grad():
            parameter.copy_(kept)
    assert unnoticed == []
    check_parity(VARIANTS[32], perturbed, stepper(layer, **head), STEPS)


def test_gpt2_goes_on_beyond_its_window_as_with_a_longer_table_of_positions():
    short = model("gpt2")
    long = build_model(replace(short.config, window=3 * WINDOW)).eval()
    weights = short.state_dict()
    long.load_state_dict({**weights, "positions.weight": weights["positions.weight"].repeat(3, 1)})
    ids = torch.arange(2 * WINDOW + 9) * 7 % 40
    graph = build(short.config, weights_of(short), plan_of(VARIANTS[32], weights_of(short)))
    beyond = Stepper(graph, chunk=chunk_of(short.config), capacity=len(ids))
    with torch.no_grad():
        expected = long(ids[None]).logits_BTV[0].numpy()
    np.testing.assert_allclose(beyond.read_all(ids[:-5].tolist()), expected[:-5], rtol=1e-4, atol=1e-4)
    for token, row in zip(ids[-5:].tolist(), expected[-5:], strict=True):
        np.testing.assert_allclose(beyond.step(token), row, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", GRAPHS)
def test_no_token_copies_a_cache_or_a_ring(layer):
    """They are one buffer, whichever way the two sets of the state are turned."""
    own = stepper(layer)
    shapes = GRAPHS[layer].pieces(model(layer).config)
    for name, shape in shapes.items():
        places = []
        for token in range(2):
            own.step(token)
            places.append(own.piece(f"layers.0.{name}").ctypes.data)
        written_in_place = any(isinstance(size, str) for size in shape)
        assert (places[0] == places[1]) == written_in_place, name
