"""The composite loss: α·‖X̂−X‖² + β·‖|STFT(X̂)|−|STFT(X)|‖² + γ·NLL + δ·L_prior.

The squared norms are divided by the number of elements and the likelihoods by the number of tokens, so that
a weight means the same at any batch and window (the paper leaves its scale open). A term of weight zero is
never computed.

Shapes: T time, B batch, D width, V vocabulary, M mixing vector, G components of the prior, N = T·B tokens.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from sdgm_edge.models import Features, LanguageModel, copy_log_probs, uncompiled

N_FFT, HOP = 256, 64
LOGITS_AT_ONCE = 1 << 21
"""Logits in one chunk …"""
LEAST_ROWS = 512
"""… but not fewer tokens than this, or adding up the gradient of a large vocabulary would cost more."""
IN_CACHE = 1 << 18
"""Logits that a processor works on at once: 1 MiB of float32, which its cache holds from pass to pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossWeights:
    """How much each term of the loss counts. Letters in brackets are the paper's."""

    reconstruction: float = 0.0
    """Mean squared error between the last synthesis and the embedding [α]."""
    spectrum: float = 0.0
    """Mean squared error between their STFT magnitudes [β]."""
    language: float = 1.0
    """Negative log-likelihood of the next token [γ]."""
    prior: float = 0.0
    """Negative log-likelihood of the mixing vectors under the Gaussian mixture [δ]."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            weight = getattr(self, name)
            if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
                raise ValueError(f"loss.{name} must be a number of at least 0, got {weight!r}")
        if not any(getattr(self, name) for name in self.__slots__):
            raise ValueError("all loss weights are 0: nothing would be trained")


class _VocabularyNLL(torch.autograd.Function):
    """Sum of −log p(target) over tokens, chunk by chunk; the gradient is made in the same pass.

    p is the softmax over the vocabulary or, where a pointer gives the log shares of both, its gated mixture
    with what is copied. Of a chunk there is one copy, in the precision of the products: its logits become
    e^(logit − largest) in place, a few rows at a time, in float32. What is constant in a row of the gradient
    share · (softmax − one-hot) is left to the narrow side of the products.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        log_gate: Tensor | None,
        log_copy: Tensor | None,
    ) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        low_hidden, low_weight = hidden.detach().to(dtype), weight.detach().to(dtype)
        total = hidden.new_zeros((), dtype=torch.float64)
        said_share = torch.ones(len(targets), device=hidden.device)
        scale = torch.empty_like(said_share)  # share / normaliser
        rows = max(LEAST_ROWS, LOGITS_AT_ONCE // len(weight))
        few = max(1, IN_CACHE // len(weight)) if device == "cpu" else rows
        buffer = low_hidden.new_empty(min(rows, len(targets)), len(weight))
        grads = None
        if any(ctx.needs_input_grad):  # type: ignore[attr-defined]
            grads = torch.empty_like(hidden), torch.zeros_like(weight), torch.zeros_like(bias)
        for start in range(0, len(targets), rows):
            part = slice(start, min(start + rows, len(targets)))
            scores = torch.mm(low_hidden[part], low_weight.T, out=buffer[: part.stop - start])
            for first in range(start, part.stop, few):
                some = slice(first, min(first + few, part.stop))
                own = scores[first - start : some.stop - start]
                logits = own.float().add_(bias)
                top = logits.amax(1, keepdim=True)
                log_p = (logits.gather(1, targets[some, None]) - top).squeeze(1)
                normaliser = logits.sub_(top).exp_().sum(1)
                log_p -= normaliser.log()
                if log_gate is not None and log_copy is not None:
                    said = log_gate[some] + log_p
                    log_p = torch.logaddexp(said, log_copy[some])
                    said_share[some] = torch.exp(said - log_p)
                total -= log_p.sum()
                if grads is not None:
                    scale[some] = said_share[some] / normaliser
                    grads[2].addmv_(logits.T, scale[some])
                    own.copy_(logits)
            if grads is not None:
                grads[0][part] = scores @ low_weight
                grads[1].add_(scores.T @ (hidden[part] * scale[part, None]).to(dtype))
        if grads is not None:
            grads[0].mul_(scale[:, None]).addcmul_(weight[targets], said_share[:, None], value=-1)
            grads[1].index_add_(0, targets, hidden * said_share[:, None], alpha=-1)
            grads[2].index_add_(0, targets, said_share, alpha=-1)
            ctx.save_for_backward(*grads, said_share)
        ctx.has_copy = log_gate is not None  # type: ignore[attr-defined]
        return total.float()

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias, said_share = ctx.saved_tensors  # type: ignore[attr-defined]
        gate, copy = (-said_share * grad, (said_share - 1) * grad) if ctx.has_copy else (None, None)  # type: ignore[attr-defined]
        return grad_hidden * grad, grad_weight * grad, grad_bias * grad, None, gate, copy


def sample_words(targets: Tensor, vocab_size: int, num_sampled: int) -> tuple[Tensor, Tensor]:
    """Return the words that stand for a vocabulary, sorted, and the log of how many each stands for.

    All targets are there, for themselves alone; of the other words `num_sampled` are drawn, each as likely as
    any. So the sum of weight · e^logit over these words is that over the vocabulary on average.
    """
    is_target = torch.zeros(vocab_size, dtype=torch.bool, device=targets.device)
    is_target[targets.flatten()] = True
    others = (~is_target).nonzero().squeeze(1)
    drawn = others[torch.randperm(len(others), device=others.device)[:num_sampled]]
    words = torch.cat([is_target.nonzero().squeeze(1), drawn]).sort().values
    stands_for = max(1, len(others)) / max(1, len(drawn))
    return words, torch.where(is_target[words], 0.0, math.log(stands_for))


def vocabulary_nll(
    features: Features, model: LanguageModel, targets_TB: Tensor, sampled_words: int = 0
) -> Tensor:
    """Return the sum of −log p(target) over a window, in bounded memory.

    With `sampled_words` the normaliser is estimated from the targets and so many other words, drawn by
    torch's generator: quicker, and its logarithm a little too low on average. A vocabulary that has no more
    words is taken whole.
    """
    log_gate = log_copy = None
    targets = targets_TB.flatten()
    weight: Tensor = model.embedding.weight
    bias: Tensor = model.bias
    if not torch.is_grad_enabled():  # weights that could have a gradient would be given one even so
        weight, bias = weight.detach(), bias.detach()
    if 0 < sampled_words < len(weight):
        words, log_weight = sample_words(targets, len(weight), sampled_words)
        weight, bias = weight.index_select(0, words), bias[words] + log_weight
        targets = torch.searchsorted(words, targets)
    if features.pointed is not None:
        log_gate = features.pointed.log_gate_TB.flatten()
        log_copy = (features.pointed.log_copy_TB + copy_log_probs(features.pointed, targets_TB)).flatten()
    total: Tensor = _VocabularyNLL.apply(  # type: ignore[no-untyped-call]
        features.hidden_TBD.flatten(0, 1), weight, bias, targets, log_gate, log_copy
    )
    return total


@uncompiled  # which would make it anew in every step
@functools.lru_cache(maxsize=8)
def _stft_basis(num_steps: int, device: torch.device) -> Tensor:
    """Return the STFT of a window of that length as one matrix, (T, 2·bins·frames): it is linear."""
    eye = torch.eye(num_steps, device=device)
    hann = torch.hann_window(N_FFT, device=device)
    # Centred frames over a zero-padded signal: a window shorter than N_FFT still has a spectrum.
    spectrum = torch.stft(eye, N_FFT, HOP, window=hann, center=True, pad_mode="constant", return_complex=True)
    return torch.cat([spectrum.real.flatten(1), spectrum.imag.flatten(1)], dim=1)


def stft_magnitude(x_TBD: Tensor) -> Tensor:
    """Return |STFT| along time of every feature, (B, D, bins·frames)."""
    real, imag = (x_TBD.permute(1, 2, 0) @ _stft_basis(len(x_TBD), x_TBD.device)).float().chunk(2, dim=-1)
    return torch.sqrt(real.square() + imag.square() + 1e-12)


class Terms(NamedTuple):
    """The loss and what it is made of, unweighted; None where a term is off."""

    loss: Tensor
    language: Tensor | None
    reconstruction: Tensor | None
    spectrum: Tensor | None
    prior: Tensor | None


class Objective(nn.Module):
    """A model and its loss in one module, so that `torch.compile` sees a single forward pass."""

    prior_log_weights: Tensor
    prior_means: Tensor
    prior_variances: Tensor

    def __init__(self, model: LanguageModel, weights: LossWeights, num_components: int) -> None:
        super().__init__()
        self.model, self.weights = model, weights
        self.sampled_words = 0
        """Words drawn to estimate the normaliser, 0 for all; may change from step to step."""
        M = model.config.mixing_size
        self.register_buffer("prior_log_weights", torch.full((num_components,), -math.log(num_components)))
        self.register_buffer("prior_means", torch.zeros(num_components, M))
        self.register_buffer("prior_variances", torch.ones(num_components, M))

    def forward(self, ids_BT: Tensor, targets_BT: Tensor, state_BS: Tensor) -> tuple[Terms, Features]:
        """Return the terms of the loss, and the features they came from, for one window of each sequence."""
        w, f = self.weights, self.model.features(ids_BT.T, state_BS)
        loss = f.hidden_TBD.new_zeros((), dtype=torch.float32)
        language = reconstruction = spectrum = prior = None
        if w.language:
            language = self._language(f, targets_BT)
            loss = loss + w.language * language
        if w.reconstruction:
            reconstruction = functional.mse_loss(f.rebuilt_TBD.float(), f.embedded_TBD.float())
            loss = loss + w.reconstruction * reconstruction
        if w.spectrum:
            spectrum = functional.mse_loss(stft_magnitude(f.rebuilt_TBD), stft_magnitude(f.embedded_TBD))
            loss = loss + w.spectrum * spectrum
        if w.prior:
            prior = -self.prior_log_density(f.mixing_TBM.flatten(0, 1)).mean()
            loss = loss + w.prior * prior
        return Terms(loss, language, reconstruction, spectrum, prior), f

    @uncompiled  # chunk by chunk, with its own gradient
    def _language(self, features: Features, targets_BT: Tensor) -> Tensor:
        return vocabulary_nll(features, self.model, targets_BT.T, self.sampled_words) / targets_BT.numel()

    def prior_log_density(self, c_NM: Tensor) -> Tensor:
        """Return log p(c) under the diagonal mixture, (N,)."""
        with torch.autocast(c_NM.device.type, enabled=False):
            c, precision = c_NM.float(), 1 / self.prior_variances
            quadratic = c.square() @ precision.T - 2 * c @ (self.prior_means * precision).T
            constant = (
                self.prior_means.square() * precision + torch.log(2 * math.pi * self.prior_variances)
            ).sum(1)
            return torch.logsumexp(self.prior_log_weights - (quadratic + constant) / 2, dim=1)
