"""What a model can keep in mind, and for how long: tasks made on the fly, with exact answers.

    copy        eight symbols, a gap, the question; say them again in order
    selective   eight symbols scattered among noise, the question; say them again in order
    recall      eight pairs of key and value, a gap, four keys; say the value of each
    needle      one symbol after a mark, noise, the mark; say the symbol

The *distance* is the length of the gap or of the noise. A model is trained on distances up to a limit, drawn
evenly on a logarithmic scale, and tested on each of a list, longer ones included; accuracy is the part of
answers that are right, one in 32 by chance. Only answers count in the loss.

Shapes: B batch, T time.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from sdgm_edge.compare import Terms, entry_config
from sdgm_edge.config import CorpusConfig, TrainingConfig
from sdgm_edge.models import LanguageModel, ModelConfig, build_model
from sdgm_edge.optimizers import Optimizer, learning_rate
from sdgm_edge.process import pick_device
from sdgm_edge.run import read_json, write_json
from sdgm_edge.runtime import ConfigError, RunError

log = logging.getLogger(__name__)

Ints = NDArray[np.int64]

FILLER, ASK = 0, 1
NUM_SYMBOLS = 32
SYMBOLS = np.arange(2, 2 + NUM_SYMBOLS)
NOISE = SYMBOLS + NUM_SYMBOLS
"""What is no answer; the keys of `recall` too."""
VOCABULARY = 2 + 2 * NUM_SYMBOLS
LENGTH, PAIRS, QUESTIONS, LEAD = 8, 8, 4, 15
NO_ANSWER = -100
CHUNK = 256
"""Tokens read at once in tests, state carried along."""
TIMED_STEPS = 20
"""From which is told how many fit some minutes."""


def _said_again(told_BT: Ints, symbols_BN: Ints) -> tuple[Ints, Ints]:
    """Return what is told, the question and the symbols but the last: each answers the token before it."""
    ask = np.full((len(told_BT), 1), ASK)
    inputs = np.concatenate([told_BT, ask, symbols_BN[:, :-1]], axis=1)
    answers = np.full_like(inputs, NO_ANSWER)
    answers[:, -symbols_BN.shape[1] :] = symbols_BN
    return inputs, answers


def copy(rng: np.random.Generator, batch: int, distance: int) -> tuple[Ints, Ints]:
    """Symbols, a silent gap, and the symbols again."""
    symbols = rng.choice(SYMBOLS, (batch, LENGTH))
    return _said_again(np.concatenate([symbols, np.full((batch, distance), FILLER)], axis=1), symbols)


def selective(rng: np.random.Generator, batch: int, distance: int) -> tuple[Ints, Ints]:
    """Symbols scattered among noise, and the symbols again."""
    told = rng.choice(NOISE, (batch, LENGTH + distance))
    symbols = rng.choice(SYMBOLS, (batch, LENGTH))
    places = np.sort(rng.random(told.shape).argsort(axis=1)[:, :LENGTH], axis=1)
    np.put_along_axis(told, places, symbols, axis=1)
    return _said_again(told, symbols)


def recall(rng: np.random.Generator, batch: int, distance: int) -> tuple[Ints, Ints]:
    """Pairs of key and value, a silent gap, and some of the keys."""
    keys = rng.permuted(np.broadcast_to(NOISE, (batch, NUM_SYMBOLS)), axis=1)[:, :PAIRS]
    values = rng.choice(SYMBOLS, (batch, PAIRS))
    pairs = np.stack([keys, values], axis=2).reshape(batch, -1)
    asked = rng.random((batch, PAIRS)).argsort(axis=1)[:, :QUESTIONS]
    questions = np.full((batch, 2 * QUESTIONS), ASK)
    questions[:, 1::2] = np.take_along_axis(keys, asked, axis=1)
    inputs = np.concatenate([pairs, np.full((batch, distance), FILLER), questions], axis=1)
    answers = np.full_like(inputs, NO_ANSWER)
    answers[:, -2 * QUESTIONS + 1 :: 2] = np.take_along_axis(values, asked, axis=1)
    return inputs, answers


def needle(rng: np.random.Generator, batch: int, distance: int) -> tuple[Ints, Ints]:
    """Noise with one marked symbol in it, and the mark."""
    symbol = rng.choice(SYMBOLS, (batch, 1))
    told = rng.choice(NOISE, (batch, 2 + distance))
    told[:, 0] = ASK
    told[:, 1] = symbol[:, 0]
    return _said_again(told, symbol)


TASKS: dict[str, Callable[[np.random.Generator, int, int], tuple[Ints, Ints]]] = {
    "copy": copy,
    "selective": selective,
    "recall": recall,
    "needle": needle,
}
"""By name: from batch size and distance to inputs and answers, (B, T); `NO_ANSWER` where there is none."""


def sequences(task: str, rng: np.random.Generator, batch: int, distance: int) -> tuple[Ints, Ints]:
    """Return inputs and answers of a task after a short silence, so that no position gives anything away."""
    ids, answers = TASKS[task](rng, batch, distance)
    lead = ((0, 0), (int(rng.integers(LEAD + 1)), 0))
    return np.pad(ids, lead, constant_values=FILLER), np.pad(answers, lead, constant_values=NO_ANSWER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """How models are probed."""

    num_parameters: int = 250_000
    steps: int = 1000
    minutes: float = 0.0
    """Train each for about so long, in place of so many steps; 0 for steps."""
    batch_size: int = 32
    trained_distance: int = 128
    """The longest distance in training. Windows are long enough for it."""
    distances: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096)
    """Those that are tested."""
    tested: int = 32
    """Sequences for each of them."""
    learning_rate: float = 3e-3
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("num_parameters", "steps", "batch_size", "trained_distance", "tested"):
            if getattr(self, name) < 1:
                raise ConfigError(f"probe: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.minutes < math.inf:
            raise ConfigError(f"probe: minutes must be at least 0, got {self.minutes}")
        if not self.distances or min(self.distances) < 1:
            raise ConfigError(f"probe: distances must be numbers of at least 1, got {list(self.distances)}")

    @property
    def window(self) -> int:
        """The window of the models: a power of two that holds the longest sequence of the training."""
        return 1 << math.ceil(math.log2(LEAD + self.trained_distance + 2 * PAIRS + 2 * QUESTIONS))

    def model(self, entry: str) -> ModelConfig:
        """Return what an entry of a comparison is here. Raises ConfigError."""
        terms = Terms(
            corpus=CorpusConfig(),
            vocab_size=VOCABULARY,
            num_parameters=self.num_parameters,
            window=self.window,
        )
        found, plain = (entry_config(name, terms, self.seed) for name in (entry, entry.partition(":")[0]))
        nothing: dict[str, Any] = {"dropout": 0.0, "atom_dropout": 0.0, "embedding_dropout": 0.0}
        asked = any(getattr(found.model, name) != getattr(plain.model, name) for name in nothing)
        if asked or replace(found, model=plain.model) != plain:
            raise ConfigError(
                f"{entry}: expected fields of the model alone, and none of dropout: "
                "a probe trains all models alike, and drops nothing"
            )
        return replace(found.model, **nothing)


@dataclass(frozen=True, slots=True)
class Finding:
    """What one model makes of one task."""

    entry: str
    task: str
    accuracy: dict[int, float]
    """By distance."""
    loss: float
    """At the end of the training, a mean over its last tenth."""
    steps: int
    seconds: float


def probe(
    entries: Sequence[str],
    tasks: Sequence[str],
    settings: Probe,
    folder: Path,
    progress: Callable[[str], None] = lambda message: None,
) -> list[Finding]:
    """Train every entry on every task and test it; what is in `folder` already is not done again.

    Raises:
        ConfigError: an unknown task or entry; before anything is trained.
        RunError: `folder` has a finding with other settings, or a damaged one.
    """
    for task in tasks:
        if task not in TASKS:
            raise ConfigError(f"--tasks: expected {', '.join(TASKS)}, got {task!r}")
    models = {entry: settings.model(entry) for entry in entries}
    findings = []
    for task in tasks:
        for entry, config in models.items():
            path = folder / (re.sub(r"[^\w.=+-]", "-", f"{task}-{entry}") + ".json")
            terms: dict[str, Any] = json.loads(json.dumps({**asdict(settings), "model": config.to_dict()}))
            saved = read_json(path) if path.exists() else None
            if saved is not None and saved["settings"] != terms:
                raise RunError(
                    f"{path} is a finding with other settings: expected those of this probe; choose another "
                    "--out, or delete it"
                )
            if saved is not None:
                finding = Finding(**saved["finding"])
                finding = replace(finding, accuracy={int(d): a for d, a in finding.accuracy.items()})
            else:
                finding = _find(entry, config, task, settings)
                write_json(path, {"settings": terms, "finding": asdict(finding)})
            shown = ", ".join(f"{d}: {a:.0%}" for d, a in finding.accuracy.items())
            progress(f"{task}, {entry}: {shown} ({finding.seconds:.0f} s)")
            findings.append(finding)
    return findings


def table(findings: Sequence[Finding]) -> tuple[list[str], list[list[str]]]:
    """Return titles and rows: accuracy by distance, a row for each task and model."""
    distances = sorted({distance for finding in findings for distance in finding.accuracy})
    rows = [
        [f.task, f.entry, *(f"{f.accuracy[d]:.0%}" if d in f.accuracy else "–" for d in distances)]
        for f in findings
    ]
    return ["task", "model", *map(str, distances)], rows


def _find(entry: str, config: ModelConfig, task: str, settings: Probe) -> Finding:
    began = time.perf_counter()
    if settings.minutes:
        settings = replace(settings, steps=_steps_in(config, task, settings))
    torch.manual_seed(settings.seed)
    model = build_model(config).to(pick_device(settings.device))
    loss = train(model, task, settings)
    accuracy = {d: measure(model, task, d, settings.tested, settings.seed) for d in settings.distances}
    return Finding(entry, task, accuracy, loss, settings.steps, time.perf_counter() - began)


def _steps_in(config: ModelConfig, task: str, settings: Probe) -> int:
    """Return how many steps fit the minutes, from the speed of a few."""
    model = build_model(config).to(pick_device(settings.device))
    train(model, task, replace(settings, steps=2))
    began = time.perf_counter()
    train(model, task, replace(settings, steps=TIMED_STEPS))
    return max(1, round(60 * settings.minutes * TIMED_STEPS / (time.perf_counter() - began)))


def train(model: LanguageModel, task: str, settings: Probe) -> float:
    """Train on a task at mixed distances; return the loss over the last tenth of the steps."""
    terms = TrainingConfig(learning_rate=settings.learning_rate, max_steps=settings.steps)
    optimizer = Optimizer(model.train(), terms)
    rng = np.random.default_rng(settings.seed)
    device = model.embedding.weight.device
    losses = []
    for step in range(settings.steps):
        distance = round(settings.trained_distance ** rng.random())
        ids, answers = (
            torch.from_numpy(x).to(device) for x in sequences(task, rng, settings.batch_size, distance)
        )
        logits = model(ids).logits_BTV
        loss = functional.cross_entropy(logits.flatten(0, 1), answers.flatten(), ignore_index=NO_ANSWER)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), terms.clip)
        optimizer.step(learning_rate(terms, step, settings.steps))
        losses.append(loss.detach())
        if step % 100 == 0:
            log.info("%s: step %d, loss %.3f", task, step, loss)
    last = torch.stack(losses[-max(1, settings.steps // 10) :])
    return float(last.mean())


@torch.no_grad()
def measure(model: LanguageModel, task: str, distance: int, count: int, seed: int = 0) -> float:
    """Return the part of answers that a model gets right at a distance, on sequences that it has not seen."""
    model.eval()
    ids, answers = sequences(task, np.random.default_rng((seed, distance, 1)), count, distance)
    state, right = model.initial_state(count), 0
    for begin in range(0, ids.shape[1], CHUNK):
        part = slice(begin, begin + CHUNK)
        logits, _, state = model(torch.from_numpy(ids[:, part]).to(state.device), state)
        said = logits.argmax(-1).cpu().numpy()
        right += int((said == answers[:, part]).sum())
    return right / int((answers != NO_ANSWER).sum())
