"""A gated linear recurrence: the ringing layer without its spectrum.

    v_t, f_t, g_t                                        as tokens strike ringing atoms (`strikes.py`)
    h_t = f_t · h_{t−1} + (1 − f_t) · v_t                K real numbers that fade and do not ring
    y_t = W_o (g_t · h_t)

What an SDGM of ringing atoms gains over this one is what its frequencies are worth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..layers import LockedDropout
from ..scan import scan_chunks, scan_steps
from ..strikes import Striking, new_damping
from .mixer import Layout, Mixer, State

if TYPE_CHECKING:
    from ..config import ModelConfig


class GatedRecurrence(Mixer, Striking):
    """K leaky integrators, whose leak each token sets."""

    reads = frozenset({"num_atoms", "conv_width", "activation", "quickest", "atom_dropout"})
    drops_atoms = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self._add_strikes(config)
        self.damping = nn.Parameter(new_damping(config))
        self.dropout = LockedDropout(config.atom_dropout)
        self.output = nn.Linear(config.num_atoms, config.width, bias=False)

    @staticmethod
    def layout(config: ModelConfig) -> Layout:
        """Tail of the convolution, and the integrators."""
        return (("conv", (config.conv_width - 1, config.num_atoms)), ("levels", (config.num_atoms,)))

    def forward(self, x_TBD: Tensor, state: State, position: int) -> tuple[Tensor, State]:
        """Run the recurrence over the window."""
        v, f, g, conv = self._strikes(x_TBD, state[0])
        scan = scan_chunks if v.is_cuda else scan_steps
        v, f = (part[:, :, None] for part in (v, f))  # (T, B, 1, K)
        h = scan(f.log() if v.is_cuda else f, (1 - f) * v, state[1][:, None]).squeeze(2)
        return self.output(self.dropout(g * h)), (conv, h[-1])

    def naive(self, x_TD: Tensor) -> Tensor:
        """As the formula reads."""
        h, out = torch.zeros_like(self.damping), []
        for v, f, g in self._naive_strikes(x_TD):
            h = f * h + (1 - f) * v
            out.append(self.output(g * h))
        return torch.stack(out)
