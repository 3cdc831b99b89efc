"""What a mixer is: the part of a block that lets a token see the tokens before it.

A mixer takes a window (T, B, D) and its own pieces of the state, and returns what it adds to the stream and
the pieces to carry on with. Mixers come in three kinds:

- *recurrent* ones carry a summary of all tokens so far;
- *sliding* ones see the last L tokens, and carry the L − 1 before the window (`slide`);
- *windowed* ones depend on the position in a window of L tokens. A text is read in such windows, each afresh;
  what they carry is the window so far. The shell cuts a text where a window ends and adds learned positions.

Shapes: T time, B batch, D width, L window.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from ..layers import GatedUnit

if TYPE_CHECKING:
    from ..config import ModelConfig

Layout = tuple[tuple[str, tuple[int, ...]], ...]
State = tuple[Tensor, ...]


class Mixer(nn.Module, ABC):
    """One way to mix tokens. A projection called `output`, where there is one, is initialised by depth."""

    windowed: ClassVar[bool] = False
    norm: ClassVar[type[nn.RMSNorm | nn.LayerNorm]] = nn.RMSNorm
    """What stands before the mixer, before the unit and before the head."""
    unit: ClassVar[type[nn.Module]] = GatedUnit
    """What follows the mixer, made from (width, hidden width)."""

    reads: ClassVar[frozenset[str]] = frozenset()
    """Fields of the config that it heeds, of those that not all layers do: `config.OF_SOME`."""
    drops_atoms: ClassVar[bool] = False
    """Whether it drops atoms, so that nothing of what it adds is dropped."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    @staticmethod
    @abstractmethod
    def layout(config: ModelConfig) -> Layout:
        """Return names and shapes of a layer's pieces of the state."""

    @abstractmethod
    def forward(self, x_TBD: Tensor, state: State, position: int) -> tuple[Tensor, State]:
        """Return what is added to the stream (T, B, D), and the new pieces, (B, *shape) each.

        `position` is that of the first token in its window, and T ends no later than the window; for mixers
        that are not windowed it is 0, and T is free.
        """

    @abstractmethod
    def naive(self, x_TD: Tensor) -> Tensor:
        """Return (T, D) for one sequence from its start, by the definition; of a mixer in float64."""


def slide(x_TBD: Tensor, tail_BWD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the window with the W tokens before it, (W + T, B, D), and the tail to carry on with."""
    padded = torch.cat([tail_BWD.transpose(0, 1), x_TBD])
    return padded, padded[len(x_TBD) :].transpose(0, 1)


def grow(past_BLD: Tensor, x_BTD: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """Return a window up to now, (B, position + T, D), and the same filled up with zeros to L."""
    seen = torch.cat([past_BLD[:, :position], x_BTD], dim=1)
    room = past_BLD.shape[1] - seen.shape[1]
    return seen, nn.functional.pad(seen, (0, 0, 0, room))
