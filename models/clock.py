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

from .config import ModelConfig
from .layers import activation


class _Sinusoids(torch.autograd.Function):
    """S (T, K, D) from A, F, Φ (K, D) and t/L (T,).

    A window needs L·K·D sines and as many cosines for the gradient. The angle of an evenly spaced time is
    a coarse one plus a fine one, sin(a + b) = sin a cos b + cos a sin b, so about 2√L of each are
    evaluated, and both products are kept: nothing of size L·K·D is computed twice.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, A: Tensor, F: Tensor, phase: Tensor, time: Tensor) -> Tensor:
        fine_size = max(1, math.isqrt(len(time)))
        coarse = 2 * math.pi * F * time[::fine_size, None, None] + phase
        fine = 2 * math.pi * F * (time[:fine_size] - time[0])[:, None, None]
        sin_a, cos_a = torch.sin(coarse)[:, None], torch.cos(coarse)[:, None]
        sin_b, cos_b = torch.sin(fine), torch.cos(fine)
        sin = torch.addcmul(sin_a * cos_b, cos_a, sin_b).flatten(0, 1)[: len(time)]
        cos = torch.addcmul(cos_a * cos_b, sin_a, sin_b, value=-1).flatten(0, 1)[: len(time)]
        ctx.save_for_backward(A, sin, cos, time)
        return A * sin

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        A, sin, cos, time = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_A = torch.linalg.vecdot(grad, sin, dim=0)
        slope = grad * cos
        grad_phase = A * slope.sum(0)
        grad_F = 2 * math.pi * A * (time @ slope.flatten(1)).unflatten(0, A.shape)
        return grad_A, grad_F, grad_phase, None


class ClockAtoms(nn.Module):
    """The paper's layer: a convolutional mixing encoder over a dictionary of sinusoids of absolute time."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, K = config.width, config.num_atoms
        self.period = config.window
        self.encoder = nn.Linear(
            config.conv_width * D, K
        )  # a convolution over the last W tokens, oldest first
        self.amplitude = nn.Parameter(torch.randn(K, D) / math.sqrt(K))
        self.frequency = nn.Parameter(torch.rand(K, D) * self.period / 2)
        self.phase = nn.Parameter(torch.rand(K, D) * 2 * math.pi)
        self.activation = activation(config.activation)

    state_names = ("conv",)

    def atoms(self, time_T: Tensor) -> Tensor:
        """Return the dictionary S (T, K, D) at clock times that follow each other evenly."""
        atoms: Tensor = _Sinusoids.apply(  # type: ignore[no-untyped-call]
            self.amplitude, self.frequency, self.phase, time_T / self.period
        )
        return atoms

    def forward(
        self, x_TBD: Tensor, conv_BWD: Tensor, clock_B: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor]]:
        """Return x̂ (T, B, D), the mixing vectors (T, B, K) and the new state, for a whole window."""
        padded = torch.cat([conv_BWD.transpose(0, 1), x_TBD])
        taps = padded.unfold(0, padded.shape[0] - len(x_TBD) + 1, 1).movedim(-1, 2).flatten(2)  # (T, B, W·D)
        mixing_TBK = self.activation(self.encoder(taps))
        starts, which = torch.unique(clock_B, return_inverse=True)
        if len(starts) == 1:
            out = torch.bmm(mixing_TBK, self._window(starts[0], len(x_TBD)).to(mixing_TBK.dtype))
        else:  # sequences whose clocks differ, one group after another
            out = torch.empty_like(x_TBD)
            for i, start in enumerate(starts):
                group = which == i
                atoms_TKD = self._window(start, len(x_TBD)).to(mixing_TBK.dtype)
                out[:, group] = torch.bmm(mixing_TBK[:, group], atoms_TKD).to(out.dtype)
        return out, mixing_TBK, (padded[len(x_TBD) :].transpose(0, 1),)

    def _window(self, start: Tensor, length: int) -> Tensor:
        """Return S at `length` clock times from `start`, which wrap at the period."""
        pieces = []
        now = int(start)
        while length > 0:
            count = min(length, self.period - now)
            pieces.append(
                self.atoms(torch.arange(now, now + count, device=start.device, dtype=torch.float32))
            )
            length, now = length - count, 0
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
