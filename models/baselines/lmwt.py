"""Learnable multi-scale Haar wavelets, made causal: each scale compares the past with what lay before it.

The Haar transform halves the sequence at every level, and the first of a pair then sees the second. Here no
level is thinned out (the stationary, or à trous, transform), and a pair ends with the token itself:

    a⁰ = x;   aʲ_t = p_j aʲ⁻¹_t + q_j aʲ⁻¹_{t−s},   dʲ_t = r_j aʲ⁻¹_t − w_j aʲ⁻¹_{t−s},   s = 2^(j−1)
    y_t = W_o (Σ_j g_j dʲ_t + g_0 a^J_t)

All of p, q, r, w (½ at first) and g are learned, for each feature and level; J levels reach 2^J ≤ L tokens.

Shapes: T time, B batch, D width, J levels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from .mixer import Layout, Mixer, State, slide

if TYPE_CHECKING:
    from ..config import ModelConfig


def _levels(window: int) -> int:
    return max(1, window.bit_length() - 1)


class HaarWavelets(Mixer):
    """A causal Haar pyramid with learned coefficients."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        J, D = _levels(config.window), config.width
        self.low = nn.Parameter(torch.full((J, 2, D), 0.5))  # p, q
        self.high = nn.Parameter(torch.full((J, 2, D), 0.5))  # r, w
        self.gain = nn.Parameter(torch.ones(J + 1, D))  # the coarsest average first
        self.output = nn.Linear(D, D, bias=False)

    @staticmethod
    def layout(config: ModelConfig) -> Layout:
        """The last 1, 2, 4 … averages of each level."""
        return (("tails", (2 ** _levels(config.window) - 1, config.width)),)

    def forward(self, x_TBD: Tensor, state: State, position: int) -> tuple[Tensor, State]:
        """Climb the levels, each with a tail of its own."""
        tails = state[0].split([2**j for j in range(len(self.low))], dim=1)
        average, total, new = x_TBD, torch.zeros_like(x_TBD), []
        for tail, low, high, gain in zip(tails, self.low, self.high, self.gain[1:], strict=True):
            padded, tail = slide(average, tail)
            before = padded[: len(x_TBD)]
            total = total + gain * (high[0] * average - high[1] * before)
            average = low[0] * average + low[1] * before
            new.append(tail)
        return self.output(total + self.gain[0] * average), (torch.cat(new, dim=1),)

    def naive(self, x_TD: Tensor) -> Tensor:
        """As the formulas read."""
        average, total = x_TD, torch.zeros_like(x_TD)
        for j in range(len(self.low)):
            before = functional.pad(average, (0, 0, 2**j, 0))[: len(x_TD)]
            total = total + self.gain[j + 1] * (self.high[j, 0] * average - self.high[j, 1] * before)
            average = self.low[j, 0] * average + self.low[j, 1] * before
        out: Tensor = self.output(total + self.gain[0] * average)
        return out
