"""Files that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from sdgm_edge.runtime import SdgmError


@contextmanager
def replacing(path: Path, error: type[SdgmError]) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends well, and leaves no trace when it does not.

    Until it is safe on the disk it lies beside `path`, whose folder is made if need be.

    Raises:
        SdgmError: of class `error`, when the system refuses (a full disk, a folder that is not ours).

    Example:
        >>> with replacing(Path("/no/such/place/note.txt"), SdgmError) as file:
        ...     file.write(b"all of it, or nothing")
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as reason:
        why = reason.strerror or reason
        raise error(f"{path} cannot be written: {why}; free some space, or choose another folder") from reason
    finally:
        with suppress(OSError):  # it was renamed, or never made
            temporary.unlink()
