"""Token shards: a corpus as arrays of token numbers on the disk, which may be larger than memory.

    corpus = prepare_corpus(["my.txt"], cache=Path(".cache"))
    corpus.train.tokens[:128]                  # a memory map: reading touches these pages alone

A shard is `shard-KEY.bin` (the tokens, little-endian, of 16 bits or 32) and `shard-KEY.json` (what it holds);
KEY names the content of the text and the tokenizer. The second file is written last: where it stands, the
first is whole. A shard whose text and tokenizer have not changed is used again.

`tokens[0]` begins a text (`tokenization.BEGIN_ID`) and is only given; all that follow are predicted, once
each. With bpe the begin token stands before each document, with word each line and each document ends in
`<eos>`.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sdgm_edge.runtime import ConfigError, CorpusError, TokenizerError, replacing, sweep

from .sources import EMBEDDED, Document, content_key, open_documents
from .tokenization import BEGIN_ID, BPE_VOCABULARY, Kind, Tokenizer, train_bpe, train_words

if TYPE_CHECKING:
    from .config import CorpusConfig

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many bytes of text are done, and how many there are."""

VALID_SHARE = 0.05
VOCABULARY_BYTES = 1 << 28
"""Byte-level BPE is learnt from at most this much text, evenly spread over the corpus."""

HELDOUT_BYTES = 200_000
_PIECE = 1 << 15  # the size at which `tokenizers` is quickest
_BATCH = 64  # pieces
_FORMAT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a shard holds."""

    format: int
    dtype: str
    num_tokens: int
    num_documents: int
    num_words: int
    """Words of the text, separated by white space."""
    num_lines: int
    """Line ends of the text; the published word-level results count them as words."""
    num_bytes: int
    """UTF-8 bytes of the text."""
    sha256: str
    """Of these bytes, one document after the other."""
    tokenizer: str
    """The sha256 of the tokenizer."""


@dataclass(frozen=True, slots=True)
class Shard:
    """The tokens of a text, mapped from the disk, and what is known of it."""

    tokens: npt.NDArray[np.uint16 | np.uint32]
    contents: Contents

    def __len__(self) -> int:
        return self.contents.num_tokens

    @property
    def num_words(self) -> int:
        """Words of the text as published results count them: one more for each line (`count_words`)."""
        return self.contents.num_words + self.contents.num_lines

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return self.contents.num_bytes

    @property
    def sha256(self) -> str:
        """Of the text's bytes."""
        return self.contents.sha256


@dataclass(frozen=True, slots=True)
class Corpus:
    """What a model is trained on."""

    train: Shard
    valid: Shard
    tokenizer: Tokenizer
    heldout_text: str
    """The beginning of the validation text, at most `HELDOUT_BYTES` of it."""


