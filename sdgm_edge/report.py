"""A comparison as a report: Markdown, JSON, and one HTML page that opens from disk, plots and all."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdgm_edge.compare import Outcome, Terms, summarize
from sdgm_edge.models import SIZE_TOLERANCE
from sdgm_edge.runtime import RunError, replacing
from sdgm_edge.shards import Corpus

NOTES = (
    "Word perplexity and bits per byte compare between tokenizers, token perplexity does not.",
    "Every token of the validation text is scored once, from its first to its last, state carried along; "
    "models that read in windows (gpt2, linformer, fnet) begin each window afresh, all but their pointer; "
    "they have a second figure, for windows that overlap by half, at twice the cost.",
    "± is the sample standard deviation over seeds. Training tokens/s is the median over steps, validation "
    "left out. Peak memory is that of the training process, validation included, or of its GPU.",
    "Cosine is between an embedding and its reconstruction x̂, over the validation text; SDGMs have one.",
)
INFERENCE_NOTES = (
    "Inference is that of the int8 graph in ONNX Runtime, in fresh processes on one thread: tokens/s of the "
    "processor's time, decoded one by one and greedily after so many tokens; the most resident memory of a "
    "process that read so many; the time from starting a process until its first token.",
    "† beyond the window that the model was trained with: it decodes as with a longer one, its positions "
    "repeated, and the perplexity does not hold there.",
)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table."""

    title: str
    figure: str
    scale: float
    digits: int
    context: int | None = None
    """Of what is measured after one."""


COLUMNS = (
    Column("parameters, M", "num_parameters", 1e-6, 2),
    Column("word perplexity", "word_perplexity", 1, 1),
    Column("the same, windows overlapping", "overlapping_word_perplexity", 1, 1),
    Column("bits per byte", "bits_per_byte", 1, 3),
    Column("token perplexity", "token_perplexity", 1, 1),
    Column("training tokens/s", "tokens_per_second", 1, 0),
    Column("peak memory, MB", "peak_memory_bytes", 1e-6, 0),
    Column("cosine", "cosine", 1, 3),
    Column("steps", "steps", 1, 0),
)
GRAPH_COLUMNS = (
    Column("int8 graph, MB", "graph_bytes", 1e-6, 2),
    Column("first token, ms", "first_token", 1e3, 0),
)


@dataclass(frozen=True, slots=True)
class Table:
    """Some of the figures, one row for each entry."""

    title: str
    titles: list[str]
    """Of its columns."""
    cells: list[list[str]]

    def markdown(self) -> str:
        """The table under a heading of its own."""
        lines = [f"## {self.title}", "", f"| {' | '.join(self.titles)} |"]
        lines += ["|---" + "|--:" * (len(self.titles) - 1) + "|"]
        return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in self.cells)]) + "\n"

    def html(self) -> str:
        """The same for a page."""
        head = "".join(f"<th>{html.escape(title)}</th>" for title in self.titles)
        rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in cells) for cells in self.cells)
        body = "".join(f"<tr>{cells}</tr>\n" for cells in rows)
        title = f"<h2>{html.escape(self.title)}</h2>\n"
        return f"{title}<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>\n"


@dataclass(frozen=True, slots=True)
class Report:
    """What was compared, how, where, and what came of it."""

    about: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def tables(self) -> list[Table]:
        """What training gave, and what inference costs where that was measured."""
        trained = [[row["entry"], *(_cell(row, c) for c in COLUMNS), _status(row)] for row in self.rows]
        tables = [Table("Training", ["model", *(c.title for c in COLUMNS), "status"], trained)]
        if any(row["inference"] for row in self.rows):
            columns = self._inference_columns()
            measured = [[row["entry"], *(_cell(row, c) for c in columns)] for row in self.rows]
            tables.append(Table("Inference", ["model", *(c.title for c in columns)], measured))
        return tables

    @property
    def notes(self) -> list[str]:
        """What the figures mean."""
        return [*NOTES, *(INFERENCE_NOTES if len(self.tables) > 1 else ()), *self._other_sizes()]

    def _other_sizes(self) -> list[str]:
        """Tell which entries are larger or smaller than the rest, by settings of their own."""
        asked = self.about["parameters asked for"]
        shares = [(row["entry"], (row["num_parameters"] or asked) / asked - 1) for row in self.rows]
        off = ", ".join(f"{entry} ({share:+.0%})" for entry, share in shares if abs(share) > SIZE_TOLERANCE)
        return [f"Not of the size that was asked for, by their own settings: {off}."] if off else []

    def _inference_columns(self) -> list[Column]:
        contexts = sorted({context for row in self.rows for context in row["contexts"]})
        speeds = [Column(f"tokens/s at {c:,}", f"decode_at_{c}", 1, 0, c) for c in contexts]
        return [
            *GRAPH_COLUMNS,
            *speeds,
            *(Column(f"MB at {c:,}", f"peak_at_{c}", 1e-6, 0, c) for c in contexts),
        ]

    def markdown(self) -> str:
        """The report for a README."""
        lines = ["# Comparison", "", *(f"- {name}: {value}" for name, value in self.about.items())]
        for table in self.tables:
            lines += ["", table.markdown().rstrip()]
        lines += ["", *(f"- {note}" for note in self.notes)]
        lines += ["", *(f"- **{row['entry']}**: {row['reason']}" for row in self.rows if row["reason"])]
        return "\n".join(lines).rstrip() + "\n"

    def json(self) -> str:
        """The report for a machine: means, spreads, and every single result."""
        return json.dumps({"about": self.about, "rows": self.rows}, indent=2, allow_nan=False) + "\n"

    def html(self) -> str:
        """The report as one page without a link to anything."""
        reasons = [f"{row['entry']}: {row['reason']}" for row in self.rows if row["reason"]]
        return page("Comparison", self.about, self.tables, draw_plots(self.rows), [*self.notes, *reasons])

    def write(self, folder: Path) -> None:
        """Leave `report.md`, `report.json` and `report.html` in a folder."""
        for name, text in (("md", self.markdown()), ("json", self.json()), ("html", self.html())):
            with replacing(folder / f"report.{name}", RunError) as file:
                file.write(text.encode())


