"""Baselines: every mixer agrees with its definition, in whatever pieces it reads, and never looks ahead."""

import copy
import itertools
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import FORMS

from sdgm_edge.models import MIXERS, ModelConfig, build_model

VOCABULARY, WINDOW = 40, 16


def config(layer, **changes):
    base = {"num_layers": 2, "width": 12, "num_atoms": 7, "conv_width": 3, "window": WINDOW, "glu_width": 10}
    return ModelConfig(vocab_size=VOCABULARY, layer=layer, **{**base, **changes})


def away_from_its_start(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module.eval()


@pytest.fixture(params=itertools.product(MIXERS, (0, 6)), scope="module", ids=lambda p: f"{p[0]}-{p[1]}")
def model(request):
    """Every baseline, with a plain head and with one that copies from the last 6 tokens."""
    layer, copy_window = request.param
    torch.manual_seed(1)
    return away_from_its_start(build_model(config(layer, copy_window=copy_window, copy_width=5)))


def tokens(batch, steps, seed=0):
    return torch.randint(0, VOCABULARY, (batch, steps), generator=torch.Generator().manual_seed(seed))


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=FORMS, rtol=FORMS)


@torch.no_grad()
@pytest.mark.parametrize("layer", MIXERS)
@pytest.mark.parametrize("window", [1, 5, WINDOW, 19])
def test_mixer_agrees_with_its_definition(layer, window):
    settings = config(layer, window=window)
    torch.manual_seed(window)
    mixer = away_from_its_start(MIXERS[layer](settings))
    steps = window if mixer.windowed else 37
    x = torch.randn(steps, settings.width)
    start = tuple(torch.zeros(1, *shape) for _, shape in mixer.layout(settings))
    got, _ = mixer(x[:, None], start, 0)
    exact = copy.deepcopy(mixer).double().naive(x.double())
    close(got[:, 0], exact.float())
    exact[-1] += 1e-3
    with pytest.raises(AssertionError):
        close(got[:, 0], exact.float())


@torch.no_grad()
@settings(max_examples=10)
@given(steps=st.integers(1, 53), cuts=st.lists(st.integers(0, 53), max_size=4), seed=st.integers(0, 99))
def test_a_text_split_anywhere_is_the_whole_text(model, steps, cuts, seed):
    ids = tokens(2, steps, seed)
    whole = model(ids)
    edges = sorted({0, steps, *(cut for cut in cuts if cut < steps)})
    state, logits = model.initial_state(2), []
    for start, stop in itertools.pairwise(edges):
        before = state.clone()
        out = model(ids[:, start:stop], state)
        assert torch.equal(state, before), "a model must not change the state that it is given"
        state = out.state_BS
        logits.append(out.logits_BTV)
    close(torch.cat(logits, 1), whole.logits_BTV)
    close(state, whole.state_BS)
    assert state.shape == (2, model.config.state_size)


@torch.no_grad()
def test_step_is_the_window_token_by_token(model):
    ids, state = tokens(3, 2 * WINDOW + 3), model.initial_state(3)
    whole = model(ids)
    for t in range(ids.shape[1]):
        logits, mixing, state = model.step(ids[:, t], state)
        close(logits, whole.logits_BTV[:, t])
        assert mixing.shape == (3, 0)
    close(state, whole.state_BS)


@torch.no_grad()
@pytest.mark.parametrize("place", [0, 7, 20, 31])
def test_no_token_sees_a_later_one(model, place):
    ids = tokens(1, 40)
    changed = ids.clone()
    changed[0, place] = (changed[0, place] + 1) % VOCABULARY
    before, after = model(ids).logits_BTV, model(changed).logits_BTV
    close(after[:, :place], before[:, :place])
    assert not torch.allclose(before[:, place], after[:, place])


@torch.no_grad()
def test_tokens_see_earlier_ones(model):
    ids = tokens(1, 10)
    changed = ids.clone()
    changed[0, 7] = (changed[0, 7] + 1) % VOCABULARY
    assert not torch.allclose(model(ids).logits_BTV[:, 9], model(changed).logits_BTV[:, 9], atol=1e-6)


