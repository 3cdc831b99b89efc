"""One training of a comparison, in a process of its own: `python -m sdgm_edge.trial FOLDER CACHE`.

FOLDER holds `trial.json`, what to train and how, and in the end `result.json`, what came of it. Between them
it is a run folder like any other: a trial that was interrupted goes on from its checkpoint. A process of its
own has a peak of memory of its own, and cannot take the others with it.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sdgm_edge import checkpoint, child, training
from sdgm_edge.config import RunConfig
from sdgm_edge.evaluation import overlapping_nll, perplexity, reconstruction_cosine, total_nll
from sdgm_edge.parallel import Group
from sdgm_edge.process import keep_memory, pick_device
from sdgm_edge.recorder import read_log
from sdgm_edge.run import TRIAL, load_run, read_json, write_json
from sdgm_edge.runtime import DivergedError, Score
from sdgm_edge.shards import Corpus, corpus_of
from sdgm_edge.tokenization import UNKNOWN

RESULT = "result.json"
WARM_STEPS, TIMED_SECONDS = 2, 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What to train and how."""

    config: RunConfig
    minutes: float = 0.0
    """Train for about so long, whatever that is in steps; 0 for what the config says."""
    device: str = "auto"
    precision: str = "auto"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    @classmethod
    def read(cls, folder: Path) -> Trial:
        """Read what `to_dict` wrote into a folder."""
        values = read_json(folder / TRIAL)
        return cls(**{**values, "config": RunConfig.from_dict(values["config"], str(folder / TRIAL))})


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of a trial. Figures that do not apply, or were never reached, are None."""

    status: str
    """`finished`, `diverged` or `failed`."""
    reason: str | None = None
    """Why it is not finished."""
    num_parameters: int | None = None
    steps: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    """In training, the median over all steps, validation left out; None of fewer than three."""
    peak_memory_bytes: int | None = None
    """Of the training process; of the GPU where it trains on one."""
    token_perplexity: float | None = None
    word_perplexity: float | None = None
    overlapping_word_perplexity: float | None = None
    """Of a model that reads in windows: with windows that overlap by half, at twice the cost."""
    bits_per_byte: float | None = None
    cosine: float | None = None
    """Mean cosine similarity of x̂ and x over the validation text, where a model has a reconstruction."""
    curve: tuple[tuple[int, float], ...] = ()
    """Step and validation word perplexity."""

    @classmethod
    def read(cls, folder: Path) -> Result | None:
        """Read a folder's result; None where there is none yet."""
        path = folder / RESULT
        if not path.exists():
            return None
        values = read_json(path)
        return cls(**{**values, "curve": tuple((step, value) for step, value in values["curve"])})


def run_trial(
    folder: Path, corpus: Corpus, on_step: Callable[[training.Progress], None] = lambda progress: None
) -> Result:
    """Train what `trial.json` says, or go on with it; score it, and leave `result.json`.

    Raises:
        Interrupted: a signal came; the next call goes on.
    """
    trial = Trial.read(folder)
    resume = bool(checkpoint.existing(folder / "checkpoints", checkpoint.LAST))
    config = trial.config
    if trial.minutes and not resume:
        config = _for_minutes(trial, corpus, folder)
    memory = None
    ended: list[float] = []  # when each step did, but the last, after which the validation text is scored

    def watched(progress: training.Progress) -> None:
        nonlocal memory
        memory = peak_memory()  # before the last mixture is fitted, which is no part of the loop
        if progress.step < progress.total_steps:
            ended.append(time.perf_counter())
        on_step(progress)

    try:
        summary = training.train(
            config,
            corpus,
            folder,
            resume=resume,
            device=trial.device,
            precision=trial.precision,
            on_step=watched,
        )
        result = _measured(folder, corpus, summary, memory, trial.device)
        on_cpu = pick_device(trial.device).type == "cpu"  # a GPU's steps end later than they return
        if result.tokens_per_second is None and len(ended) > 1 and on_cpu:
            tokens = config.training.batch_size * config.model.window
            a_step = median(after - before for before, after in itertools.pairwise(ended))
            result = replace(result, tokens_per_second=tokens / a_step)
    except DivergedError as reason:
        result = Result(status="diverged", reason=str(reason), curve=_curve(folder))
    write_json(folder / RESULT, asdict(result))
    return result


