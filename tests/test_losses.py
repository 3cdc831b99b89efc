import math

import numpy as np
import pytest
import torch
from sdgm_edge.models.pointer import mixed_log_probs
from sklearn.mixture import GaussianMixture
from tolerances import BF16, GRADIENT, LOG_DENSITY, SPECTRUM

from sdgm_edge import losses
from sdgm_edge.losses import (
    HOP,
    N_FFT,
    LossWeights,
    Objective,
    sample_words,
    stft_magnitude,
    vocabulary_nll,
)
from sdgm_edge.models import SDGM, ModelConfig
from sdgm_edge.prior import Reservoir, fit_mixture, install

VOCABULARY = 50


def make_model(copy_window=0, **changes):
    torch.manual_seed(0)
    return SDGM(
        ModelConfig(
            vocab_size=VOCABULARY, width=16, num_atoms=8, window=32, copy_window=copy_window, **changes
        )
    )


def batch(steps=33, sequences=3):
    ids = torch.randint(0, VOCABULARY, (sequences, steps + 1), generator=torch.Generator().manual_seed(5))
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("copy_window", [0, 9])
@pytest.mark.parametrize(("rows", "few"), [(1, 1), (7, 3), (7, 7), (1000, 10), (1000, 1000)])
def test_vocabulary_nll_and_its_gradient_are_those_of_the_plain_softmax(copy_window, rows, few, monkeypatch):
    monkeypatch.setattr(losses, "LEAST_ROWS", 1)
    monkeypatch.setattr(losses, "IN_CACHE", few * VOCABULARY)
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", rows * VOCABULARY)
    model = make_model(copy_window)
    ids, targets = batch()
    log_p = torch.log_softmax(model(ids).logits_BTV, dim=-1)
    expected = -log_p.gather(-1, targets[:, :, None]).sum()
    expected_grads = torch.autograd.grad(expected, list(model.parameters()))
    got = vocabulary_nll(model.features(ids.T, model.initial_state(3)), model, targets.T)
    got_grads = torch.autograd.grad(got, list(model.parameters()))
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, _), a, e in zip(model.named_parameters(), got_grads, expected_grads, strict=True):
        scale = e.abs().max().item()
        torch.testing.assert_close(a, e, atol=GRADIENT * max(1, scale), rtol=GRADIENT, msg=f"{name} differs")


