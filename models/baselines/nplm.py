"""NPLM's local concatenation: the last few tokens side by side, through one matrix.

y_t = W [x_{t−W+1}; …; x_t] + b                       W = conv_width
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from .mixer import Layout, Mixer, State, slide

if TYPE_CHECKING:
    from ..config import ModelConfig


class LocalConcatenation(Mixer):
    """A linear map of the last tokens, order known."""

    reads = frozenset({"conv_width"})

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.taps = config.conv_width
        self.output = nn.Linear(self.taps * config.width, config.width)

    @staticmethod
    def layout(config: ModelConfig) -> Layout:
        """The tokens before."""
        return (("tail", (config.conv_width - 1, config.width)),)

    def forward(self, x_TBD: Tensor, state: State, position: int) -> tuple[Tensor, State]:
        """Concatenate, oldest first."""
        padded, tail = slide(x_TBD, state[0])
        near = [padded[i : i + len(x_TBD)] for i in range(self.taps)]
        return self.output(torch.cat(near, dim=-1)), (tail,)

    def naive(self, x_TD: Tensor) -> Tensor:
        """As the formula reads."""
        padded = functional.pad(x_TD, (0, 0, self.taps - 1, 0))
        return torch.stack([self.output(padded[t : t + self.taps].flatten()) for t in range(len(x_TD))])
