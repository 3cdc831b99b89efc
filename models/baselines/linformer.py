"""Linformer, made causal: keys and values of a window are projected along time to a few slots.

Linformer's projection E of a window (slots × L) lets every slot see the whole of it. Here E is
block-diagonal: a window is cut into 8 blocks of c tokens, and each is projected to c / 4 slots of its own
when it is complete. A token sees the slots of the blocks before its own, and its own block up to itself.
So nothing of the future passes, and a token sees at most L / 4 + c places in place of L.

    slot_{b,s} = Σ_{τ in block b} E[b, s, τ] k_τ             likewise for values, with F

Positions are learned, as in GPT-2: the next window begins afresh. The state is slots and block so far.

Shapes: T time, B batch, D width, L window, c block, s slots of a block; 2 is keys and values.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from .attention import attend, num_heads, read_naively
from .mixer import Layout, Mixer, State

if TYPE_CHECKING:
    from ..config import ModelConfig


def block_sizes(window: int) -> tuple[int, int, int]:
    """Return complete blocks in a window, tokens in a block, slots of a block."""
    block = max(1, window // 8)
    return window // block, block, max(1, block // 4)


class Linformer(Mixer):
    """Attention over projected blocks and the block under way."""

    windowed = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        D = config.width
        self.heads = num_heads(D)
        self.num_blocks, self.block, self.slots = block_sizes(config.window)
        self.input = nn.Linear(D, 3 * D, bias=False)
        self.output = nn.Linear(D, D, bias=False)
        shape = (2, self.num_blocks, self.slots, self.block)
        self.projection = nn.Parameter(torch.randn(shape) / math.sqrt(self.block))  # E and F

    @staticmethod
    def layout(config: ModelConfig) -> Layout:
        """Slots of the complete blocks, and the block under way; keys, then values."""
        num_blocks, block, slots = block_sizes(config.window)
        return (("slots", (2, num_blocks * slots, config.width)), ("block", (2, block, config.width)))

    def forward(self, x_TBD: Tensor, state: State, position: int) -> tuple[Tensor, State]:
        """Attend from each token to the slots before its block, and to its block up to itself."""
        q, k, v = self.input(x_TBD).transpose(0, 1).chunk(3, dim=-1)
        done, used = divmod(position, self.block)
        raw = torch.cat([state[1][:, :, :used].to(k.dtype), torch.stack([k, v], dim=1)], dim=2)
        complete = raw.shape[2] // self.block
        whole = raw[:, :, : complete * self.block].unflatten(2, (complete, self.block))
        projection = self.projection[:, done : done + complete]
        new = torch.einsum("znsc,bzncd->bznsd", projection, whole).flatten(2, 3)
        slots = torch.cat([state[0][:, :, : done * self.slots].to(new.dtype), new], dim=2)
        time = torch.arange(position, position + q.shape[1], device=q.device)[:, None]
        slot_block = torch.arange(slots.shape[2], device=q.device) // self.slots
        raw_time = torch.arange(position - used, position + q.shape[1], device=q.device)
        own = (raw_time // self.block == time // self.block) & (raw_time <= time)
        mask = torch.cat([slot_block < time // self.block, own], dim=1)
        keys, values = torch.cat([slots.to(raw.dtype), raw], dim=2).unbind(1)
        read_TBD = attend(q, keys, values, self.heads, mask)
        rest = raw[:, :, complete * self.block :]
        return self.output(read_TBD), (
            functional.pad(slots, (0, 0, 0, state[0].shape[2] - slots.shape[2])),
            functional.pad(rest, (0, 0, 0, self.block - rest.shape[2])),
        )

    def naive(self, x_TD: Tensor) -> Tensor:
        """As the text reads, within one window."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.input(x_TD).chunk(3, dim=-1))
        out = []
        for t in range(len(x_TD)):
            block = t // self.block
            start = block * self.block
            places = []
            for x, projection in zip((k, v), self.projection, strict=True):
                slots = [
                    torch.einsum("sc,chd->shd", projection[b], x[b * self.block : (b + 1) * self.block])
                    for b in range(block)
                ]
                places.append(torch.cat([*slots, x[start : t + 1]]))
            out.append(self.output(read_naively(q[t].contiguous(), *places)))
        return torch.stack(out)
