"""Where text comes from: files, folders, globs, `.gz`, standard input, and the embedded default corpus.

A *document* is one file (of the embedded corpus, one topic). Its text is kept as it stands, line ends
included; only a byte-order mark at its start is dropped. It is read in *pieces*, never whole, cut where
tokenising a piece apart from the next gives the tokens of the whole.

    for document in open_documents(["notes/", "more.txt.gz"], spool=Path(".cache")):
        for piece in document.pieces():
            ...
"""

import codecs
import glob
import gzip
import hashlib
import io
import logging
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from sdgm_edge.runtime import CorpusError, replacing

log = logging.getLogger(__name__)

EMBEDDED = "pydoc"
"""Names the corpus that every CPython carries: its language reference."""

STDIN = "-"
SUFFIXES = (".txt", ".md", ".rst", ".text")
"""What a folder is searched for, also with `.gz` behind it. A glob takes whatever it matches."""

PIECE = 1 << 20
_BLOCK = 1 << 18
_GZIP_MAGIC = b"\x1f\x8b"

Reader = Callable[[], BinaryIO]


@dataclass(frozen=True, slots=True)
class Document:
    """One text, or its bytes from `start` to `stop`, that can be read as often as needed."""

    name: str
    sha256: str
    """Of the whole text's bytes, uncompressed."""
    start: int
    stop: int
    reader: Reader

    @property
    def num_bytes(self) -> int:
        """The number of bytes from `start` to `stop`."""
        return self.stop - self.start

    def blocks(self) -> Iterator[bytes]:
        """The bytes from `start` to `stop`, in blocks."""
        position = 0
        for block in _blocks(self.name, self.reader):
            part = block[max(self.start - position, 0) : self.stop - position]
            position += len(block)
            if part:
                yield part
            if position >= self.stop:
                return

    def pieces(self, size: int = PIECE) -> Iterator[str]:
        """The text in pieces of about `size` characters; joined they are the text."""
        decoder = codecs.getincrementaldecoder("utf-8" if self.start else "utf-8-sig")()
        held = ""
        for block in self.blocks():
            held += decoder.decode(block)
            while len(held) > size + 2:  # two characters tell what follows a cut
                cut = _cut(held, size)
                yield held[:cut]
                held = held[cut:]
        if held:
            yield held

    def split(self, share: float) -> "tuple[Document, Document]":
        """Head and tail, the tail about `share` of the bytes; cut at the nearest line end or space.

        Raises:
            CorpusError: the text is too short to be cut.
        """
        target = self.stop - max(1, round(self.num_bytes * share))
        low = max(self.start, target - PIECE)
        window = b"".join(replace(self, start=low, stop=min(self.stop, target + PIECE)).blocks())
        for pattern in (rb"\n", rb"[ \t]", rb"(?=[^\x80-\xbf])"):  # the last: the start of any character
            cuts = [low + match.end() for match in re.finditer(pattern, window)]
            if cuts := [cut for cut in cuts if self.start < cut < self.stop]:
                cut = min(cuts, key=lambda at: abs(at - target))
                return replace(self, stop=cut), replace(self, start=cut)
        raise CorpusError(
            f"{self.name}: {self.num_bytes} bytes cannot be split into a training and a validation text; "
            "give more text, or name a validation file"
        )


def open_documents(sources: Sequence[str | os.PathLike[str]], spool: Path) -> list[Document]:
    """Find the documents of `sources` in their order, each file once; read each to check and to hash it.

    A source is a file, a folder (searched for `SUFFIXES`; hidden names are left out), a glob, `-` for
    standard input, or `pydoc` for the embedded corpus. Compression is told by content. Standard input and
    pipes are copied into the folder `spool`, because a text is read more than once.

    Raises:
        CorpusError: a source is missing, unreadable, empty, binary, or not UTF-8.
    """
    documents: dict[str, Document] = {}
    for source in sources:
        found = list(_find(os.fspath(source), spool))
        for name, reader in found:
            if (key := os.path.realpath(name)) in documents:
                continue
            if document := _inspect(name, reader):
                documents[key] = document
            elif len(found) == 1:
                raise CorpusError(f"{name} is empty; name a text file with something in it")
            else:
                log.warning("%s is empty and is left out", name)
    if not documents:
        raise CorpusError(f"no text in {', '.join(map(str, sources)) or 'an empty list'}; name a text file")
    return list(documents.values())


def read_text(sources: Sequence[str | os.PathLike[str]]) -> str:
    """The whole text of `sources`, one document after the other. Raises CorpusError."""
    with TemporaryDirectory() as spool:
        documents = open_documents(sources, Path(spool))
        return "".join(chain.from_iterable(document.pieces() for document in documents))


def content_key(documents: Iterable[Document]) -> str:
    """A sha256 that changes when the documents, their order, or the parts of them that are used change."""
    parts = "".join(f"{part.sha256} {part.start} {part.stop}\n" for part in documents)
    return hashlib.sha256(parts.encode()).hexdigest()


def lasting(sources: Iterable[str], spool: Path) -> tuple[str, ...]:
    """Sources that mean the same from any folder and at any time: what goes on later reads them again.

    Raises:
        CorpusError: standard input, or a pipe, cannot be kept.
    """
    return tuple(str(_lasting(source, spool)) for source in sources)


def _lasting(source: str, spool: Path) -> str | Path:
    if source == STDIN:
        return _spool_stdin(spool)
    path = Path(source)
    if source == EMBEDDED and not path.exists():
        return source
    if _is_pipe(path):
        return _spool_pipe(path, spool)
    if glob.has_magic(source) and not path.exists():  # the folder's own name is no pattern
        return os.path.join(glob.escape(os.getcwd()), source)
    return os.path.abspath(source)


