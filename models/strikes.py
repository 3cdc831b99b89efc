"""What every token says to the atoms of a ringing layer: how hard it strikes, for how long, who listens.

    v_t, f_t, g_t = W x_t + b                           strike, ring, listen (K each)
    v_t = act(conv(v_t))                                causal, depthwise
    f_t = max(sigmoid(f_t + λ), e^−5)                   damping, gated by the token
    g_t = sigmoid(g_t)

The convolution mixes strikes and not tokens: an encoder that mixes before it has told features apart blurs
the token at hand, and learns slowly.

Shapes: T time, B batch, D width, K atoms, W width of the convolution.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .layers import CausalConv, activation
from .scan import LOG_DECAY_FLOOR

if TYPE_CHECKING:
    from .config import ModelConfig

LAMBDA_SPREAD = 5.0
"""From the λ of the atom that fades first to that of the last."""


class Striking(nn.Module):
    """A layer whose tokens strike. It has a `damping` λ besides what `_add_strikes` gives it."""

    damping: nn.Parameter

    def _add_strikes(self, config: ModelConfig) -> None:
        self.conv = CausalConv(config.num_atoms, config.conv_width)
        self.strike = nn.Linear(config.width, 3 * config.num_atoms)
        self.activation = activation(config.activation)

    def _strikes(self, x_TBD: Tensor, tail_BWK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return v, f and g in float32, (T, B, K) each, and the tail to carry on with."""
        v, f, g = self.strike(x_TBD).chunk(3, dim=-1)
        v, tail_BWK = self.conv(v, tail_BWK)
        f = torch.sigmoid(f.float() + self.damping).clamp_min(math.exp(LOG_DECAY_FLOOR))
        return self.activation(v).float(), f, torch.sigmoid(g.float()), tail_BWK

    def _naive_strikes(self, x_TD: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield v, f and g, (K,) each, of every token, as the formula at the head of this file reads."""
        weight, bias = self.strike.weight.double(), self.strike.bias.double()
        struck_TK, f_TK, g_TK = (x_TD @ weight.T + bias).chunk(3, dim=-1)
        for t in range(len(x_TD)):
            v = self.conv.bias.double()
            for tap, weight_K in enumerate(self.conv.weight.double()):
                if (source := t - len(self.conv.weight) + 1 + tap) >= 0:
                    v = v + weight_K * struck_TK[source]
            f = torch.sigmoid(f_TK[t] + self.damping.double()).clamp_min(math.exp(LOG_DECAY_FLOOR))
            yield self.activation(v), f, torch.sigmoid(g_TK[t])


def new_damping(config: ModelConfig) -> Tensor:
    """Return λ of every atom as training begins, (K,), from short to long."""
    return torch.linspace(config.quickest, config.quickest + LAMBDA_SPREAD, config.num_atoms)
