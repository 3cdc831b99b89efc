"""A run folder: where a training leaves its config, tokenizer, checkpoints, mixture and log.

config.json  tokenizer.json  heldout.txt  gmm.npz  log.csv  curve.png  tensorboard/
checkpoints/last-<step>/  checkpoints/best-<step>/
"""

from __future__ import annotations

import itertools
import json
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sdgm_edge.runtime import ConfigError, RunError, UsageError, check_place, replacing

if TYPE_CHECKING:
    from sdgm_edge.checkpoint import Checkpoint
    from sdgm_edge.config import RunConfig
    from sdgm_edge.models import LanguageModel, ModelConfig

RUNS = Path("runs")
CONFIG, TRIAL = "config.json", "trial.json"
FILES = {
    CONFIG, "tokenizer.json", "heldout.txt", "gmm.npz", "log.csv", "curve.png", "tensorboard", "checkpoints",
    TRIAL, "result.json",
}  # fmt: skip
"""What training leaves in a folder, and `compare` beside it."""


@dataclass(frozen=True, slots=True)
class Run:
    """A trained run, ready to be evaluated or exported."""

    path: Path
    config: ModelConfig
    model: LanguageModel
    """With the best weights, in evaluation mode."""
    tokenizer_path: Path
    prior: dict[str, NDArray[np.float32]] | None
    """The mixture: `weights`, `means`, `variances`; None for a baseline, and before the end."""
    heldout: str
    """A piece of the validation text."""


def name_of(sources: Sequence[str]) -> str:
    """Return what a folder for these texts is called: nothing in it means anything to a shell."""
    if not sources:
        return "pydoc"
    first = "text" if "-" in sources else Path(sources[0]).name.split(".")[0]
    return re.sub(r"[^\w+-]+", "-", first).strip("-") or "text"


def new_folder(root: Path, config: RunConfig) -> Path:
    """Return a folder under `root` that no run uses, named after the text and the preset."""
    name = f"{name_of(config.corpus.train)}-{config.preset}"
    return next(
        p for i in itertools.count(1) if not (p := root / (name if i == 1 else f"{name}-{i}")).exists()
    )


def check_unused(folder: Path) -> None:
    """Raise RunError where a new run would write over something, or may not write.

    A run that ended before its first checkpoint is nothing to go on with: a new one takes its place.
    """
    check_place(folder / CONFIG, RunError)
    if (folder / "manifest.json").exists():
        raise RunError(f"{folder} holds a bundle: expected a folder for a run; choose another --out")
    begun = _is_config(folder / CONFIG)
    if begun and any((folder / "checkpoints").glob("*-*")):
        raise RunError(f"{folder} holds a run already: go on with it by --resume, or choose another --out")
    there = {path.name for path in folder.glob("*") if not path.name.startswith(".")}
    if strangers := sorted(there - (FILES if begun else {TRIAL})):
        raise RunError(
            f"{folder} holds {strangers[0]}: expected a new folder for a run, or an empty one; "
            "choose another --out"
        )


