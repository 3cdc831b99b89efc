"""Clock atoms: the paper's spectral layer, literally.

    C = act(Conv1D(X))                                  mixing coefficients, the convolution made causal
    S[k,t,d] = A[k,d] · sin(2π · F[k,d] · t/L + Φ[k,d])  the global dictionary at clock time t
    x̂[t,d] = Σ_k C[t,k] · S[k,t,d]                      synthesis, O(K) a token

The clock wraps at L, so that text of any length has a time; its position is part of the state.

Shapes: T time, B batch, D width, K atoms, L period of the clock, W width of the convolution.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from .compiling import uncompiled
from .config import ModelConfig
from .layers import LockedDropout, activation


class _Sinusoids:
    """sin and cos of 2πF·τ + Φ, (K, D) each, at the t-th of some evenly spaced times τ.

    The angle of such a time is a coarse one plus a fine one, sin(a + b) = sin a cos b + cos a sin b, so about
    2√T·K·D of each are evaluated; the rest are products, made while K·D of them fit a processor's cache.
    """

    def __init__(self, F: Tensor, phase: Tensor, time: Tensor) -> None:
        self._count = max(1, math.isqrt(len(time)))
        coarse = 2 * math.pi * F * time[:: self._count, None, None] + phase
        fine = 2 * math.pi * F * (time[: self._count] - time[0])[:, None, None]
        self._sin_a, self._cos_a = torch.sin(coarse), torch.cos(coarse)
        self._sin_b, self._cos_b = torch.sin(fine), torch.cos(fine)

    def sin(self, t: int) -> Tensor:
        i, j = divmod(t, self._count)
        return torch.addcmul(self._sin_a[i] * self._cos_b[j], self._cos_a[i], self._sin_b[j])

    def cos(self, t: int) -> Tensor:
        i, j = divmod(t, self._count)
        return torch.addcmul(self._cos_a[i] * self._cos_b[j], self._sin_a[i], self._sin_b[j], value=-1)


class _Synthesis(torch.autograd.Function):
    """x̂ (R, T, B, D) from C (R, T, B, K), A, F, Φ (K, D) and t/L (T,), one clock time after another.

    R turns of the clock share the T·K·D sines. With a gradient to come these are kept, and as many cosines;
    `for_gradient` says so, because a function of its own cannot see whether one is wanted.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, C: Tensor, A: Tensor, F: Tensor, phase: Tensor, time: Tensor, for_gradient: bool
    ) -> Tensor:
        waves = _Sinusoids(F, phase, time)
        out = torch.empty((*C.shape[:3], A.shape[1]), dtype=C.dtype, device=A.device)
        kept = len(time) if for_gradient else 0
        sin, cos = (torch.empty((kept, *A.shape), dtype=C.dtype, device=A.device) for _ in range(2))
        for t in range(len(time)):
            sine = waves.sin(t)
            if for_gradient:
                sin[t], cos[t] = sine, waves.cos(t)
            atoms = (A * sine).to(C.dtype)
            for turn in range(len(C)):
                torch.mm(C[turn, t], atoms, out=out[turn, t])
        ctx.save_for_backward(C, A, sin, cos, time)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        C, A, sin, cos, time = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_C = torch.empty_like(C)
        grad_A, grad_phase, grad_F = (torch.zeros_like(A) for _ in range(3))
        for t, now in enumerate(time.tolist()):
            atoms = (A * sin[t]).to(C.dtype)
            for turn in range(len(C)):
                torch.mm(grad[turn, t], atoms.T, out=grad_C[turn, t])
            grad_S = (C[:, t].flatten(0, 1).T @ grad[:, t].flatten(0, 1)).to(A.dtype)
            grad_A.addcmul_(grad_S, sin[t])
            slope = grad_S.mul_(cos[t])
            grad_phase += slope
            grad_F.add_(slope, alpha=now)
        return grad_C, grad_A, grad_F.mul_(A).mul_(2 * math.pi), grad_phase.mul_(A), None, None