def corpus_of(
    config: "CorpusConfig",
    cache: Path,
    *,
    at_most: bool = False,
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Prepare what a config names, or the text that CPython carries; otherwise as `prepare_corpus`."""
    return prepare_corpus(
        config.train or [EMBEDDED],
        config.valid or None,
        tokenizer_kind=config.tokenizer,
        vocab_size=config.vocab_size if config.tokenizer == "bpe" else None,
        at_most=at_most,
        tokenizer=tokenizer,
        cache=cache,
        progress=progress,
    )


def prepare_corpus(
    sources: Sequence[str | PathLike[str]],
    valid_sources: Sequence[str | PathLike[str]] | None = None,
    *,
    tokenizer_kind: Kind = "bpe",
    vocab_size: int | None = None,
    at_most: bool = False,
    tokenizer: Tokenizer | None = None,
    cache: Path,
    progress: Progress | None = None,
) -> Corpus:
    """Read, split and tokenise a corpus, or find it in `cache` as it was left there.

    Without `valid_sources` a twentieth of the text is held out (`split_documents`). The vocabulary is learnt
    from the training text unless a `tokenizer` is given: `vocab_size` tokens (for bpe 4096 by default, for
    word all words), or with `at_most` as many of them as the text gives.

    Raises:
        ConfigError: an unknown kind, or a `vocab_size` out of range. CorpusError: text that is missing,
        empty, not UTF-8, or too short; without `at_most` a vocabulary larger than it can give.
    """
    tell = progress or (lambda what, done, total: None)
    train = open_documents(sources, spool=cache)
    if valid_sources:
        valid = open_documents(valid_sources, spool=cache)
        hashes = {document.sha256 for document in train}
        if shared := [document.name for document in valid if document.sha256 in hashes]:
            log.warning(
                "%s (%d of %d validation texts) is training text too: figures on it flatter",
                shared[0],
                len(shared),
                len(valid),
            )
    else:
        train, valid = split_documents(_once(train))
    if tokenizer is None:
        if tokenizer_kind == "bpe" and vocab_size is None:
            vocab_size = BPE_VOCABULARY
        tokenizer = _tokenizer(train, tokenizer_kind, vocab_size, cache, tell)
        _check_size(tokenizer, vocab_size, at_most)
    return Corpus(
        build_shard(train, tokenizer, cache, tell),
        build_shard(valid, tokenizer, cache, tell),
        tokenizer,
        _beginning(valid, HELDOUT_BYTES),
    )


def _once(documents: Sequence[Document]) -> list[Document]:
    """The documents without those whose text another one has: what is held out is trained on nowhere."""
    found: dict[str, Document] = {}
    for document in documents:
        same = found.setdefault(document.sha256, document)
        if same is not document:
            log.warning("%s is left out: %s has the same text", document.name, same.name)
    return list(found.values())


def split_documents(
    documents: Sequence[Document], share: float = VALID_SHARE
) -> tuple[list[Document], list[Document]]:
    """Training and validation documents, about `share` of the bytes held out; same texts, same split.

    Whole documents are held out, in the order of their hashes. Where each is too large for that (more than
    twice the share), the end of the largest is.
    """
    wanted = share * sum(document.num_bytes for document in documents)
    held: list[Document] = []
    size = 0
    for document in sorted(documents, key=lambda document: document.sha256):
        if size < wanted and size + document.num_bytes <= 2 * wanted:
            held.append(document)
            size += document.num_bytes
    if held:
        chosen = {document.sha256 for document in held}
        return [document for document in documents if document.sha256 not in chosen], held
    largest = max(documents, key=lambda document: document.num_bytes)
    head, tail = largest.split(wanted / largest.num_bytes)
    return [head if document is largest else document for document in documents], [tail]


def build_shard(
    documents: Sequence[Document], tokenizer: Tokenizer, cache: Path, progress: Progress | None = None
) -> Shard:
    """Tokenise `documents` into `cache`, or find the shard that is there."""
    key = hashlib.sha256(f"{_FORMAT} {content_key(documents)} {tokenizer.sha256}".encode()).hexdigest()
    path = cache / f"shard-{key[:16]}.bin"
    if shard := _reuse(path):
        return shard
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    counts = _Counts()
    total = sum(document.num_bytes for document in documents)
    num_tokens = 0
    sweep(cache, ".*.partial")
    with replacing(path, CorpusError) as file:
        for ids in _tokens(documents, tokenizer, counts):
            file.write(np.array(ids, dtype).tobytes())
            num_tokens += len(ids)
            if progress:
                progress("tokenising", counts.num_bytes, total)
    contents = Contents(
        format=_FORMAT,
        dtype=dtype.str,
        num_tokens=num_tokens,
        num_documents=len(documents),
        num_words=counts.num_words,
        num_lines=counts.num_lines,
        num_bytes=counts.num_bytes,
        sha256=counts.digest.hexdigest(),
        tokenizer=tokenizer.sha256,
    )
    with replacing(path.with_suffix(".json"), CorpusError) as file:
        file.write(json.dumps(asdict(contents), indent=2).encode())
    return _open(path, contents)


class _Counts:
    """What is counted as pieces of text go by."""

    def __init__(self) -> None:
        self.num_words = self.num_lines = self.num_bytes = 0
        self.digest = hashlib.sha256()

    def follow(self, document: Document) -> Iterator[str]:
        """The pieces of `document`, counted."""
        last = "\n"  # how the last piece ended; where that is no white space, its last word may go on
        for piece in document.pieces(_PIECE):
            data = piece.encode()
            self.digest.update(data)
            self.num_bytes += len(data)
            self.num_lines += piece.count("\n")
            self.num_words += len(piece.split()) - (not last.isspace() and not piece[0].isspace())
            last = piece[-1]
            yield piece
        self.num_lines += last != "\n"  # as `count_words` does


def _tokens(documents: Iterable[Document], tokenizer: Tokenizer, counts: _Counts) -> Iterator[list[int]]:
    """The tokens of a shard, in the lists in which they come."""
    if tokenizer.kind == "word":
        yield [BEGIN_ID]
    for document in documents:
        if tokenizer.kind == "bpe":
            yield [BEGIN_ID]
        pieces = counts.follow(document)
        last = BEGIN_ID
        while batch := list(islice(pieces, _BATCH)):
            for ids in tokenizer.encode_batch(batch):
                yield ids
                last = ids[-1] if ids else last
        if tokenizer.kind == "word" and last != BEGIN_ID:
            yield [BEGIN_ID]


def _open(path: Path, contents: Contents) -> Shard:
    return Shard(np.memmap(path, np.dtype(contents.dtype), "r", shape=(contents.num_tokens,)), contents)


def _reuse(path: Path) -> Shard | None:
    """The shard at `path`, if it is there and whole."""
    try:
        stored = json.loads(path.with_suffix(".json").read_text())
        if stored.keys() != {field.name for field in fields(Contents)} or stored["format"] != _FORMAT:
            raise ValueError("another format")
        shard = _open(path, Contents(**stored))
        if path.stat().st_size != shard.tokens.nbytes:
            raise ValueError("another size than it should have")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.warning("%s is damaged (%s) and is made anew", path, error)
        return None
    return shard


def _tokenizer(
    documents: Sequence[Document], kind: Kind, vocab_size: int | None, cache: Path, progress: Progress
) -> Tokenizer:
    """Learn a vocabulary, or find the one that was learnt."""
    if kind not in ("bpe", "word"):
        raise ConfigError(f"tokenizer_kind: expected bpe or word, got {kind!r}")
    name = f"{_FORMAT} {content_key(documents)} {kind} {vocab_size} {VOCABULARY_BYTES}"
    path = cache / f"tokenizer-{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
    if path.exists():
        try:
            return Tokenizer.load(path)
        except TokenizerError as error:
            log.warning("%s; it is made anew", error)
    total = sum(document.num_bytes for document in documents)
    step = 1 if kind == "word" else -(-total // VOCABULARY_BYTES)

    def texts() -> Iterator[str]:
        counts = _Counts()
        number = 0
        for document in documents:
            for piece in counts.follow(document):
                if number % step == 0:
                    yield piece
                    progress("learning the vocabulary", counts.num_bytes, total)
                number += 1

    tokenizer = train_words(texts(), vocab_size) if kind == "word" else train_bpe(texts(), vocab_size or 0)
    tokenizer.save(path)
    return tokenizer


def _check_size(tokenizer: Tokenizer, wanted: int | None, at_most: bool) -> None:
    """Refuse a vocabulary that is smaller than wanted, or tell that it is."""
    found = tokenizer.vocab_size
    if wanted is None or found >= wanted:
        return
    told = f"the text is too small for a vocabulary of {wanted}: it gives {found} tokens"
    if not at_most:
        raise CorpusError(f"{told}; ask for {found} or fewer, or give more text")
    log.warning("%s, which are taken; more text makes a better model", told)


def _beginning(documents: Iterable[Document], limit: int) -> str:
    """The first `limit` bytes of the documents, to the last line end in them."""
    texts: list[str] = []
    room = limit
    for document in documents:
        part = replace(document, stop=min(document.stop, document.start + room))
        data = b"".join(part.blocks())
        room -= len(data)
        text = data.decode("utf-8" if part.start else "utf-8-sig", errors="ignore")
        texts.append(text if part.stop == document.stop else text[: text.rfind("\n") + 1] or text)
        if room <= 0:
            break
    return "\n".join(texts)