def make_report(outcomes: Sequence[Outcome], terms: Terms, corpus: Corpus) -> Report:
    """Return the report of a comparison."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    about = {
        "text": ", ".join(Path(name).name for name in terms.corpus.train) or "pydoc",
        "training tokens": len(corpus.train),
        "validation tokens": len(corpus.valid),
        "validation sha256": corpus.valid.sha256,
        "tokenizer": f"{corpus.tokenizer.kind}, {corpus.tokenizer.vocab_size} tokens",
        "parameters asked for": terms.num_parameters,
        "protocol": terms.protocol,
        "pointer": (f"over {terms.pointer} tokens" if terms.pointer else "none")
        + ", unless an entry says otherwise",
        "training": ", ".join(f"{name} {value}" for name, value in (terms.training or {}).items())
        or "as the protocol says",
        "matched in": f"time, {terms.minutes:g} minutes each" if terms.minutes else "text",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {gpu}, "
        f"torch {torch.__version__}",
    }
    return Report(about, summarize(outcomes))


def _cell(row: dict[str, Any], column: Column) -> str:
    value, spread = row.get(column.figure), row.get(f"{column.figure}_spread")
    if value is None:
        return "–"
    text = f"{value * column.scale:,.{column.digits}f}"
    text = f"{text} ± {spread * column.scale:,.{column.digits}f}" if spread else text
    return f"{text} †" if column.context in row["beyond"] else text


def _status(row: dict[str, Any]) -> str:
    seeds = f"{row['finished']} of {row['seeds']} seeds finished" if row["seeds"] > 1 else ""
    return row["status"] if row["status"] == "finished" else f"**{row['status']}** {seeds}".strip()


def page(
    title: str,
    about: Mapping[str, Any],
    tables: Sequence[Table],
    plots: Sequence[tuple[str, bytes]],
    notes: Sequence[str],
) -> str:
    """Return a page of HTML with all that in it, its plots (titles and PNGs) too."""
    return PAGE.format(
        title=html.escape(title),
        about="".join(f"<li>{html.escape(f'{name}: {value}')}</li>" for name, value in about.items()),
        tables="".join(table.html() for table in tables),
        plots="".join(
            f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">\n'
            for name, png in plots
        ),
        notes="".join(f"<li>{html.escape(note)}</li>" for note in notes),
    )


def draw_plots(rows: Sequence[dict[str, Any]]) -> list[tuple[str, bytes]]:
    """Return titles and PNGs: perplexity while training, quality against speed, decoding by context."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plots = []
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for row in rows:
        curve = row["results"][0]["curve"]
        if curve:
            axes.plot(*zip(*curve, strict=True), "o-", markersize=3, label=row["entry"])
    axes.set(xlabel="step", ylabel="validation word perplexity", yscale="log")
    plots.append(("word perplexity while training", figure, axes))
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for row in rows:
        speed, quality = row["tokens_per_second"], row["word_perplexity"]
        if speed is not None and quality is not None:
            spread = row["word_perplexity_spread"] or 0.0
            axes.errorbar(speed, quality, yerr=spread, fmt="o", label=row["entry"])
    axes.set(xlabel="training tokens/s", ylabel="validation word perplexity")
    plots.append(("quality against speed", figure, axes))
    if any(row["contexts"] for row in rows):
        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        for row in rows:
            speeds = [row[f"decode_at_{context}"] for context in row["contexts"]]
            axes.plot(row["contexts"], speeds, "o-", markersize=3, label=row["entry"])
        axes.set(xlabel="tokens before", ylabel="decoding, tokens/s", yscale="log")
        axes.set_xscale("symlog", linthresh=128)
        plots.append(("decoding by context", figure, axes))
    pictures = []
    for title, figure, axes in plots:
        axes.set_title(title)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, ncols=math.ceil(len(rows) / 12))
        data = io.BytesIO()
        figure.savefig(data, dpi=110, metadata={"Software": None})
        pyplot.close(figure)
        pictures.append((title, data.getvalue()))
    return pictures


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .3rem .7rem; border-bottom: 1px solid #ccc; text-align: right; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
img {{ max-width: 100%; margin-top: 1rem; }}
li {{ color: #444; }}
</style></head><body>
<h1>{title}</h1>
<ul>{about}</ul>
{tables}{plots}<ul>{notes}</ul>
</body></html>
"""