class ClockAtoms(nn.Module):
    """The paper's layer: a convolutional mixing encoder over a dictionary of sinusoids of absolute time."""

    state_names = ("conv",)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, K, W = config.width, config.num_atoms, config.conv_width
        self.period = config.window
        self.encoder = nn.Linear(W * D, K)  # a convolution over the last W tokens, oldest first
        self.amplitude = nn.Parameter(torch.randn(K, D) / math.sqrt(K))
        self.frequency = nn.Parameter(torch.rand(K, D) * self.period / 2)
        self.phase = nn.Parameter(torch.rand(K, D) * 2 * math.pi)
        self.activation = activation(config.activation)
        self.dropout = LockedDropout(config.atom_dropout)

    def forward(
        self, x_TBD: Tensor, conv_BWD: Tensor, clock_B: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor]]:
        """Return x̂ (T, B, D), the mixing vectors (T, B, K) and the new state, for a whole window."""
        padded = torch.cat([conv_BWD.transpose(0, 1), x_TBD])  # (W − 1 + T, B, D)
        taps = [padded[i : i + len(x_TBD)] for i in range(len(padded) - len(x_TBD) + 1)]
        mixing_TBK = self.activation(self.encoder(torch.cat(taps, dim=-1)))
        out = self._read_clocks(self.dropout(mixing_TBK), clock_B)
        return out, mixing_TBK, (padded[len(x_TBD) :].transpose(0, 1),)

    @uncompiled  # a loop over time
    def _read_clocks(self, mixing_TBK: Tensor, clock_B: Tensor) -> Tensor:
        """Return x̂ (T, B, D); sequences whose clocks differ are synthesized one group after another."""
        starts, which = torch.unique(clock_B, return_inverse=True)
        if len(starts) == 1:
            return self._synthesize(mixing_TBK, int(starts))
        out = mixing_TBK.new_empty(*mixing_TBK.shape[:2], self.amplitude.shape[1])
        for i, start in enumerate(starts.tolist()):
            out[:, which == i] = self._synthesize(mixing_TBK[:, which == i], int(start))
        return out

    def _synthesize(self, mixing_TBK: Tensor, start: int) -> Tensor:
        """Return x̂ (T, B, D) at clock times from `start`, which wrap at the period."""
        head = min(len(mixing_TBK), -start % self.period)
        whole = (len(mixing_TBK) - head) // self.period * self.period
        tail = len(mixing_TBK) - head - whole
        parts = zip(
            mixing_TBK.split([head, whole, tail]), (start, 0, 0), (head, self.period, tail), strict=True
        )
        pieces = []
        for part, first, count in parts:
            if len(part):
                time = torch.arange(first, first + count, device=part.device) / self.period
                turns_RTBK = part.unflatten(0, (-1, count))
                dictionary = self.amplitude, self.frequency, self.phase
                piece = _Synthesis.apply(turns_RTBK, *dictionary, time, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
                pieces.append(piece.flatten(0, 1))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def step(self, x_BD: Tensor, conv_BWD: Tensor, clock_B: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor]]:
        """Return x̂ (B, D), the mixing vector (B, K) and the new state, for one token."""
        taps = torch.cat([conv_BWD, x_BD[:, None]], dim=1)
        mixing_BK = self.activation(self.encoder(taps.flatten(1)))
        angle = 2 * math.pi * self.frequency * (clock_B / self.period)[:, None, None] + self.phase
        atoms_BKD = self.amplitude * torch.sin(angle)
        return torch.einsum("bk,bkd->bd", mixing_BK, atoms_BKD), mixing_BK, (taps[:, 1:],)

    def naive(self, x_TD: Tensor) -> Tensor:
        """Return x̂ (T, D) of one sequence from its start, as the formula at the head of this file reads."""
        out = []
        num_taps = self.encoder.in_features // x_TD.shape[1]
        for t in range(len(x_TD)):
            seen = functional.pad(x_TD, (0, 0, num_taps - 1, 0))[t : t + num_taps]
            c = self.activation(self.encoder.weight.double() @ seen.flatten() + self.encoder.bias.double())
            angle = (
                2 * math.pi * self.frequency.double() * (t % self.period) / self.period + self.phase.double()
            )
            out.append((c[:, None] * self.amplitude.double() * torch.sin(angle)).sum(0))
        return torch.stack(out)
