"""What models of a kind cost on this machine, told from a few that are measured here, now.

Models of a kind have one vocabulary and one variant, and differ in depth and width. Of untrained ones:

    seconds of a token   of two layers, narrow ones and a quarter, half and all of the largest width, for a
                         line through points over the bytes that are read, another one for those whose head is
                         screened; and of two more depths, for what a layer costs beside its bytes
    memory               fresh processes run the smallest and the largest

Time is the processor's, so that it matters little what else the machine does. Nothing is kept.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from sdgm_edge.models import ModelConfig
from sdgm_edge.runtime import Engine, measure_memory, pinned, time_graph

from .screening import LEAST_WEIGHTS, is_large
from .sizing import GraphSize, graph_size, untrained_bundle, untrained_graph
from .variants import Variant, bundle_config

DEPTH = 2
NARROW, SHALLOW, DEEP = 64, 1, 4
STEP = 32
"""Widths are multiples of it."""
TOKENS, ROUNDS = 64, 3

Point = tuple[int, float]
"""Bytes, and what a graph of so many takes."""


def shape(depth: int, width: int, vocab_size: int) -> ModelConfig:
    """Return the model of a depth and a width, in the proportions of the presets."""
    atoms = STEP * round(5 * width / (3 * STEP))
    return ModelConfig(vocab_size=vocab_size, num_layers=depth, width=width, num_atoms=atoms)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Costs of one kind of models."""

    seconds: Sequence[Point]
    """Of a token, for models of `DEPTH` layers, by the bytes of the graph."""
    screened: Sequence[Point]
    """The same of models whose head is screened, by the bytes that are read; none where none is so large."""
    layer_seconds: float
    """What another layer adds to that, beside its bytes."""
    memory: Sequence[Point] | None
    """The peak of a process, in bytes, by those of the graph; None where this machine does not tell."""

    def tokens_per_second(self, depth: int, graph: GraphSize) -> float:
        """Return the speed of a model."""
        apart = _screened(graph) and self.screened
        of_usual_depth = line(self.screened, graph.read) if apart else line(self.seconds, graph.total)
        return 1 / (of_usual_depth + (depth - DEPTH) * self.layer_seconds)

    def peak(self, graph: GraphSize) -> int | None:
        """Return the peak of a process that generates, in bytes."""
        return None if self.memory is None else round(line(self.memory, graph.total))


def line(points: Sequence[Point], at: int) -> float:
    """Return what lies at a place on the line through points, drawn on straight before and behind them.

    >>> line([(1, 10.0), (2, 20.0), (4, 30.0)], 6)
    40.0
    """
    right = min(max(bisect([x for x, _ in points], at), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1 : right + 1]
    return y0 + (at - x0) * (y1 - y0) / (x1 - x0)


def calibrate(
    variant: Variant, vocab_size: int, largest: int, tokenizer_json: bytes, progress: Callable[[str], object]
) -> Calibration:
    """Measure models of a vocabulary in a variant, up to a width.

    Raises:
        ProviderError: ONNX Runtime is not there.
        MeasureError: a process died.
    """
    progress(f"{variant.name}: timing untrained models")
    family = [shape(DEPTH, width, vocab_size) for width in _widths(vocab_size, largest, variant)]
    narrow = [shape(depth, NARROW, vocab_size) for depth in (SHALLOW, DEEP)]
    sizes = {config: graph_size(config, variant) for config in (*family, *narrow)}
    with pinned(1):
        engines = {
            config: Engine(
                untrained_graph(config, variant), bundle_config(config), variant.name, providers="cpu"
            )
            for config in sizes
        }
        rounds = [
            [time_graph(engine, TOKENS, 1).tokens_per_cpu_second for engine in engines.values()]
            for _ in range(ROUNDS)
        ]
    seconds = {
        config: 1 / median(rates) for config, rates in zip(engines, zip(*rounds, strict=True), strict=True)
    }
    whole = [(sizes[config].total, seconds[config]) for config in family if not _screened(sizes[config])]
    screened = [(sizes[config].read, seconds[config]) for config in family if _screened(sizes[config])]
    shallow, deep = narrow
    by_bytes = line(_rising(whole), sizes[deep].total) - line(_rising(whole), sizes[shallow].total)
    layer = (seconds[deep] - seconds[shallow] - by_bytes) / (DEEP - SHALLOW)
    progress(f"{variant.name}: starting fresh processes")
    memory = _memory(family, variant, sizes, tokenizer_json)
    return Calibration(_rising(whole), _rising(screened), max(0.0, layer), memory)


def _widths(vocab_size: int, largest: int, variant: Variant) -> list[int]:
    """Return the widths to measure: two at least with a head read whole, two or none with one screened."""
    widths = {NARROW, *(max(STEP, largest * part // 4 // STEP * STEP) for part in (1, 2, 4))}
    if is_large(shape(DEPTH, max(widths), vocab_size), variant.bits):
        edge = (LEAST_WEIGHTS - 1) // vocab_size // STEP * STEP
        widths |= {edge, edge + STEP, max(largest, edge + 2 * STEP)}
    return sorted(widths)


def _screened(size: GraphSize) -> bool:
    return size.read < size.total


def _rising(points: Sequence[Point]) -> list[Point]:
    """Return points that do not fall, as measured ones may by chance."""
    return list(zip((x for x, _ in points), accumulate((y for _, y in points), max), strict=True))


def _memory(
    family: Sequence[ModelConfig],
    variant: Variant,
    sizes: dict[ModelConfig, GraphSize],
    tokenizer_json: bytes,
) -> list[Point] | None:
    """Return the peaks of processes with the smallest and the largest model."""
    with TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:

        def peak(config: ModelConfig) -> int | None:
            path = Path(folder) / f"{config.width}"
            stages = measure_memory(untrained_bundle(path, config, variant, tokenizer_json))
            return stages["after_tokens"].peak

        ends = family[0], family[-1]
        peaks = [size for size in pool.map(peak, ends) if size is not None]
    if len(peaks) < len(ends):
        return None
    return [(sizes[config].total, size) for config, size in zip(ends, peaks, strict=True)]