@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16])
def test_the_loss_in_bf16_is_near_that_in_float32_and_so_is_its_gradient(hidden, monkeypatch):
    monkeypatch.setattr(losses, "LEAST_ROWS", 20)
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 0)
    monkeypatch.setattr(losses, "IN_CACHE", 3 * VOCABULARY)
    model = make_model(copy_window=9)
    ids, targets = batch()
    features = model.features(ids.T, model.initial_state(3))
    rounded = features.hidden_TBD.detach().to(hidden).requires_grad_()
    inputs = [rounded, model.embedding.weight, model.bias]
    exact = vocabulary_nll(features._replace(hidden_TBD=rounded.float()), model, targets.T)
    exact_grads = torch.autograd.grad(exact, inputs, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        low = vocabulary_nll(features._replace(hidden_TBD=rounded), model, targets.T)
    assert low.item() == pytest.approx(exact.item(), rel=BF16)
    for tensor, a, e in zip(inputs, torch.autograd.grad(low, inputs), exact_grads, strict=True):
        assert a.dtype == tensor.dtype
        torch.testing.assert_close(a, e, atol=BF16 * e.abs().max().item(), rtol=0)


@pytest.mark.parametrize("copy_window", [0, 9])
def test_a_score_is_the_loss_without_the_work_of_its_gradient(copy_window, monkeypatch):
    model = make_model(copy_window)
    ids, targets = batch()
    expected = vocabulary_nll(model.features(ids.T, model.initial_state(3)), model, targets.T)
    with torch.no_grad():
        features = model.features(ids.T, model.initial_state(3))
        made = []
        monkeypatch.setattr(torch, "zeros_like", made.append)  # a gradient begins as zeros
        assert torch.equal(vocabulary_nll(features, model, targets.T), expected)
    assert made == []


def test_sampled_words_are_the_targets_and_others_that_stand_for_the_rest_without_bias():
    torch.manual_seed(0)
    targets = torch.tensor([[3, 7], [7, 49]])
    exponentials = torch.randn(VOCABULARY, dtype=torch.float64).mul(2).exp()
    estimates = []
    for _ in range(3000):
        words, log_weight = sample_words(targets, VOCABULARY, 10)
        weight = dict(zip(words.tolist(), log_weight.exp().tolist(), strict=True))
        assert len(words) == 13
        assert (weight[3], weight[7], weight[49]) == (1, 1, 1)
        assert words.tolist() == sorted(weight)
        estimates.append((exponentials[words] * log_weight.exp()).sum().item())
    error = np.std(estimates) / math.sqrt(len(estimates))
    assert np.mean(estimates) == pytest.approx(exponentials.sum().item(), abs=3 * error)
    assert error < 0.02 * exponentials.sum()


@pytest.mark.parametrize("copy_window", [0, 9])
def test_the_gradient_with_sampled_words_is_that_of_the_weighted_softmax_over_them(copy_window):
    model = make_model(copy_window)
    ids, targets = batch(steps=4)
    features = model.features(ids.T, model.initial_state(3))
    torch.manual_seed(1)
    words, log_weight = sample_words(targets, VOCABULARY, 12)
    absent = torch.full((VOCABULARY,), -math.inf).index_copy(0, words, log_weight)
    logits_TBV = model.scores(features.hidden_TBD) + absent
    log_p = torch.log_softmax(logits_TBV, dim=-1)
    if features.pointed is not None:
        log_p = mixed_log_probs(features.pointed, logits_TBV)
    expected = -log_p.gather(-1, targets.T[:, :, None]).sum()
    expected_grads = torch.autograd.grad(expected, list(model.parameters()), retain_graph=True)
    torch.manual_seed(1)
    got = vocabulary_nll(features, model, targets.T, sampled_words=12)
    got_grads = torch.autograd.grad(got, list(model.parameters()))
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, _), a, e in zip(model.named_parameters(), got_grads, expected_grads, strict=True):
        scale = e.abs().max().item()
        torch.testing.assert_close(a, e, atol=GRADIENT * max(1, scale), rtol=GRADIENT, msg=f"{name} differs")


def test_where_every_word_is_a_target_none_is_drawn():
    words, log_weight = sample_words(torch.arange(VOCABULARY), VOCABULARY, 10)
    assert words.tolist() == list(range(VOCABULARY))
    assert not log_weight.any()


def test_more_sampled_words_than_there_are_give_the_loss_itself():
    model = make_model()
    ids, targets = batch(steps=4)
    features = model.features(ids.T, model.initial_state(3))
    exact = vocabulary_nll(features, model, targets.T)
    assert torch.equal(vocabulary_nll(features, model, targets.T, VOCABULARY), exact)
    nearly = vocabulary_nll(features, model, targets.T, VOCABULARY - 1)  # all others are drawn
    assert nearly.item() == pytest.approx(exact.item(), rel=1e-6)
    assert vocabulary_nll(features, model, targets.T, 5).item() != pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize("steps", [5, 128, 300])
def test_stft_is_the_one_of_torch(steps):
    x = torch.randn(steps, 2, 3)
    spectrum = torch.stft(
        x.permute(1, 2, 0).flatten(0, 1),
        N_FFT,
        HOP,
        window=torch.hann_window(N_FFT),
        center=True,
        pad_mode="constant",
        return_complex=True,
    )
    expected = spectrum.abs().flatten(1).unflatten(0, (2, 3))
    torch.testing.assert_close(stft_magnitude(x), expected, atol=SPECTRUM, rtol=SPECTRUM)


