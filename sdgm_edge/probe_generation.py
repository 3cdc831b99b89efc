"""What a bundle generates, with its Gaussian mixture and without: how varied, how likely, how familiar.

Every way of sampling goes on from the same passages of held-out text, with the same seeds, for the same
number of tokens; the row *human* is how the passages themselves go on. A larger model, the *judge*, says how
likely each continuation is after its passage. Neither a likelier nor a more varied text is a better one: what
is good comes near the human row in all columns at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdgm_edge.diversity import distinct, loops, repetition, self_bleu, split_words
from sdgm_edge.run import is_run, load_run
from sdgm_edge.runtime import Generator, ParameterError, SamplingParams, Score, UsageError

HUMAN = "human"
MOST_CHARACTERS = 64
"""Of a token, on an average."""

Scorer = Callable[[str], Score]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is generated, and how."""

    num_texts: int = 64
    num_tokens: int = 128
    """Of each text, by the generating model's tokenizer."""
    prompt_words: int = 16
    strengths: tuple[float, ...] = (0.1, 0.3, 0.6)
    """η of the posterior mode; the prior mode has 1, the procedure of the paper."""
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_texts", 2), ("num_tokens", 1), ("prompt_words", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ParameterError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        SamplingParams(temperature=self.temperature, top_p=self.top_p)
        if wrong := [strength for strength in self.strengths if not 0 < strength <= 1]:
            raise ParameterError(f"strengths: expected numbers above 0 and up to 1, got {wrong[0]:g}")


class Passage(NamedTuple):
    """A place of a text."""

    prompt: str
    rest: str
    """How it goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The figures of one way of sampling. Those that need what is not there are None."""

    mode: str
    """`human`, `plain`, `posterior` or `prior`."""
    strength: float
    """η."""
    distinct_1: float
    distinct_2: float
    distinct_3: float
    self_bleu_4: float
    repetition_4: float
    loops: float
    word_perplexity: float | None
    """Of the continuations under the judge; None without one."""
    bits_per_byte: float | None
    """The same, where the judge knows every word."""
    typicality: float | None
    """Mean log p(c) of the model's own mixing vectors over the continuations; None without a mixture."""
    texts: tuple[str, ...]


COLUMNS = {
    "mode": "mode",
    "η": "strength",
    "distinct-1": "distinct_1",
    "distinct-2": "distinct_2",
    "distinct-3": "distinct_3",
    "self-BLEU-4": "self_bleu_4",
    "repeated 4-grams": "repetition_4",
    "loops": "loops",
    "judge's word perplexity": "word_perplexity",
    "judge's bits per byte": "bits_per_byte",
    "typicality": "typicality",
}
"""Title and field."""


