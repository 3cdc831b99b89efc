"""The command that measures speed on a device; no torch. What `cli.py` says of commands holds here too."""

import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import console
from .commands_device import Atoms, Provider, newest_bundle

if TYPE_CHECKING:
    from sdgm_edge.runtime import Speed, VariantFootprint

DISTURBED = 0.1
"""Where the clock tells so much more than the processor's time, the reader is told."""
_MODEL = ("model", "size MB", "params M", "backend", "threads")


def bench(
    bundles: Annotated[
        list[Path] | None, typer.Argument(help="Bundles, folders or *.sdgm. Default: the newest.")
    ] = None,
    variants: Annotated[
        list[str] | None,
        typer.Option("--variant", help="Such as int8; may be given again. Default: each bundle's own."),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", "-p", help="Tokens of the prompt that is read: pp512.")
    ] = 512,
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="Tokens to generate: tg128.")] = 128,
    depths: Annotated[
        str, typer.Option("--depths", "-d", help="Tokens before those, with commas; k is 1000.")
    ] = "0,1k,16k,100k",
    repeats: Annotated[int, typer.Option("--repeats", "-r", help="Repetitions, and fresh processes.")] = 5,
    threads: Annotated[str, typer.Option("--threads", "-t", help="Threads, with commas: 1,2.")] = "1",
    providers: Provider = "auto",
    prepared: Annotated[
        bool, typer.Option("--prepared", help="With weights packed for this CPU; the first time, packs them.")
    ] = False,
    atoms: Atoms = None,
    output: Annotated[str, typer.Option("--output", "-o", help="table, md, json or csv.")] = "table",
    as_json: Annotated[bool, typer.Option("--json", help="The same as -o json.")] = False,
) -> None:
    """Measure how fast bundles are here: reading, generating at several depths, load, first token, memory."""
    from sdgm_edge.runtime import UsageError, check_threads, measure_speed, read_bundle

    if output not in _REPORTS:
        raise UsageError(f"--output: expected one of {', '.join(_REPORTS)}, got {output!r}; -o md is usual")
    if as_json and output != "table":
        raise UsageError(f"--json is -o json: expected it alone, got --output {output} too; leave one out")
    counts, tested = _numbers("--threads", threads), _numbers("--depths", depths)
    for count in counts:
        check_threads(count)
    paths = bundles or [newest_bundle()]
    for found in map(read_bundle, paths):  # one that is missing is told before others are measured
        for name in variants or (None,):
            found.variant(name)
    measured = [
        measure_speed(
            path,
            variant,
            threads=count,
            prompt_tokens=prompt_tokens,
            tokens=tokens,
            depths=tested,
            repeats=repeats,
            providers=console.split_providers(providers),
            prepared=prepared,
            atoms=atoms,
            progress=lambda message: print(message, file=sys.stderr, flush=True),
        )
        for path in paths
        for variant in dict.fromkeys(variants or (None,))
        for count in counts
    ]
    _REPORTS["json" if as_json else output](measured)


def _numbers(flag: str, text: str) -> list[int]:
    """Read "0,1k,16k"."""
    from sdgm_edge.runtime import UsageError

    try:
        parts = [part.strip().lower() for part in text.split(",")]
        numbers = [int(part.removesuffix("k")) * (1000 if part.endswith("k") else 1) for part in parts]
    except ValueError:
        raise UsageError(f"{flag}: expected numbers such as 1,2k, got {text!r}; write them so") from None
    return list(dict.fromkeys(numbers))


def _print(measured: Sequence["Speed"], show: Callable[..., None]) -> None:
    """The report for a person: the machine, the tests, the fresh processes, and what to know of them."""
    machine = measured[0].machine
    load = "" if machine["load average"] is None else f", load average {machine['load average']:.2f}"
    print(
        f"{machine['cpu']}, {machine['cores']} cores{load}, {machine['system']}, Python {machine['python']}, "
        f"ONNX Runtime {machine['onnxruntime']}; {'; '.join(dict.fromkeys(map(_kept, measured)))}\n"
    )
    show(
        (*_MODEL, "test", "t/s", "±", "t/s by CPU time", "µs/token"),
        [
            (
                *_model(s),
                test.name,
                *map(round, (test.tokens_per_second, test.spread, test.tokens_per_cpu_second)),
                1e6 / test.tokens_per_second,
            )
            for s in measured
            for test in s.tests
        ],
        title=f"medians of {len(measured[0].tests[0].times)}; ± half of what lies from slowest to quickest",
    )
    columns = ("load ms", "first token ms", "CPU ms", "fastest", "slowest", "peak RSS MB", "state bytes")
    show(
        (*_MODEL, *columns),
        [(*_model(s), *_fresh(s.footprint)) for s in measured],
        title="fresh processes with warm files, medians; first token: from the start of the process",
    )
    for s in measured:
        if s.disturbance > DISTURBED:
            print(
                f"{s.name} {s.variant}: the clock told {s.disturbance:.0%} more than the processor's time: "
                "other work shares the CPU, so go by CPU time"
            )
    if any(s.threads > 1 for s in measured):
        print("CPU time is that of all threads together, waiting for each other included")


def _model(speed: "Speed") -> tuple[object, ...]:
    """The columns that say what was measured."""
    params = None if speed.num_parameters is None else speed.num_parameters / 1e6
    name = f"{speed.name} {speed.variant}{f', {speed.atoms} atoms' if speed.atoms else ''}"
    return name, speed.footprint.file / 1e6, params, speed.provider, speed.threads


def _fresh(footprint: "VariantFootprint") -> tuple[object, ...]:
    """The columns that fresh processes tell."""
    seconds, peak = footprint.seconds, footprint.peak
    first = (seconds.first_token, seconds.first_token_cpu, seconds.fastest, seconds.slowest)
    return (
        *(1e3 * s for s in (seconds.load, *first)),
        console.UNTOLD if peak is None else peak / 1e6,
        footprint.state,
    )


def _kept(speed: "Speed") -> str:
    """Where it ran."""
    cpus = f"kept to CPU {', '.join(map(str, speed.cpus))}"
    threads = f"{speed.threads} thread{'s' if speed.threads > 1 else ''}"
    return f"{threads} {cpus if speed.cpus else 'not kept to CPUs, which cannot be here'}"


def _print_csv(measured: Sequence["Speed"]) -> None:
    """One line for each test, with all that is told of its bundle and of the machine."""
    lines = []
    for speed in measured:
        told = speed.to_dict()
        tests, fresh, machine = told.pop("tests"), told.pop("footprint"), told.pop("machine")
        told["cpus"] = " ".join(map(str, speed.cpus))
        told |= {name: fresh[name] for name in ("file", "state", "peak")}
        told |= {name: fresh["seconds"][name] for name in ("load", "first_token", "first_token_cpu")}
        for test in tests:
            figures = {name: value for name, value in test.items() if not isinstance(value, list)}
            lines.append({**told, "test": figures.pop("name"), **figures, **machine})
    writer = csv.DictWriter(sys.stdout, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)


_REPORTS: dict[str, Callable[[Sequence["Speed"]], None]] = {
    "table": lambda measured: _print(measured, console.print_table),
    "md": lambda measured: _print(measured, console.print_markdown),
    "json": lambda measured: console.print_json([speed.to_dict() for speed in measured]),
    "csv": _print_csv,
}
