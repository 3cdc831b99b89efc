"""An LSTM for each block, PyTorch's own.

i, f, g, o = W x_t + U h_{t−1} + b
c_t = sigmoid(f) · c_{t−1} + sigmoid(i) · tanh(g);   h_t = sigmoid(o) · tanh(c_t)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .mixer import Layout, Mixer, State

if TYPE_CHECKING:
    from ..config import ModelConfig


class LSTM(Mixer):
    """One layer of an LSTM, as wide as the stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.lstm = nn.LSTM(config.width, config.width)

    @staticmethod
    def layout(config: ModelConfig) -> Layout:
        """What it says, and what it holds."""
        return (("hidden", (config.width,)), ("cell", (config.width,)))

    def forward(self, x_TBD: Tensor, state: State, position: int) -> tuple[Tensor, State]:
        """Run the LSTM over the window, in float32."""
        hidden, cell = (piece[None].contiguous() for piece in state)
        with torch.autocast(x_TBD.device.type, enabled=False):
            out, (hidden, cell) = self.lstm(x_TBD.float(), (hidden, cell))
        return out, (hidden[0], cell[0])

    def naive(self, x_TD: Tensor) -> Tensor:
        """As the formula reads."""
        of_input, of_hidden, *biases = self.lstm.parameters()
        h = c = torch.zeros(x_TD.shape[1], dtype=torch.float64)
        out = []
        for x in x_TD:
            i, f, g, o = (of_input @ x + of_hidden @ h + sum(biases)).chunk(4)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            out.append(h)
        return torch.stack(out)
