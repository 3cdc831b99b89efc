"""How fast a bundle is on this machine, after llama-bench: one variant on some threads, test by test.

    pp512            read a prompt of 512 tokens (the begin token is one of them), up to the logits after it
    tg128            feed 128 tokens one by one, with the logits after each: a text without its sampling
    tg128 @ d1000    the same after 1000 tokens, which are fed beforehand; all that they leave is a state
    encode           text to tokens
    sample           logits to a token, with the bundle's own sampling parameters
    decode           tokens to text, one by one

After a round that is not counted, tests take turns, so that what slows the machine for a while slows all of
them. Each is told by the clock and by the processor's time, which agree where nothing else runs; on several
threads the processor's time is that of all. Load, first token and memory are those of fresh processes.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, models

from .container import shown
from .engine import Engine
from .errors import ParameterError
from .footprint import PROMPT, VariantFootprint, measure_footprint
from .generator import Generator
from .sampling import Sampler
from .session import Segment, Session
from .state_file import Identity
from .text import TokenStream

TEXT_TOKENS = 256
"""Length of the text, made up by the model, on which encode, sample and decode are measured."""
PASSES = 8
"""Over it, in a repetition of encode and of decode, which are short."""


DEPTHS = (0, 1000, 16_000, 100_000)


class Spent(NamedTuple):
    """Seconds that something took."""

    wall: float
    """Those that passed."""
    cpu: float
    """The processor's, in all threads of this process."""