def peak_memory() -> int | None:
    """Return the most bytes that this process has held: on its GPU if it used one, else in memory; None if
    the system does not say."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # of this program alone; what `resource` says begins with its parent's
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ModuleNotFoundError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _for_minutes(trial: Trial, corpus: Corpus, folder: Path) -> RunConfig:
    """Return the config with as many steps as fit the minutes, from the speed of a few."""
    model = replace(trial.config.model, vocab_size=corpus.tokenizer.vocab_size)
    config = replace(trial.config, model=model)
    place = pick_device(trial.device)
    if place.type == "cpu":
        keep_memory()  # as `train` does, or steps would seem to take longer
    trainer = training.Trainer(config, corpus, folder, place, Group(), trial.precision, False)
    for _ in range(WARM_STEPS):
        trainer.train_step()
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < TIMED_SECONDS:
        float(trainer.train_step()[0].loss.detach())  # reading it waits for a GPU
        steps += 1
    a_step = (time.perf_counter() - began) / steps
    max_steps = max(1, int(60 * trial.minutes / a_step))
    return replace(config, training=replace(config.training, max_steps=max_steps))


def _measured(
    folder: Path, corpus: Corpus, summary: training.Summary, memory: int | None, device: str
) -> Result:
    run = load_run(folder, str(pick_device(device)))
    valid, unknown = corpus.valid, None
    if corpus.tokenizer.kind == "word":
        unknown = corpus.tokenizer.token_id(UNKNOWN)
    nll, num_words = total_nll(run.model, valid.tokens), valid.num_words
    if not nll / (len(valid) - 1) < 700:  # its exponential is no number
        reason = f"the validation text has a likelihood of e^−{nll:.3g}"
        return Result(status="diverged", reason=reason, curve=_curve(folder))
    score = Score(
        nll=nll,
        num_tokens=len(valid) - 1,
        num_words=num_words,
        num_bytes=valid.num_bytes,
        sha256=valid.sha256,
        has_unk=unknown is not None and bool((valid.tokens == unknown).any()),
    )
    speeds = sorted(
        float(row["tokens_per_second"]) for row in read_log(folder / "log.csv") if row["tokens_per_second"]
    )
    told = score.to_dict()  # with nothing for what no number holds: words of a text without white space
    return Result(
        status="finished",
        num_parameters=summary.num_parameters,
        steps=summary.steps,
        seconds=summary.seconds,
        tokens_per_second=speeds[len(speeds) // 2] if speeds else None,
        peak_memory_bytes=memory,
        token_perplexity=told["token_perplexity"],
        word_perplexity=told["word_perplexity"],
        overlapping_word_perplexity=perplexity(overlapping_nll(run.model, valid.tokens), num_words)
        if run.config.windowed and told["word_perplexity"] is not None
        else None,
        bits_per_byte=told["bits_per_byte"],
        cosine=reconstruction_cosine(run.model, valid.tokens) if run.config.spectral else None,
        curve=_curve(folder),
    )


def _curve(folder: Path) -> tuple[tuple[int, float], ...]:
    return tuple(
        (int(row["step"]), float(row["valid_word_perplexity"]))
        for row in read_log(folder / "log.csv")
        if row["valid_word_perplexity"]
    )


def main() -> None:
    """Run the trial of a folder, as a process."""
    from sdgm_edge.console import training_progress

    folder, cache = map(Path, sys.argv[1:])
    text = Trial.read(folder).config.corpus
    with child.ending():
        corpus = corpus_of(text, cache)
        with training_progress(folder.name) as on_step:
            run_trial(folder, corpus, on_step)


if __name__ == "__main__":
    main()
