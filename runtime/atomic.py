"""Files that are there whole or not at all: written beside their place, synced, and renamed."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .errors import SdgmError


@contextmanager
def writing(target: Path, kind: type[SdgmError]) -> Iterator[Path]:
    """Give a path beside `target` to write to; what the system refuses becomes an error of `kind`."""
    partial = target.with_name(f".{target.name}.{secrets.token_hex(6)}.partial")
    try:
        yield partial
    except OSError as e:
        remedy = "free some space, or choose a place that you may write to"
        raise kind(f"{target}: cannot be written: {e.strerror or e}; {remedy}") from e


@contextmanager
def synced(path: Path) -> Iterator[IO[bytes]]:
    """A new file that is on the disk when the block ends."""
    with open(path, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Put the names in a folder on the disk, where the system can."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_file(target: Path, data: bytes, kind: type[SdgmError]) -> None:
    """Put `data` at `target` by one rename."""
    with writing(target, kind) as partial:
        try:
            with synced(partial) as file:
                file.write(data)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        sync_folder(target.parent)