def _is_config(path: Path) -> bool:
    """Whether a file is the config of a run, and not another program's of that name."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and {"preset", "corpus", "training"} <= values.keys()


def is_run(path: Path, **of_bundles: object) -> bool:
    """Tell whether a path is that of a run, which is asked for nothing that chooses in a bundle.

    Raises:
        UsageError: it is, and `of_bundles`, options by name, has one that was given.
    """
    bundle = (path / "manifest.json").is_file()
    found = (path / "checkpoints").is_dir() or ((path / "config.json").is_file() and not bundle)
    if found and (chosen := {name: value for name, value in of_bundles.items() if value is not None}):
        flags = " ".join(f"--{name} {value}" for name, value in chosen.items())
        raise UsageError(f"{flags} chooses in a bundle, and {path} is a run: export it first")
    return found


def newest_run(root: Path = RUNS) -> Path:
    """Return the run under `root` that was worked on last."""
    saved = (path for path in root.glob("*/checkpoints") if path.is_dir())  # others died before they saved
    runs = [path.parent for path in saved]
    if not runs:
        raise RunError(
            f"no trained run under {root}/: train one first (sdgm-edge train), or name a run folder"
        )
    return max(runs, key=lambda run: ((run / "checkpoints").stat().st_mtime_ns, run.name))


def read_run_config(folder: Path) -> RunConfig:
    """Return the config that a run was started with."""
    from sdgm_edge.config import RunConfig

    path = folder / CONFIG
    if (folder / "manifest.json").is_file():
        raise RunError(f"{folder} is a bundle: expected a run folder, as sdgm-edge train makes it")
    if not path.is_file():
        raise RunError(
            f"{folder} is not a run folder: it has no config.json; expected one made by sdgm-edge train"
        )
    try:
        values = json.loads(path.read_bytes())
    except ValueError as reason:
        raise RunError(f"{path} is damaged: {reason}; train again into another folder") from reason
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return RunConfig.from_dict(values, str(path))


def load_run(folder: Path, device: str = "cpu") -> Run:
    """Load a run with its best weights: of the best validation, or of the last checkpoint before any.

    Raises:
        RunError: the folder is not a run, or has no checkpoint yet.
        CheckpointError: the checkpoint is damaged.
    """
    from sdgm_edge.models import build_model

    config = read_run_config(folder).model
    model = build_model(config)
    load_weights(model, best_checkpoint(folder))
    with _whole(folder / "gmm.npz") as path:
        prior = _read_prior(path) if path.exists() else None
    with _whole(folder / "heldout.txt") as path:
        heldout = path.read_bytes().decode()  # its line ends as they are
        if not heldout:
            raise EOFError
    return Run(folder, config, model.to(device).eval(), folder / "tokenizer.json", prior, heldout)


def best_checkpoint(folder: Path) -> Checkpoint:
    """Return the best weights of a run: of the best validation, or of the last checkpoint before any.

    Raises:
        RunError: it has no checkpoint yet.
        CheckpointError: the checkpoint is damaged.
    """
    from sdgm_edge import checkpoint

    root = folder / "checkpoints"
    found = checkpoint.existing(root, checkpoint.BEST) or checkpoint.existing(root, checkpoint.LAST)
    if not found:
        raise RunError(f"{folder} has no checkpoint yet: let it train for a while, or go on with --resume")
    return checkpoint.load(found[-1])


def with_copy_window(run: Run, copy_window: int) -> Run:
    """Let the head of a run look back over so many tokens: its weights fit any number.

    Raises:
        UsageError: the head does not point, or the number is less than 1.
    """
    from sdgm_edge.models import build_model

    if not run.config.copy_window:
        raise UsageError(
            f"copy_window: expected a run whose head points, got {run.path} with a plain one; "
            "leave it out, or train with model.copy_window"
        )
    if copy_window < 1:
        raise UsageError(f"copy_window: expected a number of tokens from 1, got {copy_window}")
    config = replace(run.config, copy_window=copy_window)
    model = build_model(config).to(next(run.model.parameters()).device).eval()
    model.load_state_dict(run.model.state_dict())
    return replace(run, config=config, model=model)


def _read_prior(path: Path) -> dict[str, NDArray[np.float32]]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in ("weights", "means", "variances")}


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Raise RunError where a file of a run is not there or not what it should be."""
    try:
        yield path
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as reason:
        raise RunError(
            f"{path} is missing or damaged ({type(reason).__name__}): copy the run again, or train again"
        ) from reason


def load_weights(model: LanguageModel, saved: Checkpoint) -> None:
    """Put a checkpoint's weights into a model: the averaged ones where there are any."""
    from sdgm_edge.runtime import CheckpointError

    try:
        model.load_state_dict(saved.part("average") or saved.part("model"))
    except RuntimeError as reason:
        raise CheckpointError(f"the checkpoint does not fit the run's config: {reason}") from reason


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder for one process; the system lets go of it however the process ends.

    A folder that is made here and stays empty, because nothing could be trained, is taken away again.

    Raises:
        RunError: another process holds it, or it cannot be made or written to.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as reason:
        raise RunError(
            f"{folder} cannot be a run folder: {reason.strerror}; choose an --out that you may write to"
        ) from reason
    try:
        with lock:
            try:
                _lock(lock.fileno())
            except OSError:
                raise RunError(
                    f"another run is writing to {folder}: wait for it, or choose another --out"
                ) from None
            yield
    finally:
        if made and os.listdir(folder) == [".lock"]:
            (folder / ".lock").unlink()
            folder.rmdir()


def _lock(descriptor: int) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote. Raises RunError."""
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as reason:
        raise RunError(f"{path} is damaged ({reason}): delete it, and its work is done again") from reason
    return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write values, whole or not at all."""
    with replacing(path, RunError) as file:
        file.write((json.dumps(values, indent=2, allow_nan=False) + "\n").encode())
