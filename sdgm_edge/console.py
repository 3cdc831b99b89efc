"""What the commands share in talking to a person or to a machine."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

_PLAIN_WIDTH = 200  # where stdout is no terminal, tables are not folded


def print_json(result: object) -> None:
    """A result for a machine: one JSON document on stdout."""
    print(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None
) -> None:
    """A table for a person, on stdout; numbers to the right."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        numeric = any(isinstance(row[number], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*map(format_value, row))
    Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, markup=False).print(table)


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


@contextmanager
def text_progress() -> "Iterator[_TextProgress]":
    """A bar on stderr for work on bytes of text (`shards.Progress`); nothing where stderr is no terminal."""
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
    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task = bars.add_task("", total=None)

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that of `total` bytes `done` are done."""
        self._bars.update(self._task, description=what, completed=done, total=total)
