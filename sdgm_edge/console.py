"""What the commands share in talking to a person or to a machine.

rich is imported where something is drawn: a command that writes text alone starts without it.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

    from .training import Progress as TrainingProgress

_PLAIN_WIDTH = 200  # where stdout is no terminal, tables are not folded
_PATIENCE = 1.0  # seconds in which a person needs no bar


def print_json(result: object) -> None:
    """A result for a machine: one JSON document on stdout, in ASCII, so that no encoding can spoil it."""
    print(json.dumps(result, indent=2, allow_nan=False))


def print_json_line(result: object) -> None:
    """One result of several for a machine: a JSON document in one line."""
    print(json.dumps(result, allow_nan=False), flush=True)


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None
) -> None:
    """A table for a person, on stdout; numbers to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        numeric = any(isinstance(row[number], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*map(format_value, row))
    Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, markup=False, emoji=False).print(table)


def print_markdown(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None
) -> None:
    """The same table as Markdown, with an empty line after it."""
    sides = [
        "--:" if any(isinstance(row[i], int | float) for row in rows) else "---" for i in range(len(columns))
    ]
    lines = [columns, sides, *(tuple(map(format_value, row)) for row in rows)]
    told = [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]
    print("\n".join([*([f"**{title}**", ""] if title else []), *told, ""]))


def print_record(record: Mapping[str, object], *, title: str | None = None) -> None:
    """One result for a person: a table of names and values."""
    print_table(("", "value"), list(record.items()), title=title)


def format_value(value: object) -> str:
    """A value as a person reads it: 1,234,567; 12.35; 0.001235."""
    match value:
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float() if abs(value) >= 1:
            return f"{value:,.2f}"
        case float():
            return f"{value:.4g}"
        case None:
            return "–"
    return str(value)


def given(**options: object) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "bf16", "float32")
UNTOLD = "not told here"
"""What stands in a table for a figure that this machine does not tell."""


def check_choice(flag: str, got: str, choices: Sequence[str]) -> None:
    """Raise UsageError for what is none of the choices."""
    from sdgm_edge.runtime import UsageError

    if got not in choices:
        raise UsageError(f"{flag}: expected one of {', '.join(choices)}, got {got!r}; write one of these")


def check_one_form(markdown: bool, as_json: bool) -> None:
    """Raise UsageError where a result is to be both Markdown and JSON."""
    from sdgm_edge.runtime import UsageError

    if markdown and as_json:
        raise UsageError("--markdown and --json both say how to print: leave one out")


def cache_folder() -> Path:
    """Where token shards are kept between runs, as the runtime keeps what it prepares."""
    from sdgm_edge.runtime import cache_folder

    return cache_folder()


def split_providers(text: str) -> str | list[str]:
    """Read "cpu", or several with commas."""
    return text.split(",") if "," in text else text


@contextmanager
def training_progress(name: object) -> "Iterator[Callable[[TrainingProgress], None]]":
    """A live line on stderr for training; a plain line every half minute where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} {task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    interactive = sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), disable=not interactive) as bars:
        task = bars.add_task(str(name), total=None, figures="")
        told = 0.0

        def show(now: "TrainingProgress") -> None:
            nonlocal told
            known = []  # of the first steps not all is
            if now.loss is not None:
                known.append(f"loss {now.loss:.3f}")
            if now.tokens_per_second:
                known.append(f"{now.tokens_per_second:,.0f} tokens/s")
            if now.valid_word_perplexity is not None:
                known.append(f"validation word perplexity {now.valid_word_perplexity:.1f}")
            figures = " · ".join(known)
            bars.update(task, completed=now.step, total=now.total_steps, figures=figures)
            if not interactive and (time.monotonic() - told > 30 or now.step == now.total_steps):
                told = time.monotonic()
                print(f"{name}: step {now.step}/{now.total_steps} · {figures}", file=sys.stderr, flush=True)

        yield show


@contextmanager
def text_progress() -> "Iterator[_TextProgress]":
    """A bar on stderr for work on bytes of text (`shards.Progress`); nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as bars:
        yield _TextProgress(bars)


class _TextProgress:
    def __init__(self, bars: "Progress") -> None:
        self._bars = bars
        self._task = bars.add_task("", total=None)

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that of `total` bytes `done` are done."""
        self._bars.update(self._task, description=what, completed=done, total=total)


@contextmanager
def reading_progress() -> Iterator[Callable[[int, int | None], None]]:
    """A bar on stderr for tokens that are read, if that takes long and stderr is a terminal; then it goes."""
    begun, shown = time.monotonic(), ExitStack()
    bar: Progress | None = None

    def show(done: int, total: int | None) -> None:
        nonlocal bar
        if done == total:
            shown.close()
        elif bar is not None:
            bar.update(bar.task_ids[0], completed=done, total=total)
        elif sys.stderr.isatty() and time.monotonic() - begun > _PATIENCE:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"))
            console = Console(stderr=True)
            bar = shown.enter_context(
                Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
            )
            bar.add_task("", completed=done, total=total)

    with shown:
        yield show