def _spool_stdin(spool: Path) -> Path:
    """Keep what standard input gives as a file, whose name tells its content. Raises CorpusError."""
    if sys.stdin is None:
        raise CorpusError("standard input is closed: expected text; name a file, or pipe one in")
    return _spool("standard input", sys.stdin.buffer, spool)


def _spool_pipe(path: Path, spool: Path) -> Path:
    with path.open("rb") as stream:
        return _spool(str(path), stream, spool)


def _is_pipe(path: Path) -> bool:
    """Whether it can be read once only, such as the shell's <(…)."""
    return path.exists() and not path.is_dir() and not path.is_file()


def _find(source: str, spool: Path) -> Iterator[tuple[str, Reader]]:
    """Name and reader of each text that `source` stands for."""
    path = Path(source)
    if source == STDIN:
        yield "standard input", partial(_open_file, _spool_stdin(spool))
    elif source == EMBEDDED:
        for topic, text in sorted(_embedded().items()):
            yield f"{EMBEDDED}/{topic}", partial(io.BytesIO, text.encode())
    elif path.is_dir():
        if not (texts := list(_search(path))):
            raise CorpusError(
                f"{path}: no text file in this folder, expected {', '.join(SUFFIXES)} (or these with .gz); "
                f"for other names give a glob such as '{path}/**/*.py'"
            )
        yield from texts
    elif path.is_file():
        yield source, partial(_open_file, path)
    elif _is_pipe(path):
        yield source, partial(_open_file, _spool_pipe(path, spool))
    elif glob.has_magic(source):
        texts = []
        for match in sorted(glob.glob(source, recursive=True)):  # of folders, some may hold no text
            texts += _search(Path(match)) if Path(match).is_dir() else _find(match, spool)
        if not texts:
            raise CorpusError(f"{source} matches no file; check the pattern, from the folder {Path.cwd()}")
        yield from texts
    else:
        raise CorpusError(
            f"{source}: no such file or folder; check the path ({EMBEDDED} is the embedded text)"
        )


def _search(folder: Path) -> Iterator[tuple[str, Reader]]:
    def refuse(error: OSError) -> None:
        why = error.strerror or error
        raise CorpusError(f"{error.filename} cannot be read: {why}; check its permissions") from error

    for root, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().removesuffix(".gz").endswith(SUFFIXES) and not name.startswith("."):
                yield os.path.join(root, name), partial(_open_file, Path(root, name))


def _embedded() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CorpusError(
            "the embedded text is CPython's pydoc_data, which this Python lacks; name a text file"
        ) from error
    first = {text: topic for topic, text in sorted(topics.items(), reverse=True)}  # some share a text
    return {topic: text for text, topic in first.items()}


def _open_file(path: Path) -> BinaryIO:
    with path.open("rb") as stream:
        compressed = stream.read(2) == _GZIP_MAGIC
    return gzip.open(path) if compressed else path.open("rb")  # type: ignore[return-value]


def _blocks(name: str, reader: Reader) -> Iterator[bytes]:
    try:
        with reader() as stream:
            while block := stream.read(_BLOCK):
                yield block
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise CorpusError(f"{name} cannot be read: {why}; check its permissions or fetch it anew") from error


def _spool(name: str, stream: BinaryIO, folder: Path) -> Path:
    """Copy a stream that can be read only once to a file named by its content."""
    digest = hashlib.sha256()
    path = folder / f".text-{os.getpid()}"
    with replacing(path, CorpusError) as copy:
        for block in _blocks(name, lambda: stream):
            digest.update(block)
            copy.write(block)
    return path.replace(folder / f"text-{digest.hexdigest()[:16]}.txt")


def _inspect(name: str, reader: Reader) -> Document | None:
    """Hash and check a text; None if there is nothing in it but white space."""
    digest, decoder, size, blank = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), 0, True
    for block in chain(_blocks(name, reader), [b""]):
        if (nul := block.find(b"\0")) >= 0:
            raise CorpusError(
                f"{name} is not a text file: NUL at byte {size + nul}; name a UTF-8 text file "
                "(UTF-16 text: convert it with `iconv -f UTF-16 -t UTF-8`)"
            )
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"{name} is not UTF-8: {error.reason} at byte {size - pending + error.start}; "
                "convert it, for example with `iconv -f LATIN1 -t UTF-8`"
            ) from error
        digest.update(block)
        blank = blank and not block.removeprefix(codecs.BOM_UTF8).strip()
        size += len(block)
    return None if blank else Document(name, digest.hexdigest(), 0, size, reader)


def _cut(text: str, size: int) -> int:
    """Where to end a piece of at most `size` characters.

    Byte-level BPE splits a run of white space before a word into all but its last character, and that
    character. So the tokens on both sides of a line end are those of the whole where no white space stands
    beside it, or exactly one character of it follows; and those on both sides of a space between two words
    are, where the cut is before it. Without such a place: after any line end, before any space, anywhere.
    """
    end = text.rfind("\n", 0, size)
    while end > 0:
        follows = text[end + 1].isspace() + text[end + 1 : end + 3].isspace()
        if follows == 1 or (follows == 0 and not text[end - 1].isspace()):
            return end + 1
        end = text.rfind("\n", 0, end)
    space = text.rfind(" ", 1, size)
    while space > 0:
        if not (text[space - 1].isspace() or text[space + 1].isspace()):
            return space
        space = text.rfind(" ", 1, space)
    return text.rfind("\n", 0, size) + 1 or max(text.rfind(" ", 0, size), 0) or size
