"""Several processes as one: what `torchrun` starts trains together, the batch divided among them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, distributed, nn


@dataclass(frozen=True, slots=True)
class Group:
    """This process' place among those that train together."""

    rank: int = 0
    world: int = 1
    _sent: deque[Sequence[Tensor]] = field(default_factory=lambda: deque(maxlen=2), compare=False, repr=False)
    """What was exchanged last. A thread of gloo that is the last to let go of a tensor needs the interpreter
    for it, and aborts the process where that is ending."""

    @property
    def leads(self) -> bool:
        """Whether this process validates, fits the mixture and writes the run folder."""
        return self.rank == 0

    def gather(self, rows: Tensor) -> Tensor:
        """Return every process' rows, in the order of rank."""
        if self.world == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.world)]
        self._sent.append([rows := rows.contiguous(), *parts])
        distributed.all_gather(parts, rows)
        return torch.cat(parts)

    def share(self, tensor: Tensor) -> Tensor:
        """Give every process the leader's tensor, in place."""
        if self.world > 1:
            self._sent.append([tensor])
            distributed.broadcast(tensor, src=0)
        return tensor

    def mean(self, value: Tensor) -> float:
        """Return the mean over all processes."""
        value = value.detach().clone()
        if self.world > 1:
            self._add_up(value)
        return float(value) / self.world

    def average_gradients(self, module: nn.Module) -> None:
        """Give every process the mean of all gradients, in one exchange.

        `DistributedDataParallel` would overlap it with the backward pass. For models of some megabytes that
        gains little, and with gloo its end can deadlock: the group is torn down while a thread of it waits
        for the interpreter.
        """
        if self.world == 1:
            return
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self._add_up(flat)
        flat /= self.world
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def any(self, flag: bool, device: torch.device) -> bool:
        """Tell whether the flag is up in any process."""
        if self.world == 1:
            return flag
        seen = torch.tensor(float(flag), device=device)
        self._add_up(seen)
        return bool(seen)

    def _add_up(self, tensor: Tensor) -> None:
        self._sent.append([tensor])
        distributed.all_reduce(tensor, op=distributed.ReduceOp.SUM)


@contextmanager
def joined(device: torch.device) -> Iterator[Group]:
    """Join the processes that `torchrun` started with this one; alone without it."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Group()
        return
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Group(distributed.get_rank(), world)
    finally:
        distributed.destroy_process_group()
