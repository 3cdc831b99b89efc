"""GPT-2: attention over a window, with the layer norm, the GELU and the biases of the original.

    y_t = W_o Σ_{τ≤t} softmax_τ(q_t · k_τ / √E) v_τ          for each head, E numbers wide

Positions are learned, so a window has an end; the next one begins afresh, as GPT-2 is trained. On average a
token sees L / 2 before it. The state is the keys and values of the window so far.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .attention import attend, num_heads, read_naively
from .mixer import Layout, Mixer, State, grow

if TYPE_CHECKING:
    from ..config import ModelConfig


class Perceptron(nn.Module):
    """The two-layer unit of a transformer: W_2 gelu(W_1 x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        self.activation = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        out: Tensor = self.contract(self.activation(self.expand(x)))
        return out


class GPT2(Mixer):
    """Causal attention over the window so far."""

    windowed = True
    norm = nn.LayerNorm
    unit = Perceptron

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.heads = num_heads(config.width)
        self.input = nn.Linear(config.width, 3 * config.width)  # queries, keys, values
        self.output = nn.Linear(config.width, config.width)

    @staticmethod
    def layout(config: ModelConfig) -> Layout:
        """Keys and values of the window so far."""
        return (("keys", (config.window, config.width)), ("values", (config.window, config.width)))

    def forward(self, x_TBD: Tensor, state: State, position: int) -> tuple[Tensor, State]:
        """Attend from each token to all of its window up to itself."""
        q, k, v = self.input(x_TBD).transpose(0, 1).chunk(3, dim=-1)
        keys, new_keys = grow(state[0].to(k.dtype), k, position)
        values, new_values = grow(state[1].to(v.dtype), v, position)
        mask = None
        if position:  # at a window's start, the usual triangle will do
            size = (q.shape[1], keys.shape[1])
            mask = torch.ones(size, dtype=torch.bool, device=q.device).tril(position)
        read_TBD = attend(q, keys, values, self.heads, mask, causal=mask is None)
        return self.output(read_TBD), (new_keys, new_values)

    def naive(self, x_TD: Tensor) -> Tensor:
        """As the formula reads, within one window."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.input(x_TD).chunk(3, dim=-1))
        return torch.stack(
            [self.output(read_naively(q[t], k[: t + 1], v[: t + 1])) for t in range(len(x_TD))]
        )
