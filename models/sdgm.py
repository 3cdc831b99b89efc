"""The Spectral Dictionary Generative Model: spectral layers between embedding and head.

Shapes: T time, B batch, D width, V vocabulary, M mixing vector, S state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from .clock import ClockAtoms
from .config import ModelConfig
from .language_model import Features, LanguageModel
from .layers import GatedUnit, LockedDropout
from .ringing import RingingAtoms


class Block(nn.Module):
    """A spectral layer and its gated unit on a residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.residual = config.residual
        if config.residual:
            self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.atoms = RingingAtoms(config) if config.layer == "ringing" else ClockAtoms(config)
        self.unit: GatedUnit | None = None
        if config.glu_width:
            self.unit_norm = nn.RMSNorm(config.width, eps=1e-6)
            self.unit = GatedUnit(config.width, config.glu_width)
            self.dropout = LockedDropout(config.dropout)

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...], single: bool
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """Return the stream, x̂, the mixing vectors and the new state; `single` for one step without time."""
        source = self.norm(x) if self.residual else x
        rebuilt, mixing, state = (self.atoms.step if single else self.atoms)(source, *state)
        x = x + rebuilt if self.residual else rebuilt
        if self.unit is not None:
            x = x + self.dropout(self.unit(self.unit_norm(x)))
        return x, rebuilt, mixing, state


class SDGM(LanguageModel):
    """A language model in constant memory, whose layers have no attention.

    >>> import torch
    >>> from sdgm_edge.models import SDGM, preset
    >>> model = SDGM(preset("edge-nano", vocab_size=300))
    >>> model(torch.tensor([[1, 2, 3]])).logits_BTV.shape
    torch.Size([1, 3, 300])
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.blocks: Sequence[Block] = nn.ModuleList(Block(config) for _ in range(config.num_layers))  # type: ignore[assignment]
        self._add_head(nn.RMSNorm(config.width, eps=1e-6) if config.residual else nn.Identity())
        self._initialise()

    def _initialise(self) -> None:
        for block in self.blocks:
            unit = block.unit
            outputs = [unit.contract.weight] if isinstance(unit, GatedUnit) else []
            if isinstance(block.atoms, RingingAtoms):
                outputs.append(block.atoms.synthesis.weight)
            for (
                weight
            ) in outputs:  # what each layer adds shrinks with depth, so that the stream keeps its size
                nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[1] * 2 * len(self.blocks)))

    def features(self, ids_TB: Tensor, state_BS: Tensor) -> Features:
        """Run every layer and the pointer over a window, without the logits."""
        pieces = self.unpack(state_BS)
        embedded = self._embed(ids_TB)
        x, rebuilt, mixing = self._layers(self.dropout(embedded), pieces, steps=len(ids_TB), single=False)
        hidden, pointed = self._head(x, ids_TB, pieces)
        return Features(hidden, pointed, mixing, embedded, rebuilt, self.pack(pieces))

    def step(self, ids_B: Tensor, state_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (B, V), mixing vectors (B, M) and the new state for one token of each sequence."""
        pieces = self.unpack(state_BS)
        x, _, mixing = self._layers(self._embed(ids_B), pieces, steps=1, single=True)
        hidden, pointed = self._head(x[None], ids_B[None], pieces)
        return self._logits(hidden, pointed)[0], mixing, self.pack(pieces)

    def _layers(
        self, x: Tensor, pieces: dict[str, Tensor], steps: int, single: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        clock = self.config.layer == "clock"
        rebuilt = mixing = x
        for i, block in enumerate(self.blocks):
            names = [f"layers.{i}.{name}" for name in block.atoms.state_names]
            extra = (pieces["clock"].squeeze(1),) if clock else ()
            state = tuple(pieces[name] for name in names) + extra
            x, rebuilt, mixing, new = block(x, state, single)
            pieces.update(zip(names, new, strict=True))
        if clock:
            pieces["clock"] = (pieces["clock"] + steps) % self.config.window
        return x, rebuilt, mixing
