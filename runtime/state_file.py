"""The file of a session: a header, float32 and uint32 numbers, and the sha256 of all that."""

import hashlib
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .atomic import replacing
from .container import shown
from .engine import Blend, Floats
from .errors import StateError
from .manifest import BundleConfig
from .parameters import RECENT

MOST_HISTORY = 4096
"""Tokens that a session can be rewound by at most."""

_MAGIC, _VERSION = b"SDGMSTAT", 1
# magic, version, model, variant, position, numbers of segments, ids, recent and drawn, η
_HEADER = struct.Struct("<8sI32s8sQ4If")
_DIGEST = 32


class Identity(NamedTuple):
    """What a state belongs to."""

    model_id: str
    """sha256 of the model, in hexadecimal."""
    variant: str
    """Name of the variant."""


class Saved(NamedTuple):
    """What a file holds of a session."""

    position: int
    """Tokens fed."""
    state_S: Floats
    """The state before the first run."""
    runs: list[list[int]]
    """Tokens that were run together, the last of them at the end of the text."""
    recent: list[int]
    """The last tokens, for penalties."""
    blend: Blend | None
    """How the mixing vector of the last run is moved."""


def write_state(path: Path, identity: Identity, saved: Saved) -> None:
    """Write the file, as a whole or not at all. Raises StateError."""
    lengths, ids = [len(run) for run in saved.runs], [token for run in saved.runs for token in run]
    strength, drawn_M = saved.blend or Blend(0.0, np.zeros(0, np.float32))
    header = _HEADER.pack(
        _MAGIC, _VERSION, bytes.fromhex(identity.model_id), identity.variant.encode(), saved.position,
        len(lengths), len(ids), len(saved.recent), len(drawn_M), strength,
    )  # fmt: skip
    integers = np.array(lengths + ids + saved.recent, "<u4")
    floats = saved.state_S.astype("<f4").tobytes(), drawn_M.astype("<f4").tobytes()
    body = b"".join((header, floats[0], integers.tobytes(), floats[1]))
    with replacing(path, StateError) as file:
        file.write(body + hashlib.sha256(body).digest())


def read_state(path: Path, identity: Identity, config: BundleConfig) -> Saved:
    """Read a file, everything in it checked.

    Raises:
        StateError: it is missing, damaged, of another version, or of another model.
    """
    again = "save the session again"
    most = config.state_size + 3 * (MOST_HISTORY + config.chunk) + RECENT + config.mixing_size
    data = _read(path, _HEADER.size + 4 * most + _DIGEST)
    if data[: len(_MAGIC)] != _MAGIC:
        raise StateError(f"{path}: not a state file: expected {_MAGIC!r}, got {data[:8]!r}; check the path")
    if len(data) < _HEADER.size + _DIGEST:
        least = _HEADER.size + _DIGEST
        raise StateError(f"{path}: cut: expected at least {least} bytes, got {len(data)}; {again}")
    fields = _HEADER.unpack_from(data)
    _, version, model, name, position, num_segments, num_ids, num_recent, num_drawn, strength = fields
    if version != _VERSION:
        remedy = "upgrade with: pip install --upgrade sdgm-edge" if version > _VERSION else again
        raise StateError(f"{path}: another version: expected {_VERSION}, got {version}; {remedy}")
    if hashlib.sha256(data[:-_DIGEST]).digest() != data[-_DIGEST:]:
        raise StateError(f"{path}: damaged: its sha256 does not match its content; {again}")
    if model.hex() != identity.model_id:
        raise StateError(
            f"{path}: of another model: expected {identity.model_id[:16]}…, got {model.hex()[:16]}…; "
            "load it with the bundle that it was saved with, and as many atoms"
        )
    variant = name.rstrip(b"\0").decode("ascii", "replace")
    if variant != identity.variant:
        expected, got = identity.variant, shown(variant)
        remedy = f"load the bundle with variant={got}"
        raise StateError(f"{path}: of another variant: expected {expected}, got {got}; {remedy}")
    counts = (config.state_size, num_segments, num_ids, num_recent, num_drawn)
    if len(data) != _HEADER.size + 4 * sum(counts) + _DIGEST or num_drawn not in (0, config.mixing_size):
        raise StateError(f"{path}: of another shape: expected lengths that add up, got {counts}; {again}")
    numbers = np.frombuffer(data, "<u4", sum(counts), _HEADER.size)
    state, lengths, ids, recent, drawn = np.split(numbers, np.cumsum(counts[:-1]))
    floats_S, drawn_M = state.view("<f4").astype(np.float32), drawn.view("<f4").astype(np.float32)
    if not (np.isfinite(floats_S).all() and np.isfinite(drawn_M).all() and 0 <= strength <= 1):
        raise StateError(f"{path}: expected finite numbers, got NaN or infinity; {again}")
    fits = num_segments and lengths.min() > 0 and lengths.max() <= config.chunk and lengths.sum() == num_ids
    if not fits or max(ids.max(), recent.max(initial=0)) >= config.vocab_size:
        raise StateError(
            f"{path}: expected tokens below {config.vocab_size} in short runs, got others; {again}"
        )
    runs = [run.tolist() for run in np.split(ids, np.cumsum(lengths[:-1]))]
    blend = Blend(strength, drawn_M) if num_drawn else None
    return Saved(position, floats_S, runs, recent.tolist(), blend)


def _read(path: Path, cap: int) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(cap + 1)
    except (OSError, ValueError) as e:  # the latter of what no path can hold, such as a NUL
        why = getattr(e, "strerror", None) or e
        raise StateError(f"{path}: cannot be read: {why}; check the path and its permissions") from e
    if len(data) > cap:
        raise StateError(f"{path}: too large for this model: expected at most {cap} bytes; check the path")
    return data
