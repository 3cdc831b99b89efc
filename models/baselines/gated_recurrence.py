"""A gated linear recurrence: the ringing layer without its spectrum.

    u_t = silu(conv(x_t));  v_t, f_t, g_t = W u_t + b
    f_t = max(sigmoid(f_t + λ), e^−5)
    h_t = f_t · h_{t−1} + (1 − f_t) · v_t                K real numbers that fade and do not ring
    y_t = W_o (silu(g_t) · h_t)

What an SDGM of ringing atoms gains over this one is what its frequencies are worth.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..layers import CausalConv
from ..scan import LOG_DECAY_FLOOR, scan_chunks, scan_steps
from .mixer import Layout, Mixer, State

if TYPE_CHECKING:
    from ..config import ModelConfig


class GatedRecurrence(Mixer):
    """K leaky integrators, whose leak each token sets."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        D, K = config.width, config.num_atoms
        self.conv = CausalConv(D, config.conv_width)
        self.strike = nn.Linear(D, 3 * K)
        self.damping = nn.Parameter(torch.linspace(1.0, 6.0, K))
        self.output = nn.Linear(K, D, bias=False)

    @staticmethod
    def layout(config: ModelConfig) -> Layout:
        """Tail of the convolution, and the integrators."""
        return (("conv", (config.conv_width - 1, config.width)), ("levels", (config.num_atoms,)))

    def forward(self, x_TBD: Tensor, state: State, position: int) -> tuple[Tensor, State]:
        """Run the recurrence over the window."""
        u_TBD, conv = self.conv(x_TBD, state[0])
        v, f, g = (part.float()[:, :, None] for part in self.strike(functional.silu(u_TBD)).chunk(3, dim=-1))
        f, h = f + self.damping, state[1][:, None]  # (T, B, 1, K), (B, 1, K)
        if v.is_cuda:
            log_f = functional.logsigmoid(f).clamp_min(LOG_DECAY_FLOOR)
            h = scan_chunks(log_f, -torch.expm1(log_f) * v, h)
        else:
            f = torch.sigmoid(f).clamp_min(math.exp(LOG_DECAY_FLOOR))
            h = scan_steps(f, (1 - f) * v, h)
        return self.output((functional.silu(g) * h).squeeze(2)), (conv, h[-1, :, 0])

    def naive(self, x_TD: Tensor) -> Tensor:
        """As the formula reads."""
        taps, h, out = len(self.conv.weight), torch.zeros_like(self.damping), []
        padded = functional.pad(x_TD, (0, 0, taps - 1, 0))
        for t in range(len(x_TD)):
            u = functional.silu((padded[t : t + taps] * self.conv.weight).sum(0) + self.conv.bias)
            v, f, g = self.strike(u).chunk(3)
            f = torch.sigmoid(f + self.damping).clamp_min(math.exp(LOG_DECAY_FLOOR))
            h = f * h + (1 - f) * v
            out.append(self.output(functional.silu(g) * h))
        return torch.stack(out)
