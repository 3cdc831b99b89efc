"""How weights move: which optimizer has which parameters, and at what rate in each step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sdgm_edge.config import TrainingConfig

DYNAMICS = ("omega", "damping", "frequency")
"""Parameters of the atoms' motion, which have a learning rate of their own."""

TABLES = ("embedding.weight", "positions.weight", "conv.weight", "amplitude", "phase", "low", "high", "gain")
"""What has rows and columns and maps no vector to another: Muon leaves it to AdamW."""


class Optimizer:
    """One or more of torch's optimizers that step together.

    What has rows and columns decays, tables among it; a vector never does: a bias, the gain of a norm, a
    frequency, a damping. `muon` gives every matrix that maps
    one vector to another an update whose singular values are all alike, of the size that AdamW's would have,
    so that one learning rate serves both.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig) -> None:
        self.config = config
        groups: dict[str, list[nn.Parameter]] = {"maps": [], "matrices": [], "vectors": [], "dynamics": []}
        for name, parameter in model.named_parameters():
            if name.endswith(DYNAMICS):
                kind = "dynamics"
            elif parameter.ndim < 2:
                kind = "vectors"
            elif config.optimizer == "muon" and parameter.ndim == 2 and not name.endswith(TABLES):
                kind = "maps"
            else:
                kind = "matrices"
            groups[kind].append(parameter)
        decay = config.weight_decay
        settings = [
            {"params": groups["matrices"], "weight_decay": decay, "scale": 1.0},
            {"params": groups["vectors"], "weight_decay": 0.0, "scale": 1.0},
            {"params": groups["dynamics"], "weight_decay": 0.0, "scale": config.dynamics_rate},
        ]
        adam = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
        self.parts: list[torch.optim.Optimizer] = [
            adam([g for g in settings if g["params"]], betas=(0.9, config.beta2), fused=True)
        ]
        if groups["maps"]:
            maps = [{"params": groups["maps"], "scale": 1.0}]
            self.parts.append(torch.optim.Muon(maps, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))

    def step(self, rate: float) -> None:
        """Move the weights by their gradients, and forget the gradients."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate * group["scale"]
            part.step()
            part.zero_grad(set_to_none=True)

    def moments(self) -> dict[str, Tensor]:
        """Return all that is remembered of past gradients, by parameter and name."""
        return {
            f"{offset + index}.{name}": tensor
            for offset, part in self._offsets()
            for index, values in part.state_dict()["state"].items()
            for name, tensor in values.items()
        }

    def restore(self, moments: Mapping[str, Tensor]) -> None:
        """Take up what `moments` gave."""
        values: dict[int, dict[str, Tensor]] = {}
        for key, tensor in moments.items():
            index, name = key.split(".")
            values.setdefault(int(index), {})[name] = tensor
        for offset, part in self._offsets():
            stop = offset + _count(part)
            own = {i - offset: state for i, state in values.items() if offset <= i < stop}
            part.load_state_dict({**part.state_dict(), "state": own})

    def _offsets(self) -> Iterable[tuple[int, Any]]:
        offset = 0
        for part in self.parts:
            yield offset, part
            offset += _count(part)


def _count(part: torch.optim.Optimizer) -> int:
    return sum(len(group["params"]) for group in part.param_groups)


def learning_rate(config: TrainingConfig, step: int, total: int) -> float:
    """Return the learning rate of a step, counted from 0."""
    warm = max(1, round(config.warmup * total))
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm))) / 2
