"""What is promised of bundles and of the runtime, measured on this machine: one section for each promise.

    python benchmarks/bench.py                      # everything, in a few minutes
    python benchmarks/bench.py --only speed,flat    # some sections
    python benchmarks/bench.py --run runs/mine      # the accuracy of your run, not of a small one made here
    python benchmarks/bench.py --json               # for a machine

All runs on one core and one thread. A figure is the median of several measurements; beside the time that
passed stands the processor's time of this process, which says the same on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

from atoms import speeds
from bundles import EDGE, Bench, described, load
from measuring import decoding, drain, microseconds, read, without_head
from sdgm_edge.export.variants import VARIANTS

from sdgm_edge.console import format_value, print_table
from sdgm_edge.models import ModelConfig, preset
from sdgm_edge.runtime import (
    Generator,
    Session,
    Spent,
    measure_footprint,
    measure_speed,
    pinned,
    spent,
)

PRESETS = ("paper", *EDGE)
DEEP = 100_000
ATOMS = 256, 64
LARGE = ModelConfig(vocab_size=32_000, num_layers=3, width=512, num_atoms=256, glu_width=1024)
"""The shape of a model of 23 million parameters, as others of that size are measured."""
BLOCK, BLOCKS = 64, 150
MEMORY = """
import gc, json, psutil, sys
from sdgm_edge.runtime import Generator

def generate(tokens):
    stream = generator.stream(None, session=session, max_new_tokens=tokens)
    for piece in stream:
        pass
    return stream

def rss():
    gc.collect()
    return psutil.Process().memory_info().rss / 1e6

