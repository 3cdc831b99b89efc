"""Where the files of a bundle lie: a folder, or one file that is a zip with nothing compressed.

Both sources refuse what could point outside the bundle or need more memory than there is on disk: only
regular files with flat names, no links, nothing compressed or encrypted, at most `MAX_ENTRIES` of them.
`gmm.npz` is such a zip too and is read by the same code, so that no pickle can hide in it.

Why stored and not compressed: weights hardly shrink, and a stored entry is hashed and loaded without being
unpacked to a temporary folder. Measured with int8 models of 12 and 24 MB (ONNX Runtime 1.31, one core of a
server): a session made from the bytes of an entry takes 37 and 68 ms, one made from a path 26 and 45 ms; once
the bytes are released both keep the same memory, and loading the single file peaks higher by the size of the
model. Mapping the weights from the file as external initializers saved nothing: the kernels pack a copy.
"""

import hashlib
import io
import os
import re
import stat
import struct
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from .errors import BundleError

MAX_ENTRIES = 64
AGAIN = "copy or export the bundle again"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_END = struct.Struct(
    "<4s4H2LH"
)  # a zip's end record: signature, disks, counts, directory size and offset, comment
_ZIP64_LOCATOR = 20
"""Bytes of the record that stands before the end record where another one, of zip64, counts in its place."""
_SIZE = r"[1-9]\d{0,8}"
_NPY_HEADER = re.compile(
    r"\{'descr': '<f4', 'fortran_order': False, "
    rf"'shape': \((|{_SIZE},|{_SIZE}(?:, {_SIZE}){{1,3}})\), \}} *\n".encode()
)
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    KeyError,  # an entry that is no longer there
    NotImplementedError,  # zipfile's own, of a compression or a feature that it does not know
    RuntimeError,
    ValueError,
    OverflowError,
    EOFError,
    struct.error,
)


def shown(value: object, limit: int = 60) -> str:
    """A value as one short line for an error message."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        text = f"{type(value).__name__} that is too long to show"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def invalid(where: object, what: str, expected: object, got: object, remedy: str = AGAIN) -> BundleError:
    """The error for a bundle that is not as it should be."""
    return BundleError(f"{where}: {what}: expected {expected}, got {got}; {remedy}")


def check_name(name: str, where: object) -> str:
    """Return `name` if it is a flat file name, which can only mean a file inside the bundle."""
    if not _NAME.fullmatch(name):
        safe = "letters, digits, '.', '_' and '-' without any folder"
        raise invalid(
            where, "unsafe file name", safe, shown(name), "get the bundle from a source that you trust"
        )
    return name


class Source(ABC):
    """Named files, wherever they lie."""

    sizes: dict[str, int]
    """Size of each file in bytes."""

    @abstractmethod
    def open(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """A file for reading."""

    def path(self, name: str) -> Path | None:
        """Its path, where it is a file of its own."""
        return None

    def read(self, name: str) -> bytes:
        """The whole of a file."""
        with self.open(name) as file:
            return file.read(self.sizes[name])

    def sha256(self, name: str) -> str:
        """Its digest, in constant memory."""
        with self.open(name) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


class Folder(Source):
    """A bundle as a folder; files that its manifest does not name are never opened."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sizes = {}
        with _reading(root):
            for entry in os.scandir(root):
                if not entry.is_dir(follow_symlinks=False):
                    self.sizes[entry.name] = entry.stat(follow_symlinks=False).st_size

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """A file for reading; no link, pipe or device is followed."""
        path = self.root / name
        with _reading(path):
            if not stat.S_ISREG(os.lstat(path).st_mode):
                raise invalid(
                    path, "not a file of its own", "a regular file", "a link or device", "copy it with cp -L"
                )
            with open(path, "rb") as file:
                yield file

    def path(self, name: str) -> Path | None:
        """Its path."""
        return self.root / name


