"""Parts that the models share.

Shapes: T time, B batch, D channels; W − 1 is the tail of tokens that a convolution of width W remembers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class CausalConv(nn.Module):
    """A depthwise convolution that sees the current token and the `width − 1` before it.

    It begins as the identity and learns what of the tokens before is worth mixing in: a random mixture lets a
    model learn its training text by heart, four tokens at a time (benchmarks/results/quality.md).
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        weight = torch.zeros(width, channels)
        weight[-1] = 1
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_TBD: Tensor, tail_BWD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the convolved sequence and the tail to carry on with."""
        padded = torch.cat([tail_BWD.transpose(0, 1), x_TBD])  # (W − 1 + T, B, D)
        num_steps = len(x_TBD)
        out = torch.addcmul(self.bias, padded[:num_steps], self.weight[0])
        for tap in range(1, len(self.weight)):
            out = torch.addcmul(out, padded[tap : tap + num_steps], self.weight[tap])
        return out, padded[num_steps:].transpose(0, 1)


class GatedUnit(nn.Module):
    """The gated linear unit that follows a spectral layer: W_out (silu(gate) · value)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 2 * hidden, bias=False)
        self.contract = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        gate, value = self.expand(x).chunk(2, dim=-1)
        out: Tensor = self.contract(functional.silu(gate) * value)
        return out


class LockedDropout(nn.Module):
    """Dropout whose mask stays the same along time: what is forgotten stays forgotten for a whole window."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Drop features (the last dimension) of each sequence (the second), and scale the others up.

        Outside training it does nothing.
        """
        if not self.training or not self.rate:
            return x
        shape = [1, x.shape[1], *[1] * (x.dim() - 3), x.shape[-1]]
        kept = x.new_empty(shape).bernoulli_(1 - self.rate)
        return x * kept.div_(1 - self.rate)


def activation(name: str) -> nn.Module:
    """Return the activation of that name, over the last dimension."""
    return {
        "softmax": nn.Softmax(dim=-1),
        "tanh": nn.Tanh(),
        "gelu": nn.GELU(approximate="tanh"),
        "silu": nn.SiLU(),
        "identity": nn.Identity(),
    }[name]
