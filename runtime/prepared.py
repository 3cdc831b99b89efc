"""The weights of a graph as this CPU's kernels want them, kept in files that all processes map.

ONNX Runtime packs weights for the CPU when it makes a session, into memory of each process. Here that is done
once: the optimized graph and its packed weights are written to the user's cache folder, and a session made of
them maps the file. The weights then cost no private memory, and other processes share them. The speed and the
results are the same, and a session is made in half the time.

An entry belongs to one graph with so many of its atoms, one release of ONNX Runtime and one CPU, and its name
is the digest of these: where one of them changes, another entry is made. So it is where a process may use one
core alone: ONNX Runtime 1.32 packs int8 otherwise there on a CPU with AMX, and given the other form makes its
own, in memory. It appears whole, by one rename; of
two processes that make it at once, one wins and both use that. It is kept only if it computes what the graph
computes: ONNX Runtime 1.31 reads 4-bit weights wrongly that it wrote at some offsets of the file (at 2400,
not at multiples of 64).

Only its owner may write to an entry: one that others could have written is refused, and so is one that is not
as it was made. `prepare` compares every file with its recorded sha256. Loading does so for the graph, and for
the weights unless size, inode and times of change are those of the moment when they were hashed, which no
write leaves as they are: hashing 24 MB takes 19 ms of a load of 50 (docs/footprint.md). What only a hash can
find, a disk that forgets, `sdgm-edge prepare` finds.
"""

import hashlib
import os
import platform
import shutil
import stat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .atomic import beside, sweep, sync_file, sync_folder, synced
from .bundle import Bundle
from .engine import Engine, Floats
from .errors import BundleError, CacheError
from .manifest import decode_json, encode_json
from .providers import note, onnxruntime, save_optimized

FORMAT = 1
TOLERANCE = 1e-3
"""The largest difference of a logit, relative and absolute; it is 0 where weights are packed rightly."""
GRAPH, RECORD = "model.onnx", "prepared.json"
_CPU_FIELDS = {
    "vendor_id", "cpu family", "model", "model name", "stepping", "flags",
    "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features", "isa",
}  # fmt: skip


class Prepared(NamedTuple):
    """A graph in the cache, checked."""

    folder: Path
    """Its entry; it may be removed at any time, and is made again when it is needed."""
    variant: str
    """The variant of the bundle."""
    num_bytes: int
    """All its files."""
    made: bool
    """Whether it was made now."""

    @property
    def graph(self) -> Path:
        """What a session is made of."""
        return self.folder / GRAPH


def prepare(
    bundle: Bundle, variant: str | None = None, *, cache: Path | None = None, thorough: bool = True
) -> Prepared:
    """Find a variant's prepared form in the cache, or make it; check it either way.

    `thorough`: hash every file; otherwise weights that were not touched since they were hashed are believed.

    Raises:
        BundleError: the bundle lacks the variant, or is damaged.
        CacheError: others may write to the cache, it is damaged or cannot be written, or what ONNX Runtime
            packs computes something else.
        ProviderError: ONNX Runtime is not there.
    """
    chosen = bundle.variant(variant)
    identity = {
        "format": FORMAT,
        "graph": bundle.manifest.files[chosen.file][0],
        "atoms": bundle.atoms,
        "onnxruntime": onnxruntime().__version__,
        "cpu": cpu_identity(),
        "one_core": usable_cores() == 1,
    }
    root = (cache or cache_folder()) / "prepared"
    folder = root / hashlib.sha256(encode_json(identity)).hexdigest()[:32]
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        root.mkdir(mode=0o700, exist_ok=True)
        _check_private(root, root)
        if made := not os.path.lexists(folder):
            _make(bundle, chosen.name, folder, identity)
        num_bytes = _check(folder, identity, thorough)
    except OSError as e:
        raise CacheError(
            f"{folder}: the cache cannot be used: {e.strerror or e}; "
            "free some space, name another folder in SDGM_EDGE_CACHE, or go without preparing"
        ) from e
    return Prepared(folder=folder, variant=chosen.name, num_bytes=num_bytes, made=made)


def cache_folder() -> Path:
    """Where things are kept that can be made again: `$SDGM_EDGE_CACHE`, or the user's cache folder.

    Raises:
        CacheError: neither is there.
    """
    if named := os.environ.get("SDGM_EDGE_CACHE"):
        return Path(named)
    if base := os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA"):
        return Path(base) / "sdgm-edge"
    try:
        return Path.home() / ".cache" / "sdgm-edge"
    except RuntimeError as e:  # a user without an entry in the file of users, as containers have them
        raise CacheError(
            "there is no home folder to keep a cache in; name a folder of your own in SDGM_EDGE_CACHE"
        ) from e