class StoredZip(Source):
    """A zip whose entries are stored as they are; `opener` gives a fresh file object for each reading."""

    def __init__(self, opener: Callable[[], IO[bytes]], where: object) -> None:
        self._opener, self._where = opener, where
        self.sizes = {}
        with self._archive() as archive:
            for info in archive.infolist():
                name = check_name(info.filename, where)
                if name in self.sizes:
                    raise invalid(where, name, "one entry of that name", "two")
                if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                    raise invalid(where, name, "an entry stored as it is", "a compressed one")
                self.sizes[name] = info.file_size

    @contextmanager
    def _archive(self) -> Iterator[zipfile.ZipFile]:
        what = "damaged or not a bundle"
        with _reading(self._where), self._opener() as file:
            size = file.seek(0, os.SEEK_END)
            if size < _END.size:
                raise invalid(self._where, what, f"a zip of at least {_END.size} bytes", f"{size} bytes")
            file.seek(max(0, size - _END.size - _ZIP64_LOCATOR))
            tail = file.read()
            signature, _, _, _, count, directory, offset, _ = _END.unpack(tail[-_END.size :])
            if signature != b"PK\5\6" or offset + directory + _END.size != size:
                raise invalid(self._where, what, "a zip's end record in the last 22 bytes", "something else")
            if tail.startswith(b"PK\6\7"):
                raise invalid(self._where, what, "a zip of less than 4 GiB", "records of zip64")
            if count > MAX_ENTRIES or directory > MAX_ENTRIES * 1024:
                raise invalid(
                    self._where, what, f"at most {MAX_ENTRIES} entries", f"{count} in {directory} bytes"
                )
            try:
                with zipfile.ZipFile(file, metadata_encoding="ascii") as archive:
                    entries = archive.infolist()
                    if len(entries) != count:
                        told = f"as many entries as it tells, {count}"
                        raise invalid(self._where, what, told, len(entries))
                    stored = sum(info.file_size for info in entries)
                    if stored > size:
                        raise invalid(
                            self._where, what, f"entries of at most {size} bytes", f"{stored} bytes"
                        )
                    yield archive
            except _ZIP_ERRORS as e:
                raise invalid(self._where, what, "a readable zip", shown(str(e))) from e

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """An entry for reading."""
        with self._archive() as archive, archive.open(name) as file:
            yield file


class InMemory(Source):
    """Files that are not written yet: what is about to be written is checked like what is read."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._files, self.sizes = files, {name: len(data) for name, data in files.items()}

    def open(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """A file for reading."""
        return io.BytesIO(self._files[name])


def open_source(path: Path) -> Source:
    """The folder or the single file at `path`."""
    with _reading(path):
        mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        return Folder(path)
    if stat.S_ISREG(mode):
        return StoredZip(lambda: open(path, "rb"), path)
    raise invalid(path, "not a bundle", "a folder or a file", "something else", "check the path")


@contextmanager
def _reading(where: object) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise BundleError(f"{where}: there is no such bundle or file; check the path, or {AGAIN}") from None
    except (OSError, ValueError) as e:  # the latter of what no path can hold, such as a NUL
        why = getattr(e, "strerror", None) or e
        remedy = "check the path, its permissions and the disk"
        raise BundleError(f"{where}: cannot be read: {why}; {remedy}") from e


def write_zip(file: IO[bytes], files: Mapping[str, bytes]) -> None:
    """Write a stored zip: the same files give the same bytes, whenever and wherever it is made."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)  # its date stays 1980-01-01
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, data)


def encode_arrays(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Arrays as the bytes of a float32 `.npz`: the same arrays give the same bytes."""
    members = {}
    for name in sorted(arrays):
        buffer = io.BytesIO()
        values = np.ascontiguousarray(arrays[name], dtype="<f4")
        np.lib.format.write_array(buffer, values, version=(1, 0), allow_pickle=False)
        members[f"{name}.npy"] = buffer.getvalue()
    buffer = io.BytesIO()
    write_zip(buffer, members)
    return buffer.getvalue()


def decode_arrays(data: bytes, where: str) -> dict[str, NDArray[np.float32]]:
    """The arrays of an uncompressed `.npz`: finite float32 in C order and nothing else, no pickle."""
    plain = "plain float32 in C order, no size of 0"
    source = StoredZip(lambda: io.BytesIO(data), where)
    arrays = {}
    for member in source.sizes:
        name, content = member.removesuffix(".npy"), source.read(member)
        start = 10 + int.from_bytes(content[8:10], "little")
        header = _NPY_HEADER.fullmatch(content, 10, start)
        if content[:8] != b"\x93NUMPY\1\0" or not header:
            raise invalid(where, f"array {name}", plain, shown(content[10:start]))
        shape = tuple(int(n) for n in header[1].split(b",") if n.strip())
        if 4 * prod(shape) != len(content) - start:
            raise invalid(
                where, f"array {name}", f"{4 * prod(shape)} bytes for {shape}", len(content) - start
            )
        values = np.frombuffer(content, "<f4", offset=start).reshape(shape).astype(np.float32, copy=False)
        if not np.isfinite(values).all():
            raise invalid(where, f"array {name}", "finite numbers", "NaN or infinity")
        arrays[name] = values
    return arrays
