"""The polynomial mixer (PoM), made causal: tokens meet in the mean of polynomials of them.

    p_t = [h_1; h_1·h_2],   h = gelu(W x_t)               a polynomial of degree 2, K numbers for each degree
    m_t = mean of p over the last L tokens
    y_t = W_o (sigmoid(W_s x_t) · m_t)

PoM takes the mean over the whole sequence; here it slides, so that it follows the text.

Shapes: T time, B batch, D width, K numbers of a degree, L window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from .mixer import Layout, Mixer, State, slide

if TYPE_CHECKING:
    from ..config import ModelConfig

DEGREE = 2


class PolynomialMixer(Mixer):
    """A gated mean of polynomial features."""

    reads = frozenset({"num_atoms"})

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        D, K = config.width, config.num_atoms
        self.window = config.window
        self.rise = nn.Linear(D, DEGREE * K)
        self.select = nn.Linear(D, DEGREE * K)
        self.output = nn.Linear(DEGREE * K, D, bias=False)

    @staticmethod
    def layout(config: ModelConfig) -> Layout:
        """The polynomials before, and a one beside each that tells it from an empty place."""
        return (("tail", (config.window - 1, DEGREE * config.num_atoms + 1)),)

    def polynomials(self, x: Tensor) -> Tensor:
        """Return all degrees, (..., 2K): products of the first so many factors."""
        factors = functional.gelu(self.rise(x).float()).unflatten(-1, (DEGREE, -1))
        products: Tensor = factors.cumprod(-2).flatten(-2)
        return products

    def forward(self, x_TBD: Tensor, state: State, position: int) -> tuple[Tensor, State]:
        """Slide the mean by differences of a running sum."""
        ones = functional.pad(self.polynomials(x_TBD), (0, 1), value=1.0)
        padded, tail = slide(ones, state[0])
        running = functional.pad(padded.cumsum(0), (0, 0, 0, 0, 1, 0))
        total = running[self.window :] - running[: len(x_TBD)]
        mean = total[..., :-1] / total[..., -1:].round()
        return self.output(torch.sigmoid(self.select(x_TBD)) * mean), (tail,)

    def naive(self, x_TD: Tensor) -> Tensor:
        """As the formulas read."""
        h_1, h_2 = functional.gelu(self.rise(x_TD)).chunk(2, dim=-1)
        p = torch.cat([h_1, h_1 * h_2], dim=-1)
        out = []
        for t in range(len(x_TD)):
            mean = p[max(0, t + 1 - self.window) : t + 1].mean(0)
            out.append(self.output(torch.sigmoid(self.select(x_TD[t])) * mean))
        return torch.stack(out)