def evaluate_generation(
    generator: Generator,
    text: str,
    settings: Settings,
    judge: Scorer | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> list[Row]:
    """Continue passages of a text in every way that the bundle knows, and return a row for each.

    Raises:
        UsageError: the text has too few passages.
    """
    passages = draw_passages(generator, text, settings)
    rows = []
    for mode, strength in _modes(generator, settings):
        progress(f"{mode}" + (f", η = {strength:g}" if strength else ""))
        texts = tuple(_continue(generator, passages, mode, strength, settings))
        rows.append(_row(generator, passages, mode, strength, texts, judge))
    return rows


def draw_passages(generator: Generator, text: str, settings: Settings) -> list[Passage]:
    """Return passages evenly spread over a text, each beginning with a word and ending before the next.

    Raises:
        UsageError: the text is too short.
    """
    words = [match.span() for match in re.finditer(r"\S+", text)]
    stride = len(words) // settings.num_texts
    says, passages = generator.vocabulary.following, []
    for i in range(settings.num_texts if stride > settings.prompt_words else 0):
        begin, end = words[i * stride][0], words[i * stride + settings.prompt_words - 1][1]
        room = text[end : words[(i + 1) * stride - 1][1]]
        ids = generator.encode(room[: MOST_CHARACTERS * settings.num_tokens])[: settings.num_tokens]
        if len(ids) == settings.num_tokens:
            rest = b"".join(says[token] for token in ids).decode(errors="ignore")
            passages.append(Passage(text[begin:end], rest))
    if len(passages) < settings.num_texts:
        raise UsageError(
            f"expected a text with {settings.num_texts} passages of {settings.prompt_words} words and "
            f"{settings.num_tokens} tokens, got {len(words)} words with {len(passages)}: give more text, "
            "or ask for fewer texts or shorter ones"
        )
    return passages


def _modes(generator: Generator, settings: Settings) -> Iterator[tuple[str, float]]:
    yield HUMAN, 0.0
    yield "plain", 0.0
    if generator.bundle.mixture is not None:
        yield from (("posterior", strength) for strength in settings.strengths)
        yield "prior", 1.0


def _continue(
    generator: Generator, passages: Sequence[Passage], mode: str, strength: float, settings: Settings
) -> Iterator[str]:
    for i, passage in enumerate(passages):
        if mode == HUMAN:
            yield passage.rest
            continue
        params = SamplingParams(
            max_new_tokens=settings.num_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            banned_tokens=tuple(generator.bundle.generation.end_tokens),  # all are to be equally long
            seed=settings.seed + i,
            prior_strength=strength,
            prior_mode="prior" if mode == "prior" else "posterior",
        )
        yield generator.generate(passage.prompt, **params.to_dict()).text


def _row(
    generator: Generator,
    passages: Sequence[Passage],
    mode: str,
    strength: float,
    texts: tuple[str, ...],
    judge: Scorer | None,
) -> Row:
    words = [split_words(text) for text in texts]
    judged = None if judge is None else _judged(passages, texts, judge)
    typicality = None
    if generator.bundle.mixture is not None:
        typicality = float(
            np.mean([_typicality(generator, p, t) for p, t in zip(passages, texts, strict=True)])
        )
    return Row(
        mode=mode,
        strength=strength,
        distinct_1=distinct(words, 1),
        distinct_2=distinct(words, 2),
        distinct_3=distinct(words, 3),
        self_bleu_4=self_bleu(words),
        repetition_4=repetition(words),
        loops=loops(words),
        word_perplexity=None if judged is None else judged.word_perplexity,
        bits_per_byte=None if judged is None or judged.has_unk else judged.bits_per_byte,
        typicality=typicality,
        texts=texts,
    )


def _judged(passages: Sequence[Passage], texts: Sequence[str], judge: Scorer) -> Score | None:
    """Return the score of all continuations after their passages, as one; None where they add no word."""
    before = [judge(passage.prompt) for passage in passages]
    after = [judge(passage.prompt + text) for passage, text in zip(passages, texts, strict=True)]

    def added(name: str) -> Any:
        return sum(getattr(b, name) - getattr(a, name) for a, b in zip(before, after, strict=True))

    if added("num_words") < 1:
        return None
    return Score(
        nll=added("nll"),
        num_tokens=added("num_tokens"),
        num_words=added("num_words"),
        num_bytes=added("num_bytes"),
        sha256="",
        has_unk=any(score.has_unk for score in after),
    )


def _typicality(generator: Generator, passage: Passage, text: str) -> float:
    """Return the mean log p(c) over the tokens of a continuation."""
    all_T = generator.typicality(passage.prompt + text)
    own_T = all_T[len(generator.encode(passage.prompt)) :]
    return float(own_T.mean()) if len(own_T) else math.nan


def open_scorer(path: Path, variant: str | None = None) -> Scorer:
    """Return what scores a text with a run folder or a bundle."""
    if is_run(path, variant=variant):
        from sdgm_edge.evaluation import score
        from sdgm_edge.tokenization import Tokenizer

        run = load_run(path)
        tokenizer = Tokenizer.load(run.tokenizer_path)
        return lambda text: score(run.model, tokenizer, text)
    return Generator.load(path, variant=variant).score
