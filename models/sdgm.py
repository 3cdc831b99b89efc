"""The Spectral Dictionary Generative Model: embedding, spectral layers, head.

Inside, time comes first (T, B, ·): a step of the whole batch is then one contiguous block. A sequence's whole
state is one float32 vector of S numbers, zeros at the start; `ModelConfig.state_layout` names its pieces.

Shapes: T time, B batch, D width, V vocabulary, M mixing vector, S state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .clock import ClockAtoms
from .config import ModelConfig
from .layers import GatedUnit
from .pointer import Pointed, PointerHead, mixed_log_probs
from .ringing import RingingAtoms


class Output(NamedTuple):
    """What the model says of a batch of sequences."""

    logits_BTV: Tensor
    mixing_BTM: Tensor
    state_BS: Tensor


class Features(NamedTuple):
    """What training needs: everything but the logits."""

    hidden_TBD: Tensor
    """Input of the vocabulary's softmax."""
    pointed: Pointed | None
    """The copy distribution, where the head has one."""
    mixing_TBM: Tensor
    """Mixing vectors c of the last spectral layer."""
    embedded_TBD: Tensor
    """The embedding X."""
    rebuilt_TBD: Tensor
    """Its reconstruction X̂, the last spectral layer's synthesis."""
    state_BS: Tensor


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
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...], single: bool
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """Return the stream, x̂, the mixing vectors and the new state; `single` for one step without time."""
        source = self.norm(x) if self.residual else x
        rebuilt, mixing, state = (self.atoms.step if single else self.atoms)(source, *state)
        x = x + self.dropout(rebuilt) if self.residual else rebuilt
        if self.unit is not None:
            x = x + self.dropout(self.unit(self.unit_norm(x)))
        return x, rebuilt, mixing, state


class SDGM(nn.Module):
    """A language model without attention, in constant memory.

    >>> from sdgm_edge.models import SDGM, preset
    >>> model = SDGM(preset("edge-nano", vocab_size=300))
    >>> model(torch.tensor([[1, 2, 3]])).logits_BTV.shape
    torch.Size([1, 3, 300])
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks: Sequence[Block] = nn.ModuleList(Block(config) for _ in range(config.num_layers))  # type: ignore[assignment]
        self.norm = nn.RMSNorm(config.width, eps=1e-6) if config.residual else nn.Identity()
        self.pointer = PointerHead(config) if config.copy_window else None
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.dropout = nn.Dropout(config.dropout)
        nn.init.normal_(self.embedding.weight, std=1 / math.sqrt(config.width))
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

    @property
    def num_parameters(self) -> int:
        """Number of learned numbers."""
        return sum(p.numel() for p in self.parameters())

    def initial_state(self, batch: int = 1) -> Tensor:
        """Return the state at the start of a text, (B, S)."""
        return torch.zeros(batch, self.config.state_size, device=self.embedding.weight.device)

    def unpack(self, state_BS: Tensor) -> dict[str, Tensor]:
        """Return the pieces of a state by name, (B, *shape) each."""
        layout = self.config.state_layout
        parts = state_BS.split([math.prod(shape) for _, shape in layout], dim=1)
        return {name: part.unflatten(1, shape) for (name, shape), part in zip(layout, parts, strict=True)}

    def pack(self, pieces: dict[str, Tensor]) -> Tensor:
        """Return the state made of those pieces, (B, S)."""
        return torch.cat([pieces[name].flatten(1).float() for name, _ in self.config.state_layout], dim=1)

    def features(self, ids_TB: Tensor, state_BS: Tensor) -> Features:
        """Run every layer and the pointer over a window, without the logits."""
        pieces = self.unpack(state_BS)
        embedded = self._embed(ids_TB)
        x, rebuilt, mixing = self._layers(self.dropout(embedded), pieces, steps=len(ids_TB), single=False)
        hidden, pointed = self._head(x, ids_TB, pieces)
        return Features(hidden, pointed, mixing, embedded, rebuilt, self.pack(pieces))

    def forward(self, ids_BT: Tensor, state_BS: Tensor | None = None) -> Output:
        """Return logits, mixing vectors and the new state for a batch of windows."""
        state_BS = self.initial_state(len(ids_BT)) if state_BS is None else state_BS
        f = self.features(ids_BT.T, state_BS)
        logits = self._logits(f.hidden_TBD, f.pointed)
        return Output(logits.transpose(0, 1), f.mixing_TBM.transpose(0, 1), f.state_BS)

    def step(self, ids_B: Tensor, state_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (B, V), mixing vectors (B, M) and the new state for one token of each sequence."""
        pieces = self.unpack(state_BS)
        x, _, mixing = self._layers(self._embed(ids_B), pieces, steps=1, single=True)
        hidden, pointed = self._head(x[None], ids_B[None], pieces)
        return self._logits(hidden, pointed)[0], mixing, self.pack(pieces)

    def _embed(self, ids: Tensor) -> Tensor:
        rate = self.config.embedding_dropout
        if self.training and rate:
            weight = self.embedding.weight
            kept = torch.empty(len(weight), 1, device=weight.device).bernoulli_(1 - rate) / (1 - rate)
            return functional.embedding(ids, weight) * functional.embedding(ids, kept)
        embedded: Tensor = self.embedding(ids)
        return embedded

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

    def _head(
        self, x_TBD: Tensor, ids_TB: Tensor, pieces: dict[str, Tensor]
    ) -> tuple[Tensor, Pointed | None]:
        hidden = self.dropout(self.norm(x_TBD))
        if self.pointer is None:
            return hidden, None
        names = [f"copy.{name}" for name in self.pointer.state_names]
        pointed, new = self.pointer(hidden, ids_TB, self.embedding, *(pieces[name] for name in names))
        pieces.update(zip(names, new, strict=True))
        return pointed.hidden_TBD, pointed

    def _logits(self, hidden_TBD: Tensor, pointed: Pointed | None) -> Tensor:
        logits = functional.linear(hidden_TBD, self.embedding.weight, self.bias)
        return logits if pointed is None else mixed_log_probs(pointed, logits)