@torch.no_grad()
def test_sequences_of_a_batch_do_not_touch_wherever_they_stand(model):
    state = torch.cat([model(tokens(1, steps, seed=4)).state_BS for steps in (3, 5, 21)])
    ids = tokens(3, 25)
    together = model(ids, state)
    for i in range(3):
        alone = model(ids[i : i + 1], state[i : i + 1])
        close(alone.logits_BTV, together.logits_BTV[i : i + 1])
        close(alone.state_BS, together.state_BS[i : i + 1])


@torch.no_grad()
@pytest.mark.parametrize("layer", [name for name, mixer in MIXERS.items() if mixer.windowed])
def test_windows_of_a_windowed_mixer_are_read_afresh(layer):
    model = away_from_its_start(build_model(config(layer)))
    ids = tokens(1, 2 * WINDOW)
    close(model(ids).logits_BTV[:, WINDOW:], model(ids[:, WINDOW:]).logits_BTV)


@torch.no_grad()
def test_low_precision_says_about_the_same_and_keeps_its_state_exact(model):
    ids = tokens(2, 2 * WINDOW + 5)
    exact, state = model(ids), model.initial_state(2)
    for part in ids.split(13, dim=1):  # from a state on, too
        with torch.autocast("cpu", torch.bfloat16):
            out = model(part, state)
        state = out.state_BS
        assert state.dtype == torch.float32
    last = exact.logits_BTV[:, -1]
    assert (out.logits_BTV[:, -1].float() - last).abs().max() < 0.05 * last.abs().max()


def test_every_parameter_is_trained(model):
    model.zero_grad()
    ids = tokens(2, 2 * WINDOW + 1)
    logits = model(ids[:, :-1]).logits_BTV
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


def test_heads_are_about_64_wide_and_divide_the_width():
    from sdgm_edge.models.baselines.attention import num_heads

    assert [num_heads(width) for width in (12, 64, 128, 100, 260, 768)] == [1, 1, 2, 1, 4, 12]


@torch.no_grad()
@pytest.mark.parametrize("layer", [name for name, mixer in MIXERS.items() if mixer.windowed])
def test_a_pointer_sees_across_the_windows_of_a_windowed_mixer(layer):
    torch.manual_seed(1)
    model = away_from_its_start(build_model(config(layer, copy_window=5, copy_width=4)))
    ids = tokens(1, 2 * WINDOW)
    changed = ids.clone()
    changed[0, WINDOW - 1] = (changed[0, WINDOW - 1] + 1) % VOCABULARY
    difference = (model(ids).logits_BTV - model(changed).logits_BTV).abs().amax(-1)[0]
    end = WINDOW + 5  # the key of the next token is made of what the changed one left behind
    assert difference[WINDOW:end].min() > 1e-4
    assert difference[end:].max() < 1e-5


def test_a_baseline_has_no_dictionary_and_always_a_residual_stream():
    assert (config("gpt2").mixing_size, config("gpt2").spectral) == (0, False)
    with pytest.raises(ValueError, match="'gpt2' has a residual stream, got residual = false: set residual"):
        config("gpt2", residual=False, num_layers=1)


def test_the_mixer_in_the_docs_is_one(monkeypatch):
    text = (Path(__file__).parent.parent / "docs/compare.md").read_text("utf-8")
    package = "sdgm_edge.models.baselines"  # as a file there
    names = {"__name__": f"{package}.running_mean", "__package__": package}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)
    monkeypatch.setitem(MIXERS, "gpt2", names["RunningMean"])
    model = away_from_its_start(build_model(config("gpt2")))
    mixer, x = model.blocks[0].mixer, torch.randn(9, 12)
    with torch.no_grad():
        got, _ = mixer(x[:, None], (torch.zeros(1, 12), torch.zeros(1, 1)), 0)
        close(got[:, 0], copy.deepcopy(mixer).double().naive(x.double()).float())
        ids = tokens(2, 11)
        first = model(ids[:, :4])
        rest = model(ids[:, 4:], first.state_BS)
        close(torch.cat([first.logits_BTV, rest.logits_BTV], 1), model(ids).logits_BTV)