def usable_cores() -> int:
    """How many cores this process may use; 0 where that is not told."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 0


def cpu_identity() -> dict[str, str]:
    """What kernels are chosen by; the machine's name where its features are not told."""
    found = {"machine": platform.machine()}
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return found | {"processor": platform.processor(), "node": platform.node()}
    for line in info.read_text().splitlines():
        name, _, value = (part.strip() for part in line.partition(":"))
        if name in _CPU_FIELDS:
            found.setdefault(name, value)
    return found


def _make(bundle: Bundle, variant: str, folder: Path, identity: dict[str, Any]) -> None:
    """Write an entry beside its place and rename it; where another process was quicker, its entry stays."""
    root = folder.parent
    sweep(root, ".*.partial")
    partial = beside(folder)
    partial.mkdir(mode=0o700)
    try:
        graph, where = bundle.graph(variant), f"{bundle.path}: {variant}"
        plain = _logits(graph, bundle, where)
        try:
            save_optimized(graph, partial / GRAPH)
            packed = _logits(partial / GRAPH, bundle, where)
        except BundleError as e:
            with synced(partial / "room") as file:  # of a full disk ONNX Runtime does not say that it is
                file.write(bytes(bundle.size(variant)))
            why = " ".join(str(e.__cause__ or e).split())[:200]
            raise CacheError(f"{where} cannot be prepared in {root}: {why}; go without preparing") from e
        if not np.allclose(packed, plain, rtol=TOLERANCE, atol=TOLERANCE):
            got = f"a difference of {np.abs(packed - plain).max():.3g}"
            raise CacheError(
                f"{where} cannot be prepared: expected the logits that it gives unprepared, got {got}: "
                f"ONNX Runtime {identity['onnxruntime']} packs it wrongly; go without preparing"
            )
        files = {}
        for path in sorted(partial.iterdir()):
            path.chmod(0o600)
            sync_file(path)
            files[path.name] = _account(path)
        with synced(partial / RECORD) as file:
            os.chmod(file.name, 0o600)
            file.write(encode_json({**identity, "files": files}))
        sync_folder(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        sync_folder(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    note("prepared %s of %s for this CPU in %s", variant, bundle.path, folder)


def _logits(graph: Path | bytes, bundle: Bundle, where: str) -> Floats:
    """What a graph says after some tokens one by one, and after the same at once."""
    engine = Engine(graph, bundle.config, where, providers="cpu")
    count = min(engine.chunk, 16)
    ids = [i * (bundle.config.vocab_size - 1) // count for i in range(1, count + 1)]
    rows, state = [], engine.zeros()
    for i in ids:
        logits_V, state = engine.last([i], state)
        rows.append(logits_V.copy())
    return np.concatenate([rows, engine.all(ids, engine.zeros())[0]])


def _check(folder: Path, identity: dict[str, Any], thorough: bool) -> int:
    """Refuse an entry that others could have written, or that is not as it was made; the bytes in it."""
    paths = sorted(folder.iterdir())
    for path in (folder, *paths):
        _check_private(path, folder)
    try:
        told = decode_json((folder / RECORD).read_bytes(), str(folder / RECORD))
        files = told.pop("files")
        recorded = {name: (entry["sha256"], entry["stamp"]) for name, entry in files.items()}
    except (BundleError, FileNotFoundError, KeyError, AttributeError, TypeError):
        raise _refused(folder, folder, "a readable record", f"a damaged {RECORD}") from None
    if told != identity or GRAPH not in recorded or {path.name for path in paths} != {RECORD, *recorded}:
        raise _refused(folder, folder, "the files that were recorded when it was made", "others")
    for name, (sha256, stamp) in recorded.items():
        path = folder / name
        touched = thorough or name == GRAPH or os.name != "posix" or stamp != _stamp(path)
        if touched and _account(path)["sha256"] != sha256:
            raise _refused(path, folder, f"sha256 {str(sha256)[:16]}…", "another")
    return sum(path.stat().st_size for path in paths)


def _check_private(path: Path, entry: Path) -> None:
    """Require a folder or file that nobody else may write to (on Windows, folders of users are so)."""
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) and not stat.S_ISREG(status.st_mode):
        raise _refused(path, entry, "a folder or a regular file", "a link or device")
    if os.name != "posix":
        return
    if status.st_uid not in (0, os.getuid()):
        raise _refused(path, entry, "one of your own", f"one of user {status.st_uid}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _refused(path, entry, "one that you alone may write to", stat.filemode(status.st_mode))


def _refused(path: Path, entry: Path, expected: str, got: str) -> CacheError:
    return CacheError(
        f"{path}: the prepared form is not used: expected {expected}, got {got}; "
        f"remove {entry}, and it is made again"
    )


def _account(path: Path) -> dict[str, Any]:
    """What is recorded of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"sha256": digest, "stamp": _stamp(path)}


def _stamp(path: Path) -> list[int]:
    """What changes with every write, whatever is done to the file's dates afterwards."""
    status = path.stat()
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
