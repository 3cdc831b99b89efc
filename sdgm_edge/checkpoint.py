"""Checkpoints: a folder of one safetensors file and one JSON file, whole or not there. Nothing is pickled.

A run keeps its newest two, and the best weights. The JSON carries the tensors' sha256, so that a damaged pair
is told from a good one before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from sdgm_edge.runtime import CheckpointError, replacing_folder, sweep

VERSION = 1
KEPT = 2
LAST, BEST = "last", "best"
"""Names: what a run goes on from, and what it is evaluated and exported with."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Named tensors and a few plain values."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose name starts with `prefix.`, without it."""
        return {
            name.removeprefix(prefix + "."): t
            for name, t in self.tensors.items()
            if name.startswith(prefix + ".")
        }


def save(checkpoint: Checkpoint, root: Path, name: str, step: int, keep: int = KEPT) -> Path:
    """Write `root/name-<step>` atomically, then drop all but the newest `keep` of that name.

    Raises:
        CheckpointError: the disk refuses; what was there before stays.
    """
    target = root / f"{name}-{step:09d}"
    data = save_tensors({key: t.detach().cpu().contiguous() for key, t in checkpoint.tensors.items()})
    meta = {
        "version": VERSION,
        "sha256": hashlib.sha256(data).hexdigest(),
        "step": step,
        "values": checkpoint.values,
    }
    kept = existing(root, LAST)
    rest = f"go on from {kept[-1]} with --resume" if kept else "train again: there is no earlier one"
    with replacing_folder(target, CheckpointError, remedy=f"free some space and {rest}") as folder:
        (folder / "tensors.safetensors").write_bytes(data)
        (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    sweep(root, ".*.partial")
    for old in existing(root, name)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def existing(root: Path, name: str) -> list[Path]:
    """Return the checkpoints of that name, oldest first."""
    return sorted(p for p in root.glob(f"{name}-*") if p.is_dir())


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint back.

    Raises:
        CheckpointError: a file is missing, damaged or of another version.
    """
    remedy = "delete that folder to go on from the checkpoint before it"
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        data = (folder / "tensors.safetensors").read_bytes()
        version, digest, values = meta["version"], meta["sha256"], meta["values"]
    except OSError as reason:
        raise CheckpointError(
            f"checkpoint {folder} cannot be read: {reason.strerror or reason}; {remedy}"
        ) from reason
    except (ValueError, KeyError, TypeError) as reason:
        raise CheckpointError(f"checkpoint {folder}/meta.json is damaged ({reason!r}); {remedy}") from reason
    if version != VERSION:
        raise CheckpointError(
            f"checkpoint {folder} has version {version!r}, this sdgm-edge reads version {VERSION}: "
            "use the sdgm-edge that wrote it, or train again"
        )
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise CheckpointError(
            f"checkpoint {folder}/tensors.safetensors is truncated or damaged: "
            f"expected sha256 {digest[:12]}…, got {found[:12]}… over {len(data)} bytes; {remedy}"
        )
    try:
        return Checkpoint(load_tensors(data), values)
    except SafetensorError as reason:
        raise CheckpointError(
            f"checkpoint {folder}/tensors.safetensors is damaged ({reason}); {remedy}"
        ) from reason
