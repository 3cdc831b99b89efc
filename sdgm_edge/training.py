"""The training loop: batches through the objective, into checkpoints, until the schedule or patience ends.

A step depends on the config, the weights and its own number alone: dropout and the choice of mixing vectors
are seeded by it, and carried state is part of a checkpoint. So on a CPU a resumed run repeats, bit for bit,
what an uninterrupted one would have done.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from sdgm_edge import checkpoint
from sdgm_edge.batches import Lanes
from sdgm_edge.checkpoint import BEST, LAST, Checkpoint
from sdgm_edge.config import RunConfig
from sdgm_edge.evaluation import mixing_sample, perplexity, total_nll
from sdgm_edge.losses import Objective, Terms
from sdgm_edge.models import Features, build_model
from sdgm_edge.optimizers import Optimizer, learning_rate
from sdgm_edge.parallel import Group, joined
from sdgm_edge.prior import Arrays, Reservoir, fit_mixture, install
from sdgm_edge.process import keep_memory, pick_device, stopping, supports_bf16
from sdgm_edge.recorder import Recorder, draw_curve
from sdgm_edge.run import best_checkpoint, check_unused, load_weights, locked, read_run_config
from sdgm_edge.runtime import CheckpointError, DivergedError, RunError, replacing
from sdgm_edge.shards import Corpus
from sdgm_edge.tokenization import BEGIN_ID

log = logging.getLogger(__name__)

VALID_LANES = 8
RESERVOIR = 4096
VECTORS_AT_END = 8192
FITTED = ("optimizer", "batch_size", "num_components")
"""Settings of the training that what is kept in a checkpoint was made for."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a training stands; given to the caller after every step."""

    step: int
    total_steps: int
    loss: float | None
    """None before the first is read."""
    tokens_per_second: float
    valid_word_perplexity: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """What a training came to."""

    folder: Path
    steps: int
    seconds: float
    num_parameters: int
    tokens_per_second: float
    valid_token_perplexity: float
    valid_word_perplexity: float


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal, after its state was saved."""


def train(
    config: RunConfig,
    corpus: Corpus,
    folder: Path,
    *,
    resume: bool = False,
    device: str = "auto",
    precision: str = "auto",
    compiled: bool = False,
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> Summary:
    """Train a model into a run folder. On a CPU the process keeps what memory it was given, to its end.

    Raises:
        RunError: the folder is in use, or holds a run and `resume` is not asked for.
        CorpusError: the text is shorter than one batch of windows.
        DivergedError: the loss is no number.
        CheckpointError: a checkpoint cannot be read or written.
        Interrupted: a signal came; the run was saved and can be resumed.
    """
    place = pick_device(device)
    if place.type == "cpu":
        keep_memory()
    with joined(place) as group, locked(folder) if group.leads else nullcontext():
        if resume:
            config = read_run_config(folder)
        else:
            config = replace(config, model=replace(config.model, vocab_size=corpus.tokenizer.vocab_size))
        trainer = Trainer(config, corpus, folder, place, group, precision, compiled)
        trainer.open(resume)
        try:
            with stopping() as stopped:
                return trainer.run(stopped, on_step)
        finally:
            if trainer.recorder is not None:
                trainer.recorder.close()


class Trainer:
    """One run, from its first step or from a checkpoint to its end."""

    def __init__(
        self,
        config: RunConfig,
        corpus: Corpus,
        folder: Path,
        device: torch.device,
        group: Group,
        precision: str,
        compiled: bool,
    ) -> None:
        self.config, self.corpus, self.folder, self.device, self.group = config, corpus, folder, device, group
        t = config.training
        self.lanes = Lanes(
            tokens=corpus.train.tokens,
            batch_size=t.batch_size,
            window=config.model.window,
            seed=t.seed,
            rank=group.rank,
            world=group.world,
        )
        torch.manual_seed(t.seed)
        self.model = build_model(config.model).to(device).train()
        self.objective = Objective(self.model, config.loss, t.num_components).to(device)
        if compiled:
            self.objective.compile()
        self.optimizer = Optimizer(self.model, t)
        self.averaged = deepcopy(self.model).eval() if t.ema_decay else self.model
        self.precision_asked = precision != "auto"
        self.precision = precision if self.precision_asked else "bf16" if supports_bf16(device) else "float32"
        self.state = self.model.initial_state(t.batch_size // group.world)
        self.reservoir = Reservoir(RESERVOIR, config.model.mixing_size) if config.loss.prior else None
        self.prior: Arrays | None = None
        self.step = self.stale = 0
        self.seconds = 0.0  # of the sessions before this one
        self.best = math.inf
        self.total = t.max_steps or t.epochs * self.lanes.steps_per_epoch
        self.validate_every = t.valid_steps or self.lanes.steps_per_epoch

    @property
    def epoch(self) -> float:
        """Passes over the training text so far."""
        return self.step / self.lanes.steps_per_epoch

    def open(self, resume: bool) -> None:
        """Begin a run folder, or pick up the one that is there."""
        root = self.folder / "checkpoints"
        found = checkpoint.existing(root, LAST)
        if resume:
            if not found:
                raise RunError(f"{self.folder} has no checkpoint to resume from: train without --resume")
            self._restore(checkpoint.load(found[-1]))
        elif source := self.config.begun_from:
            load_weights(self.model, best_checkpoint(Path(source)))
            self.averaged.load_state_dict(self.model.state_dict())
        if not resume and self.group.leads:
            check_unused(self.folder)
            _write_text(self.folder / "config.json", json.dumps(self.config.to_dict(), indent=2) + "\n")
            self.corpus.tokenizer.save(self.folder / "tokenizer.json")
            _write_text(self.folder / "heldout.txt", self.corpus.heldout_text)
        log.info("%s parameters on %s, %s", f"{self.model.num_parameters:,}", self.device, self.precision)
        self.recorder = Recorder(self.folder, self.step) if self.group.leads else None

    def run(self, stopped: threading.Event, on_step: Callable[[Progress], None]) -> Summary:
        """Train to the end; save, and raise `Interrupted`, when `stopped` is set."""
        t, first, began = self.config.training, self.step, time.perf_counter()
        self.began = saved = began
        mark = (began, self.step)  # since when, and from which step, speed is measured
        look_every = 1 if self.device.type == "cpu" else 10  # to read anything of a GPU makes it wait
        tokens = t.batch_size * self.config.model.window
        loss: float | None = None
        valid: float | None = None
        speed = 0.0
        while self.step < self.total and not (t.early_stop and self.stale >= t.early_stop):
            terms, features, rate = self.train_step()
            validates = self.step % self.validate_every == 0 or self.step == self.total
            looks = validates or self.step % look_every == 0
            if looks:
                loss = self._finite(terms.loss, rate)
            if self.step % 10 == 0:
                now = time.perf_counter()
                speed, mark = (self.step - mark[1]) * tokens / (now - mark[0]), (now, self.step)
                self._record(terms, features, rate, speed)
            if validates:
                valid = self._validate()
                saved = self._save()
                mark = (saved, self.step)
            elif looks and self.group.any(
                time.perf_counter() - saved > 60 * t.checkpoint_minutes, self.device
            ):
                saved = self._save()
                mark = (saved, self.step)
            if self.group.leads:
                on_step(Progress(self.step, self.total, loss, speed, valid))
            if looks and self.group.any(stopped.is_set(), self.device) and self.step < self.total:
                self._save()
                self._close()
                raise Interrupted(f"stopped at step {self.step} of {self.total}; go on with --resume")
        if math.isinf(self.best):  # its weights were deleted
            self._validate()
        self._finish()
        seconds = time.perf_counter() - began
        nll = self.best
        return Summary(
            self.folder,
            self.step,
            self.seconds + seconds,
            self.model.num_parameters,
            (self.step - first) * tokens / seconds,
            perplexity(nll, len(self.corpus.valid) - 1),
            perplexity(nll, self.corpus.valid.num_words),
        )

    def train_step(self) -> tuple[Terms, Features, float]:
        """Train on the next batch; return the loss, what it came from and the learning rate."""
        t = self.config.training
        epoch, index = divmod(self.step, self.lanes.steps_per_epoch)
        inputs, targets = (ids.to(self.device, non_blocking=True) for ids in self.lanes.batch(epoch, index))
        fresh = self.lanes.fresh(epoch, index, t.fresh_starts).to(self.device)
        inputs = torch.cat([inputs[:, :1].masked_fill(fresh, BEGIN_ID), inputs[:, 1:]], dim=1)
        self.state = self.state.masked_fill(fresh | (index == 0 or not t.carry_state), 0)
        torch.manual_seed((t.seed * 1_000_003 + self.step) * self.group.world + self.group.rank)
        exact = self.step >= (1 - t.exact_part) * self.total
        self.objective.sampled_words = 0 if exact else t.sampled_words
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            terms, features = self.objective(inputs, targets, self.state)
        self.state = features.state_BS.detach()
        terms.loss.backward()
        self.group.average_gradients(self.model)
        rate = learning_rate(t, self.step, self.total)
        if t.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), t.clip)
        self.optimizer.step(rate)
        if self.reservoir is not None and self.group.leads:
            self.reservoir.add(features.mixing_TBM, seed=t.seed + self.step)
        self.step += 1
        if t.ema_decay:
            decay = min(t.ema_decay, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(
                    list(self.averaged.parameters()), list(self.model.parameters()), 1 - decay
                )
        return terms, features, rate

    def _finite(self, loss: Tensor, rate: float) -> float:
        value = float(loss.detach())
        if self.group.any(not math.isfinite(value), self.device):
            raise self._diverged(f"the loss is {value} at step {self.step}, learning rate {rate:.2e}")
        return value

    def _diverged(self, what: str) -> DivergedError:
        self._close()
        kept = checkpoint.existing(self.folder / "checkpoints", LAST)
        return DivergedError(
            f"{what}: try a lower training.learning_rate, a longer training.warmup or a smaller "
            "training.clip; "
            + (f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was written yet")
        )

    def _record(self, terms: Terms, features: Features, rate: float, speed: float) -> None:
        measured = terms._asdict()
        if self.config.model.spectral:
            rebuilt, embedded = features.rebuilt_TBD.detach(), features.embedded_TBD.detach()
            measured["cosine"] = functional.cosine_similarity(rebuilt.float(), embedded.float(), -1).mean()
        values = {name: self.group.mean(term) for name, term in measured.items() if term is not None}
        if self.recorder is not None:
            values |= {"learning_rate": rate, "tokens_per_second": speed}
            self.recorder.add(self.step, self.epoch, values)

    def _validate(self) -> float:
        """Score the validation text, keep the weights if they are the best so far, refit the mixture."""
        nll = torch.zeros((), dtype=torch.float64, device=self.device)
        if self.group.leads:
            nll += total_nll(self.averaged, self.corpus.valid.tokens, lanes=VALID_LANES)
        value = float(self.group.share(nll))
        if not math.isfinite(value):
            raise self._diverged(f"the loss of the validation text is {value} after step {self.step}")
        word_perplexity = perplexity(value, self.corpus.valid.num_words)
        if value < self.best:
            self.best, self.stale = value, 0
            if self.group.leads:
                weights = {f"model.{name}": tensor for name, tensor in self.averaged.state_dict().items()}
                values = {"valid_nll": value, "valid_word_perplexity": word_perplexity}
                checkpoint.save(
                    Checkpoint(weights, values), self.folder / "checkpoints", BEST, self.step, keep=1
                )
        else:
            self.stale += 1
        if self.recorder is not None:
            per_token = perplexity(value, len(self.corpus.valid) - 1)
            self.recorder.add(
                self.step,
                self.epoch,
                {"valid_token_perplexity": per_token, "valid_word_perplexity": word_perplexity},
            )
            draw_curve(self.folder)
        if self.reservoir is not None:
            self._refit(self.reservoir.collected())
        return word_perplexity

    def _refit(self, vectors: NDArray[np.float32]) -> None:
        t = self.config.training
        if self.group.leads and len(vectors) >= t.num_components:
            self.prior = fit_mixture(vectors, t.num_components, self.prior, t.seed)
            install(self.objective, self.prior)
        for buffer in self.objective.buffers(recurse=False):
            self.group.share(buffer)

    def _finish(self) -> None:
        """Fit the mixture that is exported to the weights that are exported."""
        if self.group.leads:
            if self.config.model.spectral:
                self._fit_last()
            self._close()

    def _fit_last(self) -> None:
        best = checkpoint.existing(self.folder / "checkpoints", BEST)
        load_weights(self.averaged, checkpoint.load(best[-1]))
        t = self.config.training
        vectors = mixing_sample(self.averaged, self.corpus.train.tokens, VECTORS_AT_END, t.seed)
        prior = fit_mixture(vectors, t.num_components, self.prior, t.seed)
        with replacing(self.folder / "gmm.npz", CheckpointError) as file:
            np.savez(file, **prior)  # type: ignore[arg-type]

    def _close(self) -> None:
        if self.recorder is not None:
            self.recorder.close()
            draw_curve(self.folder)

    def _save(self) -> float:
        state = self.group.gather(self.state)
        if self.group.leads:
            tensors = {"state": state}
            tensors |= {f"model.{name}": t for name, t in self.model.state_dict().items()}
            if self.config.training.ema_decay:
                tensors |= {f"average.{name}": t for name, t in self.averaged.state_dict().items()}
            tensors |= {f"optimizer.{name}": t for name, t in self.optimizer.moments().items()}
            if self.reservoir is not None:
                tensors["reservoir"] = self.reservoir.vectors
            if self.prior is not None:
                tensors |= {f"prior.{name}": torch.from_numpy(a) for name, a in self.prior.items()}
            values: dict[str, Any] = {
                "step": self.step,
                "best": self.best if math.isfinite(self.best) else None,
                "stale": self.stale,
                "num_collected": self.reservoir.num_added if self.reservoir is not None else 0,
                "seconds": self.seconds + time.perf_counter() - self.began,
                "corpus": self.corpus.train.sha256,
                "valid": self.corpus.valid.sha256,
                "settings": _fitted(self.config),
                "precision": self.precision,
            }
            checkpoint.save(Checkpoint(tensors, values), self.folder / "checkpoints", LAST, self.step)
        return time.perf_counter()

    def _restore(self, saved: Checkpoint) -> None:
        values = saved.values
        for key, what, now in (
            ("corpus", "trained", self.corpus.train.sha256),
            ("valid", "validated", self.corpus.valid.sha256),
        ):
            if (then := values.get(key, now)) != now:
                raise CheckpointError(
                    f"{self.folder} was {what} on another text (sha256 {then[:12]}…, now {now[:12]}…): "
                    "resume with the text that it began with"
                )
        settings = _fitted(self.config)
        for name, made_with in values.get("settings", settings).items():
            if (got := settings.get(name)) != made_with:
                raise CheckpointError(
                    f"{self.folder}/config.json: {name} is {got!r}, and the checkpoint is of {made_with!r}: "
                    "put that back, or train into another folder"
                )
        try:
            self.model.load_state_dict(saved.part("model"))
        except RuntimeError as reason:
            raise CheckpointError(
                f"the checkpoint in {self.folder} does not fit its config: {reason}"
            ) from reason
        if self.config.training.ema_decay:
            load_weights(self.averaged, saved)
        self.optimizer.restore(saved.part("optimizer"))
        share = len(self.state)
        self.state = saved.tensors["state"][self.group.rank * share :][:share].to(self.device)
        if self.reservoir is not None:
            self.reservoir.vectors = saved.tensors["reservoir"]
            self.reservoir.num_added = values["num_collected"]
        self.seconds = values.get("seconds", 0.0)
        if prior := saved.part("prior"):
            self.prior = {name: tensor.numpy() for name, tensor in prior.items()}
            install(self.objective, self.prior)
        if not self.precision_asked:
            self.precision = values.get("precision", self.precision)
        self.step, self.stale = values["step"], values["stale"]
        kept = checkpoint.existing(self.folder / "checkpoints", BEST)
        self.best = values["best"] if kept and values["best"] is not None else math.inf


def _fitted(config: RunConfig) -> dict[str, Any]:
    """Return the settings that a checkpoint fits, by name."""
    values = config.to_dict()
    found = {f"{table}.{name}": value for table in ("model", "loss") for name, value in values[table].items()}
    return found | {f"training.{name}": values["training"][name] for name in FITTED}


def _write_text(path: Path, text: str) -> None:
    with replacing(path, CheckpointError) as file:
        file.write(text.encode())
