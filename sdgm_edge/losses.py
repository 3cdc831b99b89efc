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

from sdgm_edge.models import Features, LanguageModel, copy_log_probs

N_FFT, HOP = 256, 64
LOGITS_AT_ONCE = 1 << 21
"""Logits in one chunk: 8 MiB of float32, which a processor's cache holds …"""
LEAST_ROWS = 512
"""… but not fewer tokens than this, or adding up the gradient of a large vocabulary would cost more."""


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
    with what is copied. A chunk's logits become its gradient in place: two copies of a chunk, never more.
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
        grads = None
        if any(ctx.needs_input_grad):  # type: ignore[attr-defined]
            grads = torch.empty_like(hidden), torch.zeros_like(weight), torch.zeros_like(bias)
        rows = max(LEAST_ROWS, LOGITS_AT_ONCE // len(weight))

        def chunk(part: slice) -> Tensor:
            """Return Σ log p(target) of some rows, having made their gradient."""
            target = targets[part, None]
            logits = (low_hidden[part] @ low_weight.T).float().add_(bias)
            top = logits.amax(1, keepdim=True)
            log_p = (logits.gather(1, target) - top).squeeze(1)
            normaliser = logits.sub_(top).exp_().sum(1)
            log_p = log_p - normaliser.log()
            if log_gate is not None and log_copy is not None:
                said = log_gate[part] + log_p
                log_p = torch.logaddexp(said, log_copy[part])
                said_share[part] = torch.exp(said - log_p)
            if grads is not None:  # ∂/∂logits = share · (softmax − one-hot)
                share = said_share[part, None]
                grad = logits.mul_(share / normaliser[:, None]).scatter_add_(1, target, -share)
                low_grad = grad.to(dtype)
                grads[0][part] = low_grad @ low_weight
                grads[1].add_(low_grad.T @ low_hidden[part])
                grads[2].add_(grad.sum(0))
            return log_p.sum()

        for start in range(0, len(targets), rows):
            total -= chunk(slice(start, start + rows))
        if grads is not None:
            ctx.save_for_backward(*grads, said_share)
        ctx.has_copy = log_gate is not None  # type: ignore[attr-defined]
        return total.float()

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias, said_share = ctx.saved_tensors  # type: ignore[attr-defined]
        gate, copy = (-said_share * grad, (said_share - 1) * grad) if ctx.has_copy else (None, None)  # type: ignore[attr-defined]
        return grad_hidden * grad, grad_weight * grad, grad_bias * grad, None, gate, copy


@torch.compiler.disable  # type: ignore[untyped-decorator]  # chunk by chunk, with its own gradient
def vocabulary_nll(features: Features, model: LanguageModel, targets_TB: Tensor) -> Tensor:
    """Return the sum of −log p(target) over a window, in bounded memory."""
    log_gate = log_copy = None
    weights: tuple[Tensor, Tensor] = model.embedding.weight, model.bias
    if not torch.is_grad_enabled():  # weights that could have a gradient would be given one even so
        weights = weights[0].detach(), weights[1].detach()
    if features.pointed is not None:
        log_gate = features.pointed.log_gate_TB.flatten()
        log_copy = (features.pointed.log_copy_TB + copy_log_probs(features.pointed, targets_TB)).flatten()
    total: Tensor = _VocabularyNLL.apply(  # type: ignore[no-untyped-call]
        features.hidden_TBD.flatten(0, 1),
        *weights,
        targets_TB.flatten(),
        log_gate,
        log_copy,
    )
    return total


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
            language = vocabulary_nll(f, self.model, targets_BT.T) / targets_BT.numel()
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

    def prior_log_density(self, c_NM: Tensor) -> Tensor:
        """Return log p(c) under the diagonal mixture, (N,)."""
        with torch.autocast(c_NM.device.type, enabled=False):
            c, precision = c_NM.float(), 1 / self.prior_variances
            quadratic = c.square() @ precision.T - 2 * c @ (self.prior_means * precision).T
            constant = (
                self.prior_means.square() * precision + torch.log(2 * math.pi * self.prior_variances)
            ).sum(1)
            return torch.logsumexp(self.prior_log_weights - (quadratic + constant) / 2, dim=1)
