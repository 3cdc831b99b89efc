"""Windows of text for training: parallel lanes through a shard, cut anew each epoch.

The shard is a circle, entered each epoch at another place and divided into as many lanes as there are
sequences in a batch; a lane's windows follow each other, so that state can be carried from one to the next.
Everything is a function of (seed, epoch, index): a resumed run reads what it would have read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdgm_edge.runtime import ConfigError, CorpusError


@dataclass(frozen=True, slots=True, kw_only=True)
class Lanes:
    """The windows of a shard, for one of `world` processes."""

    tokens: NDArray[np.integer]
    batch_size: int
    window: int
    seed: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % self.world:
            raise ConfigError(
                f"training.batch_size: expected a multiple of the {self.world} processes, "
                f"got {self.batch_size}"
            )
        needed = self.batch_size * self.window + 1
        if len(self.tokens) < needed:
            raise CorpusError(
                f"the training text has {len(self.tokens)} tokens, but {self.batch_size} windows of "
                f"{self.window} need {needed}: give more text, or a smaller batch_size or window"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Windows in a lane."""
        return len(self.tokens) // self.batch_size // self.window

    def batch(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets (B, T) of this process' lanes."""
        lane = len(self.tokens) // self.batch_size
        entry = int(np.random.default_rng((self.seed, epoch)).integers(len(self.tokens)))
        first = entry + self._own(np.arange(self.batch_size)) * lane + index * self.window
        places = (first[:, None] + np.arange(self.window + 1)) % len(self.tokens)
        window = torch.from_numpy(self.tokens[places].astype(np.int64))
        return window[:, :-1], window[:, 1:]

    def fresh(self, epoch: int, index: int, part: float) -> Tensor:
        """Return which windows of this process are read as the beginning of a text, (B, 1)."""
        chances = np.random.default_rng((self.seed, epoch, index)).random(self.batch_size)
        return torch.from_numpy(self._own(chances) < part)[:, None]

    def _own(self, lanes: NDArray[Any]) -> NDArray[Any]:
        share = self.batch_size // self.world
        return lanes[self.rank * share :][:share]