tokens = int(sys.argv[2])
generator = Generator.load(sys.argv[1], providers="cpu")
session = generator.session()
for _ in range(5):  # fills what a session keeps: its history, and its last tokens
    generate(tokens // 100)
start = rss()
for _ in range(20):
    generate(tokens // 100)
middle = rss()
stream = generate(tokens)
print(json.dumps({"streams": middle - start, "one stream": rss() - middle, "all": start}))
"""
"""Run by itself, as a device would: nothing but the runtime is loaded."""
TRAIN = ("--preset", "edge-nano", "--vocab-size", "2048", "--max-steps", "500")


@dataclass(frozen=True)
class Figure:
    """One line of the report."""

    section: str
    name: str
    measured: float
    unit: str
    promise: str = ""
    kept: bool | None = None

    @classmethod
    def at_most(cls, section: str, name: str, measured: float, unit: str, limit: float) -> Figure:
        """A figure that is promised not to exceed a limit."""
        return cls(section, name, measured, unit, f"≤ {format_value(limit)}", measured <= limit)

    @classmethod
    def at_least(cls, section: str, name: str, measured: float, unit: str, limit: float) -> Figure:
        """A figure that is promised to reach a limit."""
        return cls(section, name, measured, unit, f"≥ {format_value(limit)}", measured >= limit)


# Sections


def accuracy(bench: Bench) -> Iterator[Figure]:
    """What export loses: float32 against torch, int8 and 4 bits against float32."""
    run, name = bench.run, str(bench.run)
    if run is None:
        run, name = bench.folder / "run", "edge-nano after 500 steps"
        python("-m", "sdgm_edge", "train", *TRAIN, "--out", str(run))
    bits = [flag for b in (32, 8, 4) for flag in ("--bits", str(b))]
    report = python(
        "-m",
        "sdgm_edge",
        "export",
        str(run),
        "--out",
        str(bench.folder / "exported"),
        *bits,
        "--force",
        "--json",
    )
    variants = json.loads(report)["variants"]
    fp32, int8, q4 = (variants[variant]["accuracy"] for variant in ("fp32", "int8", "q4"))
    parity = variants["fp32"]["parity"]["logits"]
    yield Figure.at_most("accuracy", "float32 against torch, max |Δ logit| over 512 steps", parity, "", 1e-4)
    what = f"{name}, word perplexity of {fp32['num_tokens']} held-out tokens"
    yield Figure("accuracy", what, fp32["word_perplexity"], "")
    more = 100 * int8["perplexity_increase"]
    yield Figure.at_most("accuracy", "int8, word perplexity", more, "% more", 1)
    yield Figure("accuracy", "int8, loss", 100 * int8["loss_increase"], "% more")
    what = f"4 bits ({len(variants['q4']['at_8_bits'])} matrices in 8), loss"
    yield Figure.at_most("accuracy", what, 100 * q4["loss_increase"], "% more", 1)


def speed(bench: Bench) -> Iterator[Figure]:
    """How fast edge-small generates, and what of it is the runtime's own."""
    cost = decoding(bench.generator("edge-small"))
    name = "edge-small int8 through Generator.stream, temperature 0.8, top_p 0.95"
    yield Figure.at_least("speed", name, 1 / cost.wall, "tokens/s", 2000)
    yield Figure("speed", "the same by processor time", 1 / cost.cpu, "tokens/s")
    share = 100 * cost.own_wall / cost.wall
    yield Figure.at_most("speed", "the runtime's own part (outside session.run)", share, "% of a token", 15)
    yield Figure("speed", "the same by processor time", 100 * cost.own_cpu / cost.cpu, "% of a token")
    yield Figure("speed", "that is", 1e6 * cost.own_cpu, "µs a token")
    in_4_bits = decoding(load(bench.write("edge-small-q4", preset("edge-small"), bits=4)))
    yield Figure.at_least("speed", "edge-small in 4 bits, generating", 1 / in_4_bits.wall, "tokens/s", 4000)
    yield Figure("speed", "the same by processor time", 1 / in_4_bits.cpu, "tokens/s")


def flat(bench: Bench) -> Iterator[Figure]:
    """Whether a token costs the same after a long text, and what memory that leaves behind."""
    generator = bench.generator("edge-small")

    def generate(session: Session, seed: int) -> None:
        drain(generator.stream(None, session=session, seed=seed, max_new_tokens=BLOCK))

    near, far = generator.session(), generator.session()
    near.feed("The")
    while far.position < DEEP:
        far.feed(bench.text)
    _ = near.logits, far.logits  # run here, not within the first block
    blocks: dict[str, list[Spent]] = {"near": [], "far": []}
    for seed in range(BLOCKS):  # in turns, so that a change of the machine's speed meets both
        for name, session in (("near", near.fork()), ("far", far.fork())):
            blocks[name].append(spent(partial(generate, session, seed)))
    near_wall, far_wall = (median(s.wall for s in blocks[name]) for name in ("near", "far"))
    near_cpu, far_cpu = (median(s.cpu for s in blocks[name]) for name in ("near", "far"))
    yield Figure("flat", "edge-small int8 at the start", BLOCK / near_wall, "tokens/s")
    share = 100 * near_wall / far_wall
    yield Figure.at_least("flat", f"after {DEEP:,} tokens, of that", share, "%", 97)
    yield Figure("flat", "the same by processor time", 100 * near_cpu / far_cpu, "%")
    memory = json.loads(python("-c", MEMORY, str(bench.bundle("edge-small")), str(DEEP)))
    name = f"memory more, after {DEEP:,} tokens of one stream"
    yield Figure.at_most("flat", name, memory["one stream"], "MB", 1)
    name = f"memory more, after {DEEP // 5:,} in streams of {DEEP // 100:,}"
    yield Figure("flat", name, memory["streams"], "MB")
    yield Figure("flat", "memory of the process that generates, in all", memory["all"], "MB")


def prompt(bench: Bench) -> Iterator[Figure]:
    """How much quicker a prompt is read than text is generated."""
    for name in EDGE:
        generator = bench.generator(name)
        count = read(generator, bench.text)
        reading, generating = [], []
        for seed in range(11):  # in turns
            reading.append(spent(partial(read, generator, bench.text)))
            stream = generator.stream("The", seed=seed, max_new_tokens=4 * BLOCK)
            generating.append(spent(partial(drain, stream)))
        wall, cpu = (median(column) / count for column in zip(*reading, strict=True))
        token = [median(column) / (4 * BLOCK) for column in zip(*generating, strict=True)]
        yield Figure("prompt", f"{name} int8, reading", 1 / wall, "tokens/s")
        what = f"{name} int8, reading to generating"
        yield Figure.at_least("prompt", what, token[0] / wall, "times", 10)
        yield Figure("prompt", "the same by processor time", token[1] / cpu, "times")


def sessions(bench: Bench) -> Iterator[Figure]:
    """What a session weighs, and what it costs to fork it and to take tokens back."""
    path = bench.folder / "s.state"
    for name in PRESETS:
        generator = bench.generator(name)
        session = generator.session()
        session.feed(bench.text)
        drain(generator.stream(None, session=session, max_new_tokens=32, seed=1))
        session.save(path)
        size = path.stat().st_size / 1024
        yield Figure.at_most("sessions", f"{name} int8, file", size, "KB", 64)
        yield Figure.at_most("sessions", f"{name} int8, fork", microseconds([session.fork] * 200), "µs", 100)
        twins = [session.fork() for _ in range(200)]
        back = microseconds(partial(twin.rewind, 5) for twin in twins)
        yield Figure.at_most("sessions", f"{name} int8, rewind by 5", back, "µs", 100)


def presets(bench: Bench) -> Iterator[Figure]:
    """The presets side by side, as `sdgm-edge bench` measures them."""
    for name in EDGE:
        path = bench.bundle(name)
        speed = measure_speed(path, depths=(0,))
        reading, generating, *_ = speed.tests
        fresh = speed.footprint
        for what, measured, unit in (
            ("bundle", sum(file.stat().st_size for file in path.iterdir()) / 1e6, "MB"),
            ("state", fresh.state / 1024, "KB"),
            ("load", 1e3 * fresh.seconds.load, "ms"),
            ("first token of a new process", 1e3 * fresh.seconds.first_token, "ms"),
            ("reading", reading.tokens_per_second, "tokens/s"),
            ("generating, without sampling", generating.tokens_per_second, "tokens/s"),
            ("the same by processor time", generating.tokens_per_cpu_second, "tokens/s"),
        ):
            yield Figure("presets", f"{name} int8, {what}", measured, unit)


def prepared(bench: Bench) -> Iterator[Figure]:
    """What a process costs whose weights are mapped from disk in their prepared form."""
    bundle = bench.bundle("edge-small")
    for mapped in (False, True):
        [cost] = measure_footprint(bundle, providers="cpu", threads=1, prepared=mapped).variants
        imports, last = cost.stages["imports"].anonymous, cost.stages["after_tokens"].anonymous
        name = f"edge-small int8{', prepared' if mapped else ''}"
        figures = [("first token of a new process", 1e3 * cost.seconds.first_token, "ms", 150)]
        if imports is not None and last is not None:
            figures += [("anonymous memory beyond the imports", (last - imports) / 1e6, "MB", 6)]
        for what, measured, unit, limit in figures:
            if mapped:
                yield Figure.at_most("prepared", f"{name}, {what}", measured, unit, limit)
            else:
                yield Figure("prepared", f"{name}, {what}", measured, unit)
        yield Figure("prepared", "the same by processor time", 1e3 * cost.seconds.first_token_cpu, "ms")


def atoms(bench: Bench) -> Iterator[Figure]:
    """What a bundle costs whose strongest atoms alone are loaded; `atoms.py` tells what it loses."""
    path = bench.bundle("edge-small")
    gens = [Generator.load(path, providers="cpu", threads=1, atoms=count) for count in ATOMS]
    rates = [decoded for decoded, _ in speeds(gens, gens[0].encode(bench.text))]
    sizes = [gen.bundle.size(gen.variant) / 1e6 for gen in gens]
    for gen, size, rate in zip(gens, sizes, rates, strict=True):
        yield Figure("atoms", f"edge-small int8 with {gen.atoms} atoms, graph", size, "MB")
        yield Figure("atoms", "a token of it, without sampling", rate, "tokens/s")
    yield Figure.at_most("atoms", "the smaller graph", 100 * sizes[1] / sizes[0], "% of the whole", 90)
    yield Figure.at_least("atoms", "its speed", 100 * rates[1] / rates[0], "% of the whole's", 110)


def large(bench: Bench) -> Iterator[Figure]:
    """23 million parameters, 32,000 words: one core's processor time, and what of it the head takes."""
    for bits, name in ((8, "int8"), (4, "4 bits")):
        body = without_head(LARGE, bits)
        for screened in (False, True):
            path = bench.write(f"large-{bits}-{screened}", LARGE, bits, screened)
            generator = load(path)
            model = f"{name}, head {'screened' if screened else 'read whole'}"
            size = (path / VARIANTS[bits].file).stat().st_size
            yield Figure("large", f"{model}, graph", size / 1e6, "MB")
            for how, sampling in (("greedy", {"temperature": 0}), ("top_p 0.95", {})):
                cost = decoding(generator, **sampling)
                what = f"{model}, {how}"
                rate = 1 / cost.cpu
                if screened:
                    yield Figure.at_least("large", what, rate, "tokens/s", 2100)
                else:
                    yield Figure("large", what, rate, "tokens/s")
                for part, seconds in (
                    ("body", body),
                    ("head", cost.cpu - cost.own_cpu - body),
                    ("sampling and text", cost.own_cpu),
                ):
                    yield Figure("large", f"{what}: {part}", 1e6 * seconds, "µs a token")


SECTIONS: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    section.__name__: section
    for section in (accuracy, speed, flat, prompt, sessions, presets, prepared, atoms, large)
}


# The report


def python(*arguments: str) -> str:
    """Run Python in a process of its own; its stdout."""
    done = subprocess.run(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=True,
    )
    return done.stdout


def measure(names: list[str], run: Path | None) -> list[Figure]:
    """Run sections, telling on stderr which."""
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), run)
        for name in names:
            print(f"{name} …", file=sys.stderr, flush=True)
            with nullcontext() if name == "accuracy" else pinned(1):  # that one trains, on all cores
                figures += list(SECTIONS[name](bench))
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure what is promised, on this machine.")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"sections, of {', '.join(SECTIONS)}")
    parser.add_argument("--run", type=Path, help="a trained run, for the section accuracy")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"--only: no section {unknown[0]!r}; known: {', '.join(SECTIONS)}")
    here = described()
    begun = time.perf_counter()
    figures = measure(names, options.run)
    seconds = round(time.perf_counter() - begun)
    if options.json:
        report = {"machine": here, "seconds": seconds, "figures": [asdict(figure) for figure in figures]}
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return
    print(", ".join(f"{name} {value}" for name, value in here.items()), f"· {seconds} s")
    for name in names:
        rows = [
            (f.name, f.measured, f.unit, f.promise, "" if f.kept is None else f.kept)
            for f in figures
            if f.section == name
        ]
        print_table((SECTIONS[name].__doc__ or name, "measured", "", "promise", "kept"), rows)


if __name__ == "__main__":
    main()