def test_a_term_of_weight_zero_is_not_computed_and_the_loss_is_the_weighted_sum():
    model = make_model()
    ids, targets = batch()
    state = model.initial_state(3)
    weights = LossWeights(reconstruction=0.5, spectrum=0.25, language=2.0, prior=0.125)
    terms, _ = Objective(model, weights, 4)(ids, targets, state)
    parts = (terms.reconstruction, terms.spectrum, terms.language, terms.prior)
    expected = sum(w * p for w, p in zip((0.5, 0.25, 2.0, 0.125), parts, strict=True))
    torch.testing.assert_close(terms.loss, expected)
    alone, _ = Objective(model, LossWeights(), 4)(ids, targets, state)
    assert (alone.reconstruction, alone.spectrum, alone.prior) == (None, None, None)
    torch.testing.assert_close(alone.loss, terms.language)
    silent, _ = Objective(model, LossWeights(language=0.0, spectrum=1.0), 4)(ids, targets, state)
    assert silent.language is None
    torch.testing.assert_close(silent.loss, terms.spectrum)


def test_terms_are_the_norms_of_the_paper_divided_by_the_number_of_elements():
    model = make_model()
    ids, targets = batch()
    terms, f = Objective(model, LossWeights(reconstruction=1.0, spectrum=1.0), 4)(
        ids, targets, model.initial_state(3)
    )
    difference = f.rebuilt_TBD - f.embedded_TBD
    assert terms.reconstruction.item() == pytest.approx(
        difference.square().sum().item() / difference.numel(), rel=1e-5
    )
    magnitudes = stft_magnitude(f.rebuilt_TBD) - stft_magnitude(f.embedded_TBD)
    assert terms.spectrum.item() == pytest.approx(
        magnitudes.square().sum().item() / magnitudes.numel(), rel=1e-5
    )


def test_weights_refuse_what_trains_nothing():
    with pytest.raises(ValueError, match=r"loss.prior must be a number of at least 0, got -1"):
        LossWeights(prior=-1)
    with pytest.raises(ValueError, match="all loss weights are 0"):
        LossWeights(language=0)


def clusters(count=600, size=16):
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 3, (3, size))
    return (centres[rng.integers(0, 3, count)] + rng.normal(0, 0.5, (count, size))).astype(np.float32)


def test_prior_density_is_that_of_scikit_learn():
    vectors = clusters()
    arrays = fit_mixture(vectors, 3)
    objective = Objective(make_model(), LossWeights(), 3)
    install(objective, arrays)
    reference = GaussianMixture(3, covariance_type="diag")
    reference.weights_, reference.means_ = arrays["weights"], arrays["means"]
    reference.precisions_cholesky_ = 1 / np.sqrt(arrays["variances"])
    got = objective.prior_log_density(torch.from_numpy(vectors)).numpy()
    np.testing.assert_allclose(got, reference.score_samples(vectors), atol=LOG_DENSITY)


def test_a_refit_starts_from_the_mixture_before_it():
    vectors = clusters()
    first = fit_mixture(vectors, 3)
    again = fit_mixture(vectors, 3, start=first)
    np.testing.assert_allclose(again["means"], first["means"], atol=1e-2)  # components keep their places
    assert first["weights"].sum() == pytest.approx(1, abs=1e-5)
    assert (first["variances"] > 0).all()
    assert len(fit_mixture(vectors[:2], 3)["weights"]) == 2  # never more components than vectors


def test_reservoir_keeps_the_newest_and_chooses_by_seed():
    one, other = Reservoir(100, 4), Reservoir(100, 4)
    mixing = torch.arange(10 * 2 * 4.0).view(10, 2, 4)
    for step in range(3):
        one.add(mixing, seed=step)
        other.add(mixing, seed=step)
    assert torch.equal(one.vectors, other.vectors)
    assert len(one.collected()) == 100
    one.add(mixing + 1000, seed=9)
    assert (one.collected() >= 1000).all(axis=1).sum() == 64
    assert len(Reservoir(100, 4).collected()) == 0


def test_log_weights_of_an_unfitted_prior_are_uniform():
    objective = Objective(make_model(), LossWeights(), 4)
    density = objective.prior_log_density(torch.zeros(1, 16))
    assert density.item() == pytest.approx(-8 * math.log(2 * math.pi), abs=1e-4)
