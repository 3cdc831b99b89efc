"""The language model around a mixer: pre-norm residual blocks between embedding and head.

    x ← x + mixer(norm(x));   x ← x + unit(norm(x))

Everything but the mixer is what an SDGM of ringing atoms has, the pointer too, so that a comparison is one
of mixers; GPT-2 brings its own norm and unit. Where a window ends, layers begin afresh; the pointer goes on.

Shapes: T time, B batch, D width, S state, L window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .baselines import MIXERS, Mixer
from .baselines.mixer import State
from .config import ModelConfig
from .language_model import Features, LanguageModel
from .layers import LockedDropout


class MixerBlock(nn.Module):
    """A mixer and its unit on a residual stream."""

    def __init__(self, config: ModelConfig, kind: type[Mixer]) -> None:
        super().__init__()
        self.norm = kind.norm(config.width, eps=1e-6)
        self.mixer = kind(config)
        self.unit: nn.Module | None = None
        if config.glu_width:
            self.unit_norm = kind.norm(config.width, eps=1e-6)
            self.unit = kind.unit(config.width, config.glu_width)
        self.dropout = LockedDropout(config.dropout)

    def forward(self, x_TBD: Tensor, state: State, position: int) -> tuple[Tensor, State]:
        """Return the stream and the mixer's new state."""
        mixed, state = self.mixer(self.norm(x_TBD), state, position)
        x_TBD = x_TBD + (mixed if self.mixer.drops_atoms else self.dropout(mixed))
        if self.unit is not None:
            x_TBD = x_TBD + self.dropout(self.unit(self.unit_norm(x_TBD)))
        return x_TBD, state


class MixerModel(LanguageModel):
    """A language model of any mixer in the registry."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        kind = MIXERS[config.layer]
        self.state_names = [name for name, _ in kind.layout(config)]
        self.positions = nn.Embedding(config.window, config.width) if kind.windowed else None
        self.blocks: Sequence[MixerBlock] = nn.ModuleList(
            MixerBlock(config, kind) for _ in range(config.num_layers)
        )  # type: ignore[assignment]
        self._add_head(kind.norm(config.width, eps=1e-6))
        self._initialise()

    def _initialise(self) -> None:
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=1 / math.sqrt(self.config.width))
        for name, weight in self.named_parameters():  # as in an SDGM, what a layer adds shrinks with depth
            if name.endswith((".output.weight", ".contract.weight")):
                nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[1] * 2 * len(self.blocks)))

    def features(self, ids_TB: Tensor, state_BS: Tensor) -> Features:
        """Run every block over a window, without the logits."""
        pieces = self.unpack(state_BS)
        embedded = self._embed(ids_TB)
        layers = self._layers if self.positions is None else self._windows
        hidden, pointed = self._head(layers(embedded, pieces), ids_TB, pieces)
        none = hidden.new_empty((*ids_TB.shape, 0))
        return Features(hidden, pointed, none, embedded, none, self.pack(pieces))

    def _layers(self, x_TBD: Tensor, pieces: dict[str, Tensor], position: int = 0) -> Tensor:
        x_TBD = self.dropout(x_TBD)
        for i, block in enumerate(self.blocks):
            names = [f"layers.{i}.{name}" for name in self.state_names]
            x_TBD, state = block(x_TBD, tuple(pieces[name] for name in names), position)
            pieces.update(zip(names, state, strict=True))
        return x_TBD

    def _windows(self, x_TBD: Tensor, pieces: dict[str, Tensor]) -> Tensor:
        """Run the layers window by window; sequences at different positions are run one after the other."""
        clock_B = pieces["clock"].squeeze(1)
        positions = torch.unique(clock_B).tolist()
        if len(positions) == 1:
            return self._from(int(positions[0]), x_TBD, pieces)
        out, groups = torch.empty_like(x_TBD), []
        for position in positions:
            rows = clock_B == position
            group = {name: piece[rows] for name, piece in pieces.items()}
            out[:, rows] = self._from(int(position), x_TBD[:, rows], group)
            groups.append((rows, group))
        for name, piece in pieces.items():
            pieces[name] = torch.empty_like(piece)
            for rows, group in groups:
                pieces[name][rows] = group[name].to(piece.dtype)
        return out

    def _from(self, position: int, x_TBD: Tensor, pieces: dict[str, Tensor]) -> Tensor:
        assert self.positions is not None
        done = []
        while len(x_TBD):
            count = min(len(x_TBD), self.config.window - position)
            positions = self.positions.weight[position : position + count, None]
            done.append(self._layers(x_TBD[:count] + positions, pieces, position))
            x_TBD, position = x_TBD[count:], (position + count) % self.config.window
        pieces["clock"] = torch.full_like(pieces["clock"], position)
        return done[0] if len(done) == 1 else torch.cat(done)
