"""What longer documents and larger vocabularies cost, and what they give.

Every model has its size chosen once, at the first window and the first vocabulary. Then the window grows, up
to what a document holds, with the vocabulary left alone; and the vocabulary grows, learnt from the same text
each time, with the window left alone. Nothing else changes: the layers stay as they are, and so does the
number of tokens in a batch, which is that of the longest window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdgm_edge.compare import Outcome, Terms, compare, entry_config
from sdgm_edge.config import CorpusConfig
from sdgm_edge.inference import TOKENS
from sdgm_edge.runtime import ConfigError, CorpusError
from sdgm_edge.shards import Corpus, corpus_of
from sdgm_edge.sources import open_documents
from sdgm_edge.tokenization import LARGEST_BPE, SMALLEST_BPE


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How far, and how long each model is trained."""

    corpus: CorpusConfig
    windows: tuple[int, ...] = (128, 1024, 4096, 16384)
    vocabularies: tuple[int, ...] = (2048, 8192, 32768, 65536)
    num_parameters: int = 2_000_000
    """With the first vocabulary."""
    minutes: float = 2.0
    """For each training; 0 where `max_steps` says how long."""
    max_steps: int = 0
    inference: bool = True
    """Whether decoding is measured, on an int8 graph."""
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.corpus.tokenizer != "bpe":
            raise ConfigError(
                f"scale: expected a bpe tokenizer, whose size can be chosen, got {self.corpus.tokenizer}"
            )
        if not self.windows or min(self.windows) < 1:
            raise ConfigError(f"scale: expected windows of at least 1 token, got {list(self.windows)}")
        least, most = SMALLEST_BPE, LARGEST_BPE
        if not self.vocabularies or not all(least <= size <= most for size in self.vocabularies):
            raise ConfigError(
                f"scale: expected vocabularies of {least} to {most}, got {list(self.vocabularies)}"
            )
        if (self.minutes > 0) == (self.max_steps > 0):
            raise ConfigError(
                f"scale: expected minutes or max_steps, got {self.minutes:g} and {self.max_steps}"
            )

    @property
    def settings(self) -> list[tuple[int, int]]:
        """Windows and vocabularies that go together."""
        first, smallest = self.windows[0], self.vocabularies[0]
        pairs = [(w, smallest) for w in self.windows] + [(first, v) for v in self.vocabularies]
        return list(dict.fromkeys(pairs))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleRow:
    """What came of one model with one window and one vocabulary. None is what was not reached."""

    entry: str
    window: int
    vocab_size: int
    status: str
    """That of a trial, or `impossible`."""
    reason: str | None = None
    num_parameters: int | None = None
    bytes_per_token: float | None = None
    """Of the training text: with more of them, a token says more."""
    tokens_per_second: float | None = None
    """In training."""
    peak_memory_bytes: int | None = None
    """Of the training process."""
    decode_per_second: float | None = None
    """Tokens, at the end of a window, by the int8 graph on one thread."""
    decode_peak_bytes: int | None = None
    """Of the process that decodes."""
    steps: int | None = None
    word_perplexity: float | None = None
    bits_per_byte: float | None = None


COLUMNS: dict[str, tuple[str, float]] = {
    "model": ("entry", 0),
    "window": ("window", 0),
    "vocabulary": ("vocab_size", 0),
    "parameters, M": ("num_parameters", 1e-6),
    "bytes a token": ("bytes_per_token", 1),
    "steps": ("steps", 0),
    "training tokens/s": ("tokens_per_second", 1),
    "training peak, MB": ("peak_memory_bytes", 1e-6),
    "decoded tokens/s": ("decode_per_second", 1),
    "decoding peak, MB": ("decode_peak_bytes", 1e-6),
    "word perplexity": ("word_perplexity", 1),
    "bits per byte": ("bits_per_byte", 1),
    "status": ("status", 0),
}
"""Title, field and unit; 0 for what has none."""


