"""How good a model is: every token of a text scored once, state carried from its first to its last."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from sdgm_edge.losses import vocabulary_nll
from sdgm_edge.models import LanguageModel
from sdgm_edge.runtime import Score, with_line_end
from sdgm_edge.tokenization import BEGIN_ID, UNKNOWN, Tokenizer

WINDOW = 256
TURNS = 8
"""Turns of a clock that one lane reads at once: they share the sines of a turn."""
OVERLAPPING = 1 << 14
"""Tokens of overlapping windows that are read at once, if a window has not more."""


def score(model: LanguageModel, tokenizer: Tokenizer, text: str) -> Score:
    """Score a text from its first token to its last, as `runtime.scoring` defines the figures."""
    ids = tokenizer.encode(with_line_end(text) if tokenizer.kind == "word" else text)
    has_unk = tokenizer.kind == "word" and tokenizer.token_id(UNKNOWN) in ids
    return Score.of(text, total_nll(model, np.array([BEGIN_ID, *ids])), len(ids), has_unk=has_unk)


def total_nll(model: LanguageModel, tokens: NDArray[np.integer], lanes: int = 1) -> float:
    """Return −Σ log p(token) in nats over all tokens but the first, which is only given.

    With several lanes the text is cut into as many parts that are read side by side, which is quicker; each
    part but the first then lacks its context, and the figure is a little too high. Reports use one lane.
    """
    length = (len(tokens) - 1) // lanes
    rest = len(tokens) - 1 - lanes * length  # the last lane goes on to the end
    with _evaluating(model):
        total, state = _read(model, tokens, np.arange(lanes) * length, length, model.initial_state(lanes))
        return total + _read(model, tokens, np.array([lanes * length]), rest, state[-1:])[0]


def perplexity(nll: float, count: int) -> float:
    """Return e^(nll / count), or what is left of it in a float where a model has gone astray."""
    return math.exp(min(700.0, nll / max(1, count)))


@contextmanager
def _evaluating(model: LanguageModel) -> Iterator[None]:
    """Without dropout and gradients; in the end the model is as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _read(
    model: LanguageModel,
    tokens: NDArray[np.integer],
    starts: NDArray[np.integer],
    length: int,
    state: torch.Tensor,
) -> tuple[float, torch.Tensor]:
    """Score `length` tokens after each of `starts`; return their NLL and the state after them."""
    total, window = 0.0, _window(model, len(starts))
    for begin in range(0, length, window):
        count = min(window, length - begin)
        block_TB = _block(tokens, starts + begin, count + 1, state.device)
        features = model.features(block_TB[:-1], state)
        state = features.state_BS
        total += float(vocabulary_nll(features, model, block_TB[1:]))
    return total, state


def _block(
    tokens: NDArray[np.integer], starts: NDArray[np.integer], length: int, device: torch.device
) -> torch.Tensor:
    """Return the `length` tokens from each of `starts` on, (T, B)."""
    places = starts[:, None] + np.arange(length)
    return torch.from_numpy(tokens[places].astype(np.int64)).to(device).T


def _window(model: LanguageModel, lanes: int) -> int:
    """Return how many tokens of each lane are read at once: more where that spares work in every read."""
    config = model.config
    spared = TURNS * config.window if config.layer == "clock" else config.window if config.windowed else 0
    return max(WINDOW, spared // lanes)


def mixing_sample(
    model: LanguageModel, tokens: NDArray[np.integer], count: int, seed: int = 0
) -> NDArray[np.float32]:
    """Return about `count` mixing vectors, (N, M), of the model at places of a text chosen by `seed`."""
    window = min(model.config.window, len(tokens))
    starts = np.random.default_rng(seed).integers(0, len(tokens) - window + 1, max(1, count * 2 // window))
    state = model.initial_state(len(starts))
    with _evaluating(model):
        mixing_TBM = model.features(_block(tokens, starts, window, state.device), state).mixing_TBM
    settled = mixing_TBM[window // 2 :].flatten(0, 1)  # the first half only warms the atoms up
    vectors: NDArray[np.float32] = settled.float().cpu().numpy()
    return vectors


def reconstruction_cosine(model: LanguageModel, tokens: NDArray[np.integer]) -> float:
    """Return the mean cosine similarity of each embedding and its reconstruction over a text."""
    state, total, window = model.initial_state(1), 0.0, _window(model, 1)
    with _evaluating(model):
        for begin in range(0, len(tokens), window):
            count = min(window, len(tokens) - begin)
            features = model.features(_block(tokens, np.array([begin]), count, state.device), state)
            state = features.state_BS
            rebuilt, embedded = features.rebuilt_TBD.float(), features.embedded_TBD.float()
            total += float(torch.nn.functional.cosine_similarity(rebuilt, embedded, -1).sum())
    return total / len(tokens)


def overlapping_nll(model: LanguageModel, tokens: NDArray[np.integer], lanes: int = 16) -> float:
    """Return −Σ log p(token) where windows overlap by half, as results of windowed models are often given.

    Each window begins afresh and its second half is scored, so that a token sees at least half a window; it
    costs every token twice. Only the first half window has less.
    """
    half, num_scored = max(1, model.config.window // 2), len(tokens) - 1
    lanes = max(1, min(lanes, OVERLAPPING // (2 * half)))
    starts = np.arange(0, num_scored - half, half)
    whole, rest = np.split(starts, [max(0, num_scored - half) // half])  # the last window may be shorter
    batches = [whole[i : i + lanes] for i in range(0, len(whole), lanes)] + ([rest] if len(rest) else [])
    with _evaluating(model):
        total = _read(model, tokens, np.zeros(1, np.int64), min(half, num_scored), model.initial_state(1))[0]
        for begin in batches:
            length = min(2 * half, num_scored - int(begin[0]))
            state = model.initial_state(len(begin))
            block_TB = _block(tokens, begin, length + 1, state.device)
            state = model.features(block_TB[:half], state).state_BS
            scored = model.features(block_TB[half:-1], state)
            total += float(vocabulary_nll(scored, model, block_TB[1 + half :]))
    return total
