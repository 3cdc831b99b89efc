"""Config and the SDGM: all forms of both spectral layers agree, whatever the split."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sdgm_edge.models.clock import ClockAtoms
from sdgm_edge.models.config import SPECTRAL
from sdgm_edge.models.ring import FEW
from sdgm_edge.models.ringing import RingingAtoms
from tolerances import FORMS

from sdgm_edge.models import PRESETS, SDGM, ModelConfig, copy_log_probs, preset, ringing

VOCABULARY = 60


def config(**changes):
    base = {
        "vocab_size": VOCABULARY,
        "num_layers": 2,
        "width": 24,
        "num_atoms": 16,
        "window": 16,
        "glu_width": 20,
    }
    return ModelConfig(**{**base, **changes})


FAMILY = {
    "ringing": config(),
    "ringing with a pointer": config(copy_window=7, copy_width=8),
    "ringing with a pointer that goes on": config(copy_window=30, copy_width=8, copy_context=2),
    "ringing, conv of one token": config(conv_width=1, glu_width=0),
    "ringing, many atoms": config(num_atoms=FEW // 2 + 1),
    "clock": config(layer="clock", activation="softmax"),
    "the paper": config(
        layer="clock",
        activation="tanh",
        num_layers=1,
        residual=False,
        glu_width=0,
        copy_window=5,
        copy_width=8,
    ),
}


@pytest.fixture(params=FAMILY, scope="module")
def model(request):
    torch.manual_seed(1)
    model = SDGM(FAMILY[request.param]).eval()
    with torch.no_grad():  # away from the initial zeros
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def tokens(batch, steps, seed=0):
    return torch.randint(0, VOCABULARY, (batch, steps), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@settings(max_examples=15, deadline=None)
@given(steps=st.integers(1, 53), cuts=st.lists(st.integers(0, 53), max_size=4), seed=st.integers(0, 99))
def test_a_text_split_anywhere_is_the_whole_text(model, steps, cuts, seed):
    ids = tokens(2, steps, seed)
    whole = model(ids)
    edges = sorted({0, steps, *(cut for cut in cuts if cut < steps)})
    state, logits, mixing = model.initial_state(2), [], []
    for start, stop in itertools.pairwise(edges):
        out = model(ids[:, start:stop], state)
        state = out.state_BS
        logits.append(out.logits_BTV)
        mixing.append(out.mixing_BTM)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits_BTV, atol=FORMS, rtol=FORMS)
    torch.testing.assert_close(torch.cat(mixing, 1), whole.mixing_BTM, atol=FORMS, rtol=FORMS)
    torch.testing.assert_close(state, whole.state_BS, atol=FORMS, rtol=FORMS)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2, 37])
def test_step_is_the_window_token_by_token(model, steps):
    ids = tokens(3, steps)
    whole = model(ids)
    state = model.initial_state(3)
    for t in range(steps):
        before = state.clone()
        logits, mixing, new = model.step(ids[:, t], state)
        assert torch.equal(state, before), "step must not change the state that it is given"
        state = new
        torch.testing.assert_close(logits, whole.logits_BTV[:, t], atol=FORMS, rtol=FORMS)
        torch.testing.assert_close(mixing, whole.mixing_BTM[:, t], atol=FORMS, rtol=FORMS)
    torch.testing.assert_close(state, whole.state_BS, atol=FORMS, rtol=FORMS)


@torch.no_grad()
def test_a_new_convolution_changes_nothing():
    whole = SDGM(config(conv_width=4))
    bare = SDGM(config(conv_width=1))
    weights = whole.state_dict()
    bare.load_state_dict({n: w[-1:] if n.endswith("conv.weight") else w for n, w in weights.items()})
    ids = tokens(2, 12)
    assert torch.equal(whole(ids).logits_BTV, bare(ids).logits_BTV)


def test_few_sequences_are_read_in_chunks_and_many_step_by_step(monkeypatch):
    forms = []
    for name in ("ring_steps", "ring_chunks"):
        form = getattr(ringing, name)
        monkeypatch.setattr(
            ringing, name, lambda *inputs, form=form: forms.append(form.__name__) or form(*inputs)
        )
    model = SDGM(config(num_layers=1, num_atoms=FEW // 2))
    for batch in (2, 3):
        model(tokens(batch, 5))
    assert forms == ["ring_chunks", "ring_steps"]


@torch.no_grad()
def test_no_token_sees_a_later_one(model):
    ids = tokens(1, 30)
    changed = ids.clone()
    changed[0, 20] = (changed[0, 20] + 1) % VOCABULARY
    before, after = model(ids).logits_BTV, model(changed).logits_BTV
    torch.testing.assert_close(before[:, :20], after[:, :20], atol=0, rtol=0)
    assert not torch.allclose(before[:, 20], after[:, 20])


@torch.no_grad()
def test_sequences_of_a_batch_do_not_touch(model):
    ids = tokens(3, 21)
    state = model(tokens(3, 5, seed=4)).state_BS
    together = model(ids, state)
    for i in range(3):
        alone = model(ids[i : i + 1], state[i : i + 1])
        torch.testing.assert_close(alone.logits_BTV, together.logits_BTV[i : i + 1], atol=FORMS, rtol=FORMS)
        torch.testing.assert_close(alone.state_BS, together.state_BS[i : i + 1], atol=FORMS, rtol=FORMS)


@torch.no_grad()
def test_clocks_of_a_batch_may_differ():
    model = SDGM(FAMILY["clock"]).eval()
    early, late = model(tokens(1, 3)).state_BS, model(tokens(1, 11)).state_BS
    ids = tokens(2, 19)
    together = model(ids, torch.cat([early, late]))
    for i, state in enumerate((early, late)):
        alone = model(ids[i : i + 1], state)
        torch.testing.assert_close(alone.logits_BTV, together.logits_BTV[i : i + 1], atol=FORMS, rtol=FORMS)


@torch.no_grad()
@pytest.mark.parametrize("settings", [config(), config(layer="clock")], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 23, 40])
def test_layer_agrees_with_its_formula(settings, steps):
    torch.manual_seed(steps)
    kind = RingingAtoms if settings.layer == "ringing" else ClockAtoms
    layer = kind(settings)
    with torch.no_grad():  # away from the initial constants
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    x = torch.randn(steps, settings.width)
    conv = torch.zeros(1, *dict(settings.state_layout)["layers.0.conv"])
    rest = torch.zeros(1, 2, settings.num_atoms) if kind is RingingAtoms else torch.zeros(1)
    rebuilt, _, _ = layer(x[:, None], conv, rest)
    torch.testing.assert_close(rebuilt[:, 0], layer.naive(x.double()).float(), atol=FORMS, rtol=FORMS)


def test_gradients_of_the_clock_atoms_are_those_of_their_formula():
    torch.manual_seed(0)
    layer = ClockAtoms(config(layer="clock"))
    mixing = torch.randn(61, 4, 16, requires_grad=True)  # a part of a turn, three whole ones, no rest
    time = torch.arange(3.0, 64.0) % 16
    angle = 2 * torch.pi * layer.frequency * (time / layer.period)[:, None, None] + layer.phase
    literal = torch.einsum("tbk,tkd->tbd", mixing, layer.amplitude * torch.sin(angle))
    got = layer._synthesize(mixing, 3)
    torch.testing.assert_close(got, literal, atol=FORMS, rtol=FORMS)
    weights = torch.randn_like(literal)
    parameters = (mixing, layer.amplitude, layer.frequency, layer.phase)
    expected = torch.autograd.grad((literal * weights).sum(), parameters)
    for a, e in zip(torch.autograd.grad((got * weights).sum(), parameters), expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("steps", "start"), [(7, 0), (16, 0), (64, 0), (5, 14), (2, 14), (83, 11)])
@pytest.mark.parametrize("batch", [1, 3])
def test_without_a_gradient_the_clock_atoms_say_exactly_the_same(steps, start, batch):
    torch.manual_seed(steps)
    layer = ClockAtoms(config(layer="clock"))
    mixing = torch.randn(steps, batch, 16, requires_grad=True)
    with_gradient = layer._synthesize(mixing, start)
    with torch.no_grad():
        assert torch.equal(layer._synthesize(mixing, start), with_gradient)
        turns, done = [], 0  # one turn of the clock after another, as a text that is read in small windows
        while done < steps:
            count = min(steps - done, layer.period - (start + done) % layer.period)
            turns.append(layer._synthesize(mixing[done : done + count], (start + done) % layer.period))
            done += count
        assert torch.equal(torch.cat(turns), with_gradient)


def test_amplitude_and_phase_make_the_synthesis_matrix():
    layer = RingingAtoms(config())
    cosine, minus_sine = layer.synthesis.weight.T.chunk(2)
    torch.testing.assert_close(layer.amplitude * torch.cos(layer.phase), cosine)
    torch.testing.assert_close(layer.amplitude * torch.sin(layer.phase), -minus_sine)


@torch.no_grad()
def test_an_atom_that_is_dropped_goes_unheard_for_a_whole_window_and_rings_on():
    torch.manual_seed(0)
    layer = RingingAtoms(config(num_atoms=50, width=50, atom_dropout=0.4))
    inputs = torch.randn(9, 3, 50), torch.randn(3, 3, 50), torch.randn(3, 2, 50)
    whole, mixing, state = layer.eval()(*inputs)
    rebuilt, same_mixing, same_state = layer.train()(*inputs)
    assert torch.equal(same_mixing, mixing)
    assert all(map(torch.equal, same_state, state))
    assert not torch.allclose(rebuilt, whole)
    # Which atoms are heard is read back, atom by atom, through a dictionary that tells them apart.
    layer.synthesis.weight.copy_(torch.cat([torch.eye(50), torch.eye(50)], dim=1))
    heard = layer(*inputs)[0] / mixing.unflatten(2, (2, 50)).sum(2)
    torch.testing.assert_close(heard, heard[:1].expand_as(heard), atol=1e-3, rtol=1e-3)
    dropped = heard[0].abs() < 1e-6
    torch.testing.assert_close(
        heard[0][~dropped], torch.full([int((~dropped).sum())], 1 / 0.6), atol=1e-3, rtol=1e-3
    )
    assert 0.25 < dropped.float().mean() < 0.55
    assert not torch.equal(dropped[0], dropped[1])


@torch.no_grad()
@pytest.mark.parametrize("layer", SPECTRAL)
def test_the_mixture_sees_atoms_that_a_model_in_training_does_not_hear(layer):
    torch.manual_seed(0)
    model = SDGM(config(layer=layer, num_layers=1, atom_dropout=0.5, glu_width=0)).train()
    ids, state = tokens(3, 9).T, model.initial_state(3)
    one, other = model.features(ids, state), model.features(ids, state)
    heard = model.eval().features(ids, state)
    assert not torch.allclose(one.hidden_TBD, other.hidden_TBD)
    assert torch.equal(one.mixing_TBM, heard.mixing_TBM)
    assert torch.equal(one.state_BS, heard.state_BS)


@torch.no_grad()
def test_pointer_gives_a_distribution_and_copies_only_what_its_window_holds():
    torch.manual_seed(0)
    model = SDGM(FAMILY["ringing with a pointer"]).eval()
    model.pointer.gate.bias.fill_(-50.0)  # copy, and nothing else
    ids = tokens(1, 30)
    p = model(ids).logits_BTV.exp()
    torch.testing.assert_close(p.sum(-1), torch.ones(1, 30), atol=FORMS, rtol=0)
    for t in range(30):
        window = set(ids[0, max(0, t - 6) : t + 1].tolist())
        assert {i for i in range(VOCABULARY) if p[0, t, i] > 1e-6} <= window
    features = model.features(ids.T, model.initial_state())
    for word in (ids[0, 29], ids[0, 3]):
        one = copy_log_probs(features.pointed, word.expand(30, 1)).exp()
        torch.testing.assert_close(one[:, 0], p[0, :, word], atol=FORMS, rtol=1e-3)


@torch.no_grad()
@settings(max_examples=30, deadline=None)
@given(steps=st.integers(1, 24), window=st.integers(1, 9), context=st.integers(1, 4), seed=st.integers(0, 99))
def test_a_place_gains_by_every_token_before_it_that_the_text_ends_with(steps, window, context, seed):
    torch.manual_seed(seed)
    shape = {"copy_window": window, "copy_width": 8}
    plain = SDGM(config(**shape)).eval()
    model = SDGM(config(copy_context=context, **shape)).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    model.pointer.agreement.copy_(torch.randn(context))
    ids = tokens(1, steps, seed) % 3
    without, got = (m.features(ids.T, m.initial_state()).pointed.attention_TBJ[:, 0] for m in (plain, model))
    text, gains = ids[0].tolist(), [0.0, *model.pointer.agreement.cumsum(0).tolist()]
    expected = torch.zeros_like(without)
    for t in range(steps):
        first = max(0, t - window)  # the oldest token that the state and this step hold
        for j in range(max(0, t - window + 1), t + 1):
            pairs = zip(text[first:j][::-1][:context], text[: t + 1][::-1], strict=False)
            agree = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            expected[t, window + j] = without[t, window + j] * math.exp(gains[agree])
    torch.testing.assert_close(got, expected / expected.sum(1, keepdim=True), atol=FORMS, rtol=FORMS)


@torch.no_grad()
@settings(max_examples=30, deadline=None)
@given(steps=st.integers(2, 24), window=st.integers(1, 9), context=st.integers(1, 4), seed=st.integers(0, 99))
def test_what_a_place_gains_is_the_same_step_by_step(steps, window, context, seed):
    torch.manual_seed(seed)
    model = SDGM(config(copy_window=window, copy_width=8, copy_context=context)).eval()
    ids, state = tokens(2, steps, seed) % 3, model.initial_state(2)
    whole = model(ids)
    for t in range(steps):
        logits, _, state = model.step(ids[:, t], state)
        torch.testing.assert_close(logits, whole.logits_BTV[:, t], atol=FORMS, rtol=FORMS)


def test_state_layout_is_the_state():
    for member in FAMILY.values():
        model = SDGM(member)
        state = torch.randn(2, member.state_size)
        torch.testing.assert_close(model.pack(model.unpack(state)), state)


def test_config_round_trips_and_names_what_is_wrong():
    for member in FAMILY.values():
        assert ModelConfig.from_dict(member.to_dict()) == member
    with pytest.raises(ValueError, match=r"unknown model field 'widht'; known: activation"):
        ModelConfig.from_dict({"vocab_size": 9, "widht": 3})
    with pytest.raises(ValueError, match="'vocab_size' is missing"):
        ModelConfig.from_dict({"width": 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": "bell"}, "model.layer must be one of ringing, clock, gpt2, .*, got 'bell'"),
        ({"activation": "relu"}, "model.activation must be one of"),
        ({"width": 0}, "model.width must be a whole number of at least 1, got 0"),
        ({"num_atoms": 2.5}, "model.num_atoms must be a whole number"),
        ({"copy_window": -1}, "model.copy_window must be a whole number of at least 0"),
        ({"copy_context": 2}, "model.copy_context needs a head that points, got 2 without copy_window"),
        ({"copy_context": -1}, "model.copy_context must be a whole number of at least 0"),
        ({"dropout": 1.0}, r"model.dropout must lie in \[0, 1\), got 1.0"),
        ({"atom_dropout": -0.1}, r"model.atom_dropout must lie in \[0, 1\), got -0.1"),
        ({"residual": 1}, "model.residual must be true or false"),
        ({"residual": False}, "the paper's single layer, got num_layers = 2"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize(("name", "millions"), [("edge-nano", 1), ("edge-micro", 4), ("edge-small", 9)])
def test_product_presets_have_their_size_and_a_small_state(name, millions):
    assert SDGM(PRESETS[name]).num_parameters == pytest.approx(millions * 1e6, rel=0.1)
    assert 4 * PRESETS[name].state_size < 60_000


def test_preset_changes_fields_and_knows_its_names():
    assert preset("paper", copy_window=3) == dataclasses.replace(PRESETS["paper"], copy_window=3)
    with pytest.raises(ValueError, match=r"model.preset must be one of paper, edge-nano"):
        preset("edge-huge")
