"""How a generator is measured: what a token costs, and what of it is the graph's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

from sdgm_edge.export.graph import weights_of
from sdgm_edge.export.variants import VARIANTS, build, bundle_config

from sdgm_edge.models import SDGM, ModelConfig
from sdgm_edge.runtime import Engine, Generator, Spent, spent


def microseconds(calls: Iterable[Callable[[], object]]) -> float:
    """The median time of calls."""
    return 1e6 * median(spent(call).wall for call in calls)


def drain(stream: Iterator[str]) -> None:
    """Take all pieces, and drop them."""
    for _ in stream:
        pass


class Timed:
    """An ONNX Runtime session that remembers how long its runs took."""

    def __init__(self, session: Any) -> None:
        self._session, self.runs = session, list[Spent]()

    def run(self, *arguments: Any) -> list[Any]:
        """Run it."""
        wall, cpu = time.perf_counter(), time.process_time()
        results: list[Any] = self._session.run(*arguments)
        self.runs.append(Spent(time.perf_counter() - wall, time.process_time() - cpu))
        return results


@dataclass(frozen=True)
class Decoding:
    """What a generated token costs: medians over texts, in seconds."""

    wall: float
    cpu: float
    own_wall: float
    """The part that is spent outside `session.run`."""
    own_cpu: float


def decoding(generator: Generator, tokens: int = 256, texts: int = 9, **sampling: Any) -> Decoding:
    """Measure `Generator.stream`, sampling as the bundle does unless told otherwise."""
    engine = generator.engine
    plain = engine._session
    rounds = []
    for seed in range(texts + 1):
        engine._session = timed = Timed(plain)
        took = spent(partial(drain, generator.stream("The", seed=seed, max_new_tokens=tokens, **sampling)))
        wall, cpu = sum(run.wall for run in timed.runs), sum(run.cpu for run in timed.runs)
        rounds.append([s / tokens for s in (took.wall, took.cpu, took.wall - wall, took.cpu - cpu)])
    engine._session = plain
    return Decoding(*(median(column) for column in zip(*rounds[1:], strict=True)))


def without_head(config: ModelConfig, bits: int) -> float:
    """Seconds of processor time of a token in a model's graph with hardly any words."""
    config = replace(config, vocab_size=16)
    weights, variant = weights_of(SDGM(config)), VARIANTS[bits]
    graph = build(config, weights, variant.plan(weights))
    engine = Engine(graph, bundle_config(config), "body", providers="cpu", threads=1)
    state = engine.zeros()
    return median(spent(lambda: engine.last([1], state)).cpu for _ in range(2000))


def read(generator: Generator, text: str) -> int:
    """Read a prompt, from text to the logits after it; its number of tokens."""
    session = generator.session()
    count = session.feed(text)
    _ = session.logits
    return count
