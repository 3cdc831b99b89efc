"""How varied texts are, and how much each repeats itself.

    distinct-n     different n-grams of all texts together / n-grams
    self-BLEU      BLEU of each text against all the others, the mean: 1 where all are alike
    repetition     n-grams that their own text has had before / n-grams
    loops          texts in which some words come round three times without a break / texts

An n-gram is n words in a row; a word is a run of letters, digits and underscores, or one other mark. All
depend on how long and how many the texts are: compare only equal numbers of equally long ones.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

Text = Sequence[str]
"""The words of a text."""

SMOOTHING = 0.1
"""What counts for no match at all in BLEU (Chen and Cherry 2014, method 1)."""
TURNS, LOOP_WORDS = 3, 12
"""A loop comes round at least so often, and is at least so many words long in all."""


def split_words(text: str) -> list[str]:
    """Return the words of a text.

    >>> split_words("It isn't <unk>.")
    ['It', 'isn', "'", 't', '<', 'unk', '>', '.']
    """
    return re.findall(r"\w+|[^\w\s]", text)


def distinct(texts: Sequence[Text], order: int) -> float:
    """Return how many different n-grams there are to each n-gram; 0 where there is none."""
    grams = [gram for text in texts for gram in _grams(text, order)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(texts: Sequence[Text], order: int = 4) -> float:
    """Return the part of n-grams that their own text has had before; 0 where there is none."""
    grams = [_grams(text, order) for text in texts]
    total = sum(map(len, grams))
    return 1 - sum(len(set(own)) for own in grams) / total if total else 0.0


def loops(texts: Sequence[Text]) -> float:
    """Return the part of texts that loop somewhere."""
    return sum(map(_loops, texts)) / len(texts)


def self_bleu(texts: Sequence[Text], order: int = 4) -> float:
    """Return the mean BLEU of each text with all others as its references; there must be two at least."""
    logs = [0.0] * len(texts)
    for n in range(1, order + 1):
        counts = [Counter(_grams(text, n)) for text in texts]
        most: dict[tuple[str, ...], tuple[int, int]] = defaultdict(lambda: (0, 0))
        for counted in counts:
            for gram, count in counted.items():
                first, second = most[gram]
                most[gram] = (max(first, count), max(second, min(first, count)))
        for i, counted in enumerate(counts):
            # What another has most: the largest count, or the second largest where the largest is its own.
            matched = sum(min(count, most[gram][1]) for gram, count in counted.items())
            logs[i] += math.log(max(matched, SMOOTHING) / max(1, counted.total()))
    lengths = [len(text) for text in texts]
    total = 0.0
    for i, log in enumerate(logs):
        own = max(1, lengths[i])
        nearest = min(lengths[:i] + lengths[i + 1 :], key=lambda other: (abs(other - own), other))
        total += math.exp(min(0.0, 1 - nearest / own) + log / order)
    return total / len(texts)


def _grams(text: Text, order: int) -> list[tuple[str, ...]]:
    return list(zip(*(text[i:] for i in range(order)), strict=False))


def _loops(text: Text) -> bool:
    for period in range(1, len(text) // TURNS + 1):
        needed = max((TURNS - 1) * period, LOOP_WORDS - period)
        run = 0
        for now, before in zip(text[period:], text, strict=False):
            run = run + 1 if now == before else 0
            if run == needed:
                return True
    return False
