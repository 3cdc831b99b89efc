"""Several processes as one: what `torchrun` starts trains together, the batch divided among them."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn


@dataclass(frozen=True, slots=True)
class Group:
    """This process' place among those that train together."""

    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process validates, fits the mixture and writes the run folder."""
        return self.rank == 0

    def gather(self, rows: Tensor) -> Tensor:
        """Return every process' rows, in the order of rank."""
        if self.world == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.world)]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def share(self, tensor: Tensor) -> Tensor:
        """Give every process the leader's tensor, in place."""
        if self.world > 1:
            distributed.broadcast(tensor, src=0)
        return tensor

    def mean(self, value: Tensor) -> float:
        """Return the mean over all processes."""
        value = value.detach().clone()
        if self.world > 1:
            distributed.all_reduce(value)
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
        distributed.all_reduce(flat)
        flat /= self.world
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def any(self, flag: bool, device: torch.device) -> bool:
        """Tell whether the flag is up in any process."""
        if self.world == 1:
            return flag
        seen = torch.tensor(float(flag), device=device)
        distributed.all_reduce(seen)
        return bool(seen)


@contextmanager
def joined(device: torch.device) -> Iterator[Group]:
    """Join the processes that `torchrun` started with this one; alone without it."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Group()
        return
    # Imported while a group is there, it keeps that alive for good, and a thread of gloo that wants the
    # interpreter as that ends aborts the process.
    importlib.import_module("torch._dynamo")
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Group(distributed.get_rank(), world)
    finally:
        distributed.destroy_process_group()
