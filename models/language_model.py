"""What every language model here has in common: embedding, head and pointer, and a state in one vector.

Inside, time comes first (T, B, ·): a step of the whole batch is then one contiguous block. A sequence's whole
state is one float32 vector of S numbers, zeros at the start; `ModelConfig.state_layout` names its pieces.

Shapes: T time, B batch, D width, V vocabulary, S state, M mixing vector (empty without a dictionary).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .config import ModelConfig
from .layers import LockedDropout
from .pointer import Pointed, PointerHead, mixed_log_probs


class Output(NamedTuple):
    """What the model says of a batch of sequences."""

    logits_BTV: Tensor
    mixing_BTM: Tensor
    state_BS: Tensor


class Features(NamedTuple):
    """What training needs: all but the logits. Without a dictionary, `mixing` and `rebuilt` are empty."""

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


class LanguageModel(nn.Module, ABC):
    """A model that reads windows of tokens and carries all that it remembers in one vector.

    A subclass adds its layers and then, by `_add_head`, what stands behind them: checkpoints number the
    parameters in that order.
    """

    norm: nn.Module
    pointer: PointerHead | None
    bias: nn.Parameter
    """Of the logits; their weights are the embedding's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.dropout = LockedDropout(config.dropout)

    def _add_head(self, norm: nn.Module) -> None:
        self.norm = norm
        self.pointer = PointerHead(self.config) if self.config.copy_window else None
        self.bias = nn.Parameter(torch.zeros(self.config.vocab_size))
        nn.init.normal_(self.embedding.weight, std=1 / math.sqrt(self.config.width))

    @abstractmethod
    def features(self, ids_TB: Tensor, state_BS: Tensor) -> Features:
        """Read a window, up to the input of the softmax."""

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

    def forward(self, ids_BT: Tensor, state_BS: Tensor | None = None) -> Output:
        """Return logits, mixing vectors and the new state for a batch of windows."""
        state_BS = self.initial_state(len(ids_BT)) if state_BS is None else state_BS
        f = self.features(ids_BT.T, state_BS)
        logits = self._logits(f.hidden_TBD, f.pointed)
        return Output(logits.transpose(0, 1), f.mixing_TBM.transpose(0, 1), f.state_BS)

    def step(self, ids_B: Tensor, state_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (B, V), mixing vectors (B, M) and the new state for one token of each sequence."""
        out = self(ids_B[:, None], state_BS)
        return out.logits_BTV[:, 0], out.mixing_BTM[:, 0], out.state_BS

    def _embed(self, ids: Tensor) -> Tensor:
        rate = self.config.embedding_dropout
        if self.training and rate:
            weight = self.embedding.weight
            kept = torch.empty(len(weight), 1, device=weight.device).bernoulli_(1 - rate) / (1 - rate)
            return functional.embedding(ids, weight) * functional.embedding(ids, kept)
        embedded: Tensor = self.embedding(ids)
        return embedded

    def scores(self, hidden: Tensor) -> Tensor:
        """Return the vocabulary's logits (…, V) from the softmax's input (…, D)."""
        return functional.linear(hidden, self.embedding.weight, self.bias)

    def _head(
        self, x_TBD: Tensor, ids_TB: Tensor, pieces: dict[str, Tensor]
    ) -> tuple[Tensor, Pointed | None]:
        """Return the softmax's input, and what the pointer copies; `pieces` get its new state."""
        hidden: Tensor = self.dropout(self.norm(x_TBD))
        if self.pointer is None:
            return hidden, None
        names = [f"copy.{name}" for name in self.pointer.state_names]
        pointed, new = self.pointer(hidden, ids_TB, self.embedding, *(pieces[name] for name in names))
        pieces.update(zip(names, new, strict=True))
        return pointed.hidden_TBD, pointed

    def _logits(self, hidden_TBD: Tensor, pointed: Pointed | None) -> Tensor:
        logits = self.scores(hidden_TBD)
        return logits if pointed is None else mixed_log_probs(pointed, logits)
