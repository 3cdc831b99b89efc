"""A model that fits a device, before it is trained: the largest that keeps what is wished.

Sizes and numbers of parameters are those of the model, and of its graph as the exporter lays it out. Speed
and memory are told from models that are measured on this machine (`calibration`). All of them grow with depth
and width, so the widest model of a depth that keeps every wish is found by halving. Of the depths, that of
the preset nearest in size is proposed, unless another leaves room for notably more parameters.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from sdgm_edge.models import PRESETS, ModelConfig
from sdgm_edge.runtime import ParameterError, machine

from .calibration import DEPTH, STEP, Calibration, calibrate, shape
from .sizing import graph_size, num_parameters, small_files, stand_in_tokenizer
from .variants import variant_of

BITS = (8, 4)
DEPTHS = (1, 2, 3, 4, 6, 8)
MOST_WIDTH = 4096
SMALLEST_VOCABULARY = 512
"""That is thought of as an alternative."""
MEASURED = 48_000_000
"""Bytes of the largest graph that is measured; what a larger one costs is told from it."""
NEAR = 0.9
"""A model of a preset's depth is proposed where it has so much of the parameters of the largest."""
UNTRAINED = 12_000
"""About the bytes of what an untrained bundle lacks: its card, its golden tokens, its figures."""
EDGE = tuple(name for name, config in PRESETS.items() if config.layer == "ringing")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a model must keep."""

    bundle: float = 16e6
    """Most bytes of the bundle."""
    speed: float = 0.0
    """Least tokens a second, one by one on one thread, without sampling."""
    memory: float = math.inf
    """Most bytes of a process that generates, at its peak."""
    vocab_size: int = 4096
    """Tokens of the vocabulary."""
    bits: tuple[int, ...] = BITS
    """Precisions to think of; the first that serves is proposed."""

    def __post_init__(self) -> None:
        for name, least in (("bundle", "above 0"), ("speed", "from 0"), ("memory", "above 0")):
            value = getattr(self, name)
            if not (value > 0 or (value == 0 and least == "from 0")):
                raise ParameterError(f"{name}: expected a number {least}, got {value:g}; leave it out")
        if not self.bits:
            raise ParameterError("bits: expected at least one of 4, 8, 16, 32, got none; leave it out")
        for bits in self.bits:
            variant_of(bits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A model, and what it will cost."""

    config: ModelConfig
    """The model."""
    bits: int
    """How it is exported."""
    num_parameters: int
    """Numbers that it learns."""
    graph: int
    """Bytes of its graph."""
    bundle: int
    """Bytes of its bundle."""
    state: int
    """Bytes of the state of a text."""
    peak: int | None
    """Bytes of a process that generates, at its peak; None where this machine does not tell."""
    tokens_per_second: float
    """One by one on this machine and one thread, without sampling, by the processor's time."""

    @property
    def preset(self) -> str | None:
        """The preset that it is, but for the vocabulary."""
        vocab_size = self.config.vocab_size
        return next((n for n in EDGE if replace(PRESETS[n], vocab_size=vocab_size) == self.config), None)

    def misses(self, wishes: Wishes) -> list[str]:
        """Return the wishes that it does not keep, in words."""
        found = []
        if self.bundle > wishes.bundle:
            found.append(_too_large(self.bundle, wishes))
        if self.tokens_per_second < wishes.speed:
            found.append(f"{self.tokens_per_second:,.0f} tokens/s, where {wishes.speed:,.0f} are asked for")
        if self.peak is not None and self.peak > wishes.memory:
            asked = f"{wishes.memory / 1e6:.1f} MB"
            found.append(f"{self.peak / 1e6:.1f} MB of memory, where at most {asked} is asked for")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the same as plain values."""
        return {**asdict(self), "preset": self.preset}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """What is proposed, and what else there is."""

    wishes: Wishes
    """What was asked for."""
    machine: dict[str, Any]
    """Where speed and memory were measured."""
    proposed: Candidate
    """The model to train."""
    alternatives: tuple[Candidate, ...]
    """Others that keep the wishes, the largest first."""

    def to_dict(self) -> dict[str, Any]:
        """Return the same as plain values."""
        wishes = asdict(self.wishes)
        return {
            "wishes": {name: None if value == math.inf else value for name, value in wishes.items()},
            "machine": self.machine,
            "proposed": self.proposed.to_dict(),
            "alternatives": [candidate.to_dict() for candidate in self.alternatives],
        }


def plan_model(wishes: Wishes, progress: Callable[[str], object] = lambda message: None) -> PlanReport:
    """Find the largest model that keeps the wishes, and others. `progress` is told what is being done.

    Raises:
        ParameterError: no model keeps the wishes; the nearest is named.
        ConfigError: there is no vocabulary of that size.
        ProviderError: ONNX Runtime is not there.
        MeasureError: a process died that was measured.
    """
    stand_in_tokenizer(wishes.vocab_size)  # refuses what is no size
    costs = Costs(wishes, progress)
    least = shape(DEPTHS[0], STEP, wishes.vocab_size)
    sizes = {bits: bundle_size(least, bits) for bits in wishes.bits}
    if (smallest := min(sizes.values())) > wishes.bundle:
        raise _impossible(least, min(sizes, key=sizes.__getitem__), [_too_large(smallest, wishes)])
    nearest = [costs.of(least, bits) for bits in wishes.bits]
    serving = [candidate.bits for candidate in nearest if not candidate.misses(wishes)]
    if not serving:
        best = min(nearest, key=lambda candidate: len(candidate.misses(wishes)))
        raise _impossible(least, best.bits, best.misses(wishes))
    bits = serving[0]
    progress(f"looking for the widest of {', '.join(map(str, DEPTHS))} layers")
    found: list[Candidate] = []
    for depth in DEPTHS:  # none is wider than one that is less deep
        found += costs.widest(depth, wishes.vocab_size, bits, found[-1].config.width if found else MOST_WIDTH)
    proposed = _usual(found)
    depth, vocab_size = proposed.config.num_layers, wishes.vocab_size
    for other in serving[1:]:
        found += costs.widest(depth, vocab_size, other)
    for size in (vocab_size // 2, 2 * vocab_size):
        found += costs.widest(depth, size, bits) if size >= SMALLEST_VOCABULARY else []
    presets = [costs.of(replace(PRESETS[name], vocab_size=vocab_size), bits) for name in EDGE]
    found += [candidate for candidate in presets if not candidate.misses(wishes)][-1:]
    others = sorted(set(found) - {proposed}, key=lambda candidate: -candidate.num_parameters)
    return PlanReport(wishes=wishes, machine=machine(), proposed=proposed, alternatives=tuple(others))


class Costs:
    """What models will cost here; the kinds are measured when they are first asked for."""

    def __init__(self, wishes: Wishes, progress: Callable[[str], object] = lambda message: None) -> None:
        self._wishes, self._progress = wishes, progress
        self._kinds: dict[int, Calibration] = {}

    def of(self, config: ModelConfig, bits: int) -> Candidate:
        """Return a model with what it will cost."""
        if bits not in self._kinds:
            self._kinds[bits] = self._measure(bits)
        kind, graph = self._kinds[bits], graph_size(config, variant_of(bits))
        return Candidate(
            config=config,
            bits=bits,
            num_parameters=num_parameters(config),
            graph=graph.total,
            bundle=bundle_size(config, bits),
            state=4 * config.state_size,
            peak=kind.peak(graph),
            tokens_per_second=kind.tokens_per_second(config.num_layers, graph),
        )

    def widest(self, depth: int, vocab_size: int, bits: int, most: int = MOST_WIDTH) -> list[Candidate]:
        """Return the widest model of a depth that keeps the wishes; none where none does."""

        def serves(width: int) -> bool:
            return not self.of(shape(depth, width, vocab_size), bits).misses(self._wishes)

        width = _widest(serves, most)
        return [self.of(shape(depth, width, vocab_size), bits)] if width else []

    def _measure(self, bits: int) -> Calibration:
        vocab_size, limit = self._wishes.vocab_size, min(self._wishes.bundle, MEASURED)
        width = _widest(lambda width: bundle_size(shape(DEPTH, width, vocab_size), bits) <= limit)
        tokenizer = stand_in_tokenizer(vocab_size)
        return calibrate(variant_of(bits), vocab_size, max(width, 2 * STEP), tokenizer, self._progress)


@cache
def bundle_size(config: ModelConfig, bits: int) -> int:
    """Return the bytes of a bundle with one graph."""
    small = small_files(config, stand_in_tokenizer(config.vocab_size))
    return graph_size(config, variant_of(bits)).total + sum(map(len, small.values())) + UNTRAINED


def plan_toml(candidate: Candidate) -> str:
    """Return a config file for training: a preset, and where the model differs from it."""
    config = candidate.config
    preset = candidate.preset or _nearest_preset(candidate)
    changed = {
        name: value
        for name, value in config.to_dict().items()
        if name != "vocab_size" and value != getattr(PRESETS[preset], name)
    }
    lines = [f'preset = "{preset}"', "", "[corpus]", f"vocab_size = {config.vocab_size}"]
    if changed:
        lines += ["", "[model]", *(f"{name} = {json.dumps(value)}" for name, value in changed.items())]
    return "\n".join([*lines, ""])


def _widest(serves: Callable[[int], bool], most: int = MOST_WIDTH) -> int:
    """Return the largest width that serves, where all smaller ones do too; 0 if none does."""
    return STEP * bisect_left(range(STEP, most + 1, STEP), True, key=lambda width: not serves(width))


def _usual(found: list[Candidate]) -> Candidate:
    """Return, of those that are nearly the largest, the one that is as deep as the preset nearest in size."""
    most = max(candidate.num_parameters for candidate in found)
    large = [candidate for candidate in found if candidate.num_parameters >= NEAR * most]
    return min(large, key=lambda c: abs(c.config.num_layers - PRESETS[_nearest_preset(c)].num_layers))


def _nearest_preset(candidate: Candidate) -> str:
    """Return the preset whose number of parameters is nearest, as a ratio."""
    return min(EDGE, key=lambda name: abs(math.log(num_parameters(PRESETS[name]) / candidate.num_parameters)))


def _too_large(size: float, wishes: Wishes) -> str:
    return f"a bundle of {size / 1e6:.2f} MB, where at most {wishes.bundle / 1e6:.2f} MB is asked for"


def _impossible(config: ModelConfig, bits: int, misses: list[str]) -> ParameterError:
    return ParameterError(
        f"no model keeps these wishes: the smallest ({config.num_layers} layers of width {config.width}, "
        f"{config.vocab_size:,} tokens, {bits} bits) has {'; and '.join(misses)}; "
        "ask for no more than that, or for a smaller vocabulary"
    )