def spent(work: Callable[[], object]) -> Spent:
    """Measure one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu)


@contextmanager
def pinned(count: int) -> Iterator[tuple[int, ...]]:
    """Stay on the last `count` of the CPUs that this thread may use; those chosen, none where that cannot be.

    Threads and processes that are started meanwhile stay there too.
    """
    if not hasattr(os, "sched_setaffinity") or count > len(allowed := os.sched_getaffinity(0)):
        yield ()
        return
    chosen = tuple(sorted(allowed)[-count:])
    os.sched_setaffinity(0, chosen)
    try:
        yield chosen
    finally:
        os.sched_setaffinity(0, allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedTest:
    """One test and its repetitions."""

    name: str
    """As a report calls it."""
    tokens: int
    """Tokens of one repetition."""
    times: tuple[Spent, ...]
    """What each took."""

    @property
    def tokens_per_second(self) -> float:
        """By the clock, the median."""
        return self.tokens / median(t.wall for t in self.times)

    @property
    def spread(self) -> float:
        """Half of what lies between the quickest and the slowest repetition, in tokens per second."""
        rates = [self.tokens / t.wall for t in self.times]
        return (max(rates) - min(rates)) / 2

    @property
    def tokens_per_cpu_second(self) -> float:
        """By the processor's time of all threads, the median."""
        return self.tokens / median(t.cpu for t in self.times)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "name": self.name,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "spread": self.spread,
            "tokens_per_cpu_second": self.tokens_per_cpu_second,
            "seconds": [t.wall for t in self.times],
            "cpu_seconds": [t.cpu for t in self.times],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How fast one variant of a bundle is on one machine."""

    path: str
    """The bundle."""
    name: str
    """The model's name."""
    variant: str
    """The variant."""
    num_parameters: int | None
    """Numbers that the model has learnt; None where the bundle does not tell."""
    threads: int
    """Threads of a product."""
    cpus: tuple[int, ...]
    """The CPUs that it was kept to; none where this system or its settings did not let it."""
    provider: str
    """Where it ran: cpu, cuda, …"""
    machine: dict[str, Any]
    """What it was measured on, and with."""
    tests: tuple[SpeedTest, ...]
    """The tests, in the order of the module's table."""
    atoms: int | None
    """Atoms of each layer, where fewer than all were asked for."""
    footprint: VariantFootprint
    """Sizes, memory, load time and first token, of fresh processes."""

    @property
    def disturbance(self) -> float:
        """How much more the clock told than the processor's time: 0.5 is half more. 0 on several threads."""
        if self.threads > 1 or self.provider != "cpu":
            return 0.0
        wall, cpu = (sum(t[i] for test in self.tests for t in test.times) for i in (0, 1))
        return wall / cpu - 1

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON."""
        told = asdict(self) | {"tests": [test.to_dict() for test in self.tests]}
        return told | {"disturbance": self.disturbance}


def measure_speed(
    path: str | Path,
    variant: str | None = None,
    *,
    threads: int = 1,
    prompt_tokens: int = 512,
    tokens: int = 128,
    depths: Sequence[int] = DEPTHS,
    repeats: int = 5,
    providers: str | Sequence[str] = "auto",
    prepared: bool = False,
    atoms: int | None = None,
    progress: Callable[[str], object] = lambda message: None,
) -> Speed:
    """Measure one variant of a bundle, the default one unless another is asked for.

    `tokens`: to generate at each of `depths`; `prompt_tokens`: of the prompt that is read. `providers`,
    `prepared` and `atoms`: as `Generator.load` takes them. `progress` is told what is being done.

    Raises:
        BundleError: the bundle is damaged, or lacks the variant.
        ProviderError: ONNX Runtime, or a provider that was asked for, is not there.
        ParameterError: a parameter makes no sense.
        MeasureError: a child process died.
        CacheError: what is prepared cannot be used or written.
    """
    for what, value, least in (
        ("threads", threads, 1),
        ("prompt_tokens", prompt_tokens, 1),
        ("tokens", tokens, 1),
        ("repeats", repeats, 1),
        *(("depths", depth, 0) for depth in depths),
    ):
        if type(value) is not int or value < least:
            raise ParameterError(
                f"{what}: expected a whole number from {least}, got {shown(value)}; leave it out"
            )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with pinned(threads) as cpus:
        generator = Generator.load(path, variant, providers, threads, prepared=prepared, atoms=atoms)
        label = f"{path}: {generator.variant}, {threads} thread{'s' if threads > 1 else ''}"
        if deepest := max(depths, default=0):
            progress(f"{label}: reading {deepest:,} tokens, to stand after them")
        works = [*_model_tests(generator, prompt_tokens, tokens, depths), *_text_tests(generator, tokens)]
        rounds = []
        for number in range(repeats + 1):
            progress(f"{label}: round {number} of {repeats}" if number else f"{label}: warming up")
            rounds.append([spent(work) for _, _, work in works])
        progress(f"{label}: {repeats + 2} fresh processes")
        fresh = measure_footprint(
            path,
            [generator.variant],
            providers=providers,
            threads=threads,
            repeats=repeats,
            prepared=prepared,
            atoms=atoms,
        )
    return Speed(
        path=str(path),
        name=fresh.name,
        variant=generator.variant,
        num_parameters=generator.bundle.manifest.num_parameters,
        threads=threads,
        cpus=cpus,
        provider=generator.provider,
        machine=fresh.machine | {"load average": load},
        tests=tuple(
            SpeedTest(name=name, tokens=count, times=tuple(times))
            for (name, count, _), times in zip(works, zip(*rounds[1:], strict=True), strict=True)
        ),
        atoms=generator.atoms if generator.bundle.atoms_of else None,
        footprint=fresh.variants[0],
    )


def time_graph(engine: Engine, tokens: int = 128, repeats: int = 5) -> SpeedTest:
    """The test tg128 of a graph alone, for which there is no bundle yet."""
    begin = Segment(engine.zeros(), [0])
    session = Session(engine, Tokenizer(models.BPE()), Identity("0" * 64, ""), [begin], history=0)
    _ = session.logits  # run here, not within the first repetition
    ids = _random_ids(engine.config.vocab_size, tokens)
    times = [spent(partial(_feed_one_by_one, session, ids)) for _ in range(repeats + 1)]
    return SpeedTest(name=f"tg{tokens}", tokens=tokens, times=tuple(times[1:]))


Work = tuple[str, int, Callable[[], object]]
"""Name of a test, tokens of a repetition, and the repetition."""


def _model_tests(
    generator: Generator, prompt_tokens: int, tokens: int, depths: Sequence[int]
) -> Iterator[Work]:
    prompt = _random_ids(generator.vocab_size, prompt_tokens - 1)

    def read() -> None:
        session = generator.session(history=0)
        session.feed(prompt)
        _ = session.logits

    yield f"pp{prompt_tokens}", prompt_tokens, read
    ids = _random_ids(generator.vocab_size, tokens)
    session = generator.session(history=0)
    for depth in sorted(set(depths)):
        session.feed(islice(cycle(ids), depth - session.position))
        _ = session.logits
        name = f"tg{tokens} @ d{depth}" if depth else f"tg{tokens}"
        yield name, tokens, partial(_feed_one_by_one, session.fork(), ids)


def _text_tests(generator: Generator, tokens: int) -> Iterator[Work]:
    bundle = generator.bundle
    session = generator.session(history=0)
    made = generator.generate(
        None, max_new_tokens=TEXT_TOKENS, seed=0, banned_tokens=bundle.generation.end_tokens
    )
    text, rows = made.text or PROMPT, []
    for token in made.tokens:
        session.push(token)
        rows.append(session.logits)
    params = bundle.generation.sampling.replace(seed=0)

    def encode() -> None:
        for _ in range(PASSES):
            generator.encode(text)

    def sample() -> None:
        sampler = Sampler(params, generator.vocab_size)
        for row in islice(cycle(rows), tokens):
            sampler.sample(row)

    def decode() -> None:
        for _ in range(PASSES):
            stream = TokenStream(generator.vocabulary)
            for token in made.tokens:
                stream.push(token)

    yield "encode", PASSES * len(generator.encode(text)), encode
    yield "sample", tokens, sample
    yield "decode", PASSES * len(made.tokens), decode


def _feed_one_by_one(session: Session, ids: Sequence[int]) -> None:
    session = session.fork()
    for token in ids:
        session.push(token)
        _ = session.logits


def _random_ids(vocab_size: int, count: int) -> list[int]:
    ids: list[int] = np.random.default_rng(0).integers(vocab_size, size=count).tolist()
    return ids
