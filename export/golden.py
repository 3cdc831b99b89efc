"""The golden prompt: what the exporting machine says after it, for others to compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sdgm_edge.runtime import Engine

WORDS = 6
CHARACTERS = 64
"""Most that the words may have together: without white space, a whole text is one word."""
TOKENS = 16
LOGITS = 32
"""Logits that are kept of each step: the first ones of the vocabulary."""


def golden_prompt(text: str) -> str:
    """Return the first words of a text."""
    return " ".join(text.split(maxsplit=WORDS)[:WORDS])[:CHARACTERS].rstrip()


def golden_steps(engine: Engine, begin_token: int, ids: Sequence[int]) -> dict[str, Any]:
    """Return the greedy tokens after the prompt, and the first logits each was taken from.

    The prompt is fed as a session feeds it: in chunks, the begin token in the first.
    """
    fed = [begin_token, *ids]
    state = engine.zeros()
    for at in range(0, len(fed), engine.chunk):
        logits_V, state = engine.last(fed[at : at + engine.chunk], state)
    tokens, rows = [], []
    for _ in range(TOKENS):
        tokens.append(int(logits_V.argmax()))
        rows.append([float(f"{x:.7g}") for x in logits_V[:LOGITS]])
        logits_V, state = engine.last(tokens[-1:], state)
    return {"tokens": tokens, "logits": rows}
