"""Transformer-XL: attention that goes on into a memory of earlier segments, with relative positions.

    s_{t,τ} = (q_t + u) · k_τ + (q_t + w) · r_{t−τ}          content and distance, each with a bias of its own
    y_t = W_o Σ_{t−L<τ≤t} softmax_τ(s_{t,τ} / √E) v_τ

The memory holds the layer's inputs; no gradient goes into it. Every token sees the last L tokens, wherever
the segments are cut (the original's `same_length`), so that the state is a function of the text alone.

Shapes: T time, B batch, D width, H heads, E = D / H, L window, J = L − 1 + T places.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from .attention import attend, num_heads, read_naively, split_heads
from .mixer import Layout, Mixer, State, slide

if TYPE_CHECKING:
    from ..config import ModelConfig


class TransformerXL(Mixer):
    """Relative attention over the last L tokens."""

    waves: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        D = config.width
        self.heads = num_heads(D)
        self.query = nn.Linear(D, D, bias=False)
        self.key_value = nn.Linear(D, 2 * D, bias=False)
        self.distance = nn.Linear(D, D, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(D))  # u
        self.distance_bias = nn.Parameter(torch.zeros(D))  # w
        self.output = nn.Linear(D, D, bias=False)
        rate = torch.exp(torch.arange(0, D, 2) * (-math.log(10_000) / D))
        angle = torch.arange(config.window)[:, None] * rate
        waves = torch.cat([angle.sin(), angle.cos()], dim=1)[:, :D]  # (L, D), by distance
        self.register_buffer("waves", waves, persistent=False)

    @staticmethod
    def layout(config: ModelConfig) -> Layout:
        """The last inputs, and how many there are."""
        return (("memory", (config.window - 1, config.width)), ("count", (1,)))

    def forward(self, x_TBD: Tensor, state: State, position: int) -> tuple[Tensor, State]:
        """Attend from each token to the last L, itself included."""
        memory, count = state
        seen_JBD, new_memory = slide(x_TBD, memory)
        keys, values = self.key_value(seen_JBD).transpose(0, 1).chunk(2, dim=-1)
        q_BTD = self.query(x_TBD).transpose(0, 1)
        # (q + w) · r by distance, then each row moved to where its places are: −inf stays outside the band.
        r_LD = self.distance(self.waves).flip(0)
        by_distance = split_heads(q_BTD + self.distance_bias, self.heads) @ split_heads(
            r_LD[None], self.heads
        ).transpose(-1, -2)
        num_steps, num_places = len(x_TBD), len(seen_JBD)
        band = functional.pad(by_distance, (0, num_steps), value=-math.inf).flatten(-2)
        scores_BHTJ = band[..., : num_steps * num_places].unflatten(-1, (num_steps, num_places))
        place = torch.arange(num_places, device=count.device)
        empty_BJ = place < memory.shape[1] - count  # before the text began
        scores_BHTJ = (scores_BHTJ / math.sqrt(r_LD.shape[1] // self.heads)).masked_fill(
            empty_BJ[:, None, None], -math.inf
        )
        query = q_BTD + self.content_bias.to(q_BTD.dtype)
        read_TBD = attend(query, keys, values, self.heads, scores_BHTJ.to(query.dtype))
        new_count = (count + num_steps).clamp_max(memory.shape[1])
        return self.output(read_TBD), (new_memory, new_count)

    def naive(self, x_TD: Tensor) -> Tensor:
        """As the formula reads."""

        def split(x: Tensor) -> Tensor:
            parts: Tensor = x.unflatten(-1, (self.heads, -1))
            return parts

        k, v = (split(part) for part in self.key_value(x_TD).chunk(2, dim=-1))
        q, r = self.query(x_TD), split(self.distance(self.waves))
        out = []
        for t in range(len(x_TD)):
            first = max(0, t + 1 - len(self.waves))
            by_distance = r[: t + 1 - first].flip(0)  # the oldest place is the most distant
            bias_JH = (split(q[t] + self.distance_bias) * by_distance).sum(-1)
            read = read_naively(split(q[t] + self.content_bias), k[first : t + 1], v[first : t + 1], bias_JH)
            out.append(self.output(read))
        return torch.stack(out)
