"""Which matrices may be held in 4 bits.

The loss that rounding one matrix adds is measured in torch, one matrix at a time, on a part of the text.
Those that lose most for the bytes they save are raised to 8 bits first; how many must be is found by
bisection, each time with the whole graph on the whole text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sdgm_edge.evaluation import total_nll
from sdgm_edge.models import SDGM

from .builder import Array
from .gates import Accuracy
from .matrices import Precision, as_held

log = logging.getLogger(__name__)

SAMPLE_TOKENS = 8192
LANES = 16


@dataclass(frozen=True, slots=True)
class Found:
    """A plan and how it fares."""

    plan: dict[str, Precision]
    graph: bytes
    accuracy: Accuracy


def mixed_precision(
    model: SDGM,
    weights: Mapping[str, Array],
    plan: Mapping[str, Precision],
    tokens: Sequence[int],
    attempt: Callable[[dict[str, Precision]], Found],
    progress: Callable[[str], None],
    eight: Precision = "q8",
) -> Found:
    """Return the plan with the fewest matrices at 8 bits that stays within the limit, or failing that all 8.

    `attempt` builds and scores a plan; `eight` is the precision of 8 bits.
    """
    order = sensitivity(model, weights, plan, tokens, progress)

    def raised(count: int) -> Found:
        chosen: dict[str, Precision] = {**plan, **dict.fromkeys(order[:count], eight)}
        found = attempt(chosen)
        progress(f"q4: {count} of {len(order)} matrices at 8 bits lose {found.accuracy.loss_increase:.2%}")
        return found

    low, best = 0, raised(len(order))  # with `low` raised it fails, with best's count it holds
    if not best.accuracy.within:
        return best
    high = len(order)
    while high - low > 1:
        middle = (low + high) // 2
        found = raised(middle)
        if found.accuracy.within:
            high, best = middle, found
        else:
            low = middle
    return best


@torch.no_grad()
def sensitivity(
    model: SDGM,
    weights: Mapping[str, Array],
    plan: Mapping[str, Precision],
    tokens: Sequence[int],
    progress: Callable[[str], None],
) -> list[str]:
    """Return the matrices, those first whose rounding adds most loss for the bytes that it saves."""
    sample = np.array(tokens[: SAMPLE_TOKENS + 1])
    lanes = max(1, min(LANES, len(sample) // 64))
    parameters = dict(model.named_parameters())
    exact = total_nll(model, sample, lanes)
    cost: dict[str, float] = {}
    for name, precision in plan.items():
        kept = parameters[name].clone()
        parameters[name].copy_(torch.from_numpy(as_held(weights[name], precision)))
        cost[name] = (total_nll(model, sample, lanes) - exact) / weights[name].size
        parameters[name].copy_(kept)
        progress(
            f"q4: rounding {name.removesuffix('.weight')} costs {cost[name] * weights[name].size / exact:.3%}"
        )
    return sorted(cost, key=lambda name: -cost[name])
