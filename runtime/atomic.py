"""Files that are there whole or not at all: written beside their place, synced, and renamed."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .errors import SdgmError

_STALE_SECONDS = 24 * 3600
_REMEDY = "free some space, or choose a place that you may write to"


def beside(target: Path) -> Path:
    """A path beside `target` that nobody else uses.

    Raises:
        ValueError: `target` can name no file: it is empty, a root, or holds what no path can, such as a NUL.
    """
    os.access(target, os.F_OK)
    return target.with_name(f".{target.name}.{os.urandom(6).hex()}.partial")


@contextmanager
def writing(target: Path, kind: type[SdgmError], remedy: str = _REMEDY) -> Iterator[Path]:
    """Give a path beside `target` to write to; what the system refuses becomes an error of `kind`."""
    try:
        partial = beside(target)
    except ValueError as e:
        raise kind(f"{target}: cannot be written: {e}; give a path that names a file or folder") from e
    try:
        yield partial
    except OSError as e:
        raise kind(f"{target}: cannot be written: {e.strerror or e}; {remedy}") from e


def sweep(folder: Path, pattern: str) -> None:
    """Remove what writers left behind in a folder that were killed a day ago or earlier."""
    for left in folder.glob(pattern):
        with suppress(OSError):  # another writer was quicker, or it is not ours to remove
            if time.time() - left.lstat().st_mtime > _STALE_SECONDS:
                remove(left)


def remove(path: Path) -> None:
    """Remove a folder and all in it, or a file, or a link and nothing that it names."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def synced(path: Path) -> Iterator[IO[bytes]]:
    """A new file that is on the disk when the block ends."""
    with open(path, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Put a file that was written and closed on the disk."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Put the names in a folder on the disk, where the system can."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_place(target: Path, kind: type[SdgmError]) -> None:
    """Refuse, before the work, a place that cannot be written to; folders on the way to it are made later.

    Raises:
        SdgmError: of class `kind`.
    """
    refused = _stranger(target) if target.name else "it names no file or folder"
    nearest = next((folder for folder in target.absolute().parents if os.path.lexists(folder)), target)
    if refused is None and not nearest.is_dir():
        refused = f"{nearest} is no folder"
    if refused is None and not os.access(nearest, os.W_OK | os.X_OK):
        refused = f"{nearest} may not be written to"
    if refused is not None:
        raise kind(f"{target}: cannot be written: {refused}; choose a place that you may write to")


def _stranger(target: Path) -> str | None:
    """What is there and can be replaced by no file or folder: a device such as /dev/null, or a pipe."""
    there = target.exists() and not target.is_file() and not target.is_dir()
    return "what is there is neither a file nor a folder" if there else None


@contextmanager
def replacing(target: Path, kind: type[SdgmError]) -> Iterator[IO[bytes]]:
    """A file that takes the place of `target` when the block ends well, and leaves no trace when it does not.

    Its folder is made if need be. Of a link, what it names is replaced; who may read a file that was there
    may read the new one, and nobody else.

    Raises:
        SdgmError: of class `kind`, when the system refuses (a full disk, a folder that is not ours), and for
            what is neither a file nor a folder.
    """
    if os.path.islink(target):
        target = Path(os.path.realpath(target))
    with writing(target, kind) as partial:
        if refused := _stranger(target):
            raise kind(f"{target}: cannot be written: {refused}; name a file")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with synced(partial) as file:
                if target.is_file():
                    shutil.copymode(target, partial)
                yield file
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        sync_folder(target.parent)


@contextmanager
def replacing_folder(target: Path, kind: type[SdgmError], remedy: str = _REMEDY) -> Iterator[Path]:
    """A folder to fill with files that takes the place of `target`, as `replacing` does it with a file.

    Raises:
        SdgmError: of class `kind`, when the system refuses, with `remedy` at its end.
    """
    with writing(target, kind, remedy) as partial:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.mkdir()
            yield partial
            for path in partial.iterdir():
                sync_file(path)
            sync_folder(partial)
            _replace_folder(partial, target)
        finally:
            remove(partial)
        sync_folder(target.parent)


def _replace_folder(partial: Path, target: Path) -> None:
    if not os.path.lexists(target):
        os.rename(partial, target)
        return
    old = partial.with_suffix(".old.partial")
    os.rename(target, old)
    try:
        os.rename(partial, target)
    except BaseException:  # an interrupt too: what was there is there again
        os.rename(old, target)
        raise
    remove(old)