def probe_scale(
    entries: Sequence[str],
    scale: Scale,
    folder: Path,
    cache: Path,
    progress: Callable[[str], None] = lambda message: None,
) -> list[ScaleRow]:
    """Train every entry in every setting and measure it; what is in `folder` already is not done again.

    A vocabulary that the text does not give, or a window that it does not hold, is a row that says so.

    Raises:
        ConfigError: an entry cannot be read, or has no such size; before anything is trained.
        CorpusError: a text cannot be read.
    """
    for entry in entries:
        entry_config(entry, _terms(scale, scale.corpus, 1), seed=0)
    for sources in (scale.corpus.train, scale.corpus.valid):
        open_documents(sources or ["pydoc"], cache)  # what cannot be read is no row
    rows: list[ScaleRow] = []
    for window, size in scale.settings:
        progress(f"window {window:,}, vocabulary {size:,}")
        rows.extend(_setting(entries, scale, window, size, folder, cache, progress))
    return rows


def cells(rows: Sequence[ScaleRow]) -> list[list[Any]]:
    """Return the rows of a table with the titles of `COLUMNS`."""
    return [
        [
            value * unit if (value := getattr(row, name)) is not None and unit else value
            for name, unit in COLUMNS.values()
        ]
        for row in rows
    ]


def _setting(
    entries: Sequence[str],
    scale: Scale,
    window: int,
    size: int,
    folder: Path,
    cache: Path,
    progress: Callable[[str], None],
) -> Iterator[ScaleRow]:
    wanted = replace(scale.corpus, vocab_size=size)
    batch_size = max(1, max(scale.windows) // window)
    try:
        corpus = corpus_of(wanted, cache)
        if (have := len(corpus.train)) < (needed := batch_size * window + 1):
            raise CorpusError(f"the text has {have} tokens, and a batch of such windows needs {needed}")
    except CorpusError as reason:
        for entry in entries:
            yield ScaleRow(
                entry=entry, window=window, vocab_size=size, status="impossible", reason=str(reason)
            )
        return
    changed = {
        entry: f"{entry}{'+' if ':' in entry else ':'}window={window}+vocab_size={size}" for entry in entries
    }
    context = max(0, window - TOKENS)  # what is decoded ends where the window does
    outcomes = compare(
        list(changed.values()),
        _terms(scale, wanted, batch_size),
        folder,
        cache,
        contexts=(context,) if scale.inference else (),
        progress=progress,
    )
    for entry, outcome in zip(entries, outcomes, strict=True):
        yield _row(entry, window, size, outcome, context, corpus)


def _terms(scale: Scale, corpus: CorpusConfig, batch_size: int) -> Terms:
    """Return the terms of a training; sizes are chosen at the first window and vocabulary."""
    training = {"batch_size": batch_size, "max_steps": scale.max_steps}
    return Terms(
        corpus=corpus,
        vocab_size=scale.vocabularies[0],
        num_parameters=scale.num_parameters,
        training=training,
        window=scale.windows[0],
        minutes=scale.minutes,
        device=scale.device,
    )


def _row(entry: str, window: int, size: int, outcome: Outcome, context: int, corpus: Corpus) -> ScaleRow:
    result, inference = outcome.result, outcome.inference
    cost = inference.costs.get(context) if inference else None
    return ScaleRow(
        entry=entry,
        window=window,
        vocab_size=size,
        status=result.status,
        reason=result.reason or (inference.reason if inference else None),
        num_parameters=result.num_parameters,
        bytes_per_token=corpus.train.num_bytes / len(corpus.train),
        tokens_per_second=result.tokens_per_second,
        peak_memory_bytes=result.peak_memory_bytes,
        decode_per_second=cost.tokens_per_second if cost else None,
        decode_peak_bytes=cost.peak if cost else None,
        steps=result.steps,
        word_perplexity=result.word_perplexity,
        bits_per_byte=result.bits_per_byte,
    )
