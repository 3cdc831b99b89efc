"""From token ids to text as it grows, and prompts that end inside a word.

A token of a byte-level tokenizer is some bytes, and a character may lie across several tokens; a token of a
word-level tokenizer is a word with the space before it. Both become one table of bytes (`Vocabulary`), on
which everything here works: a token costs the same however long the text is.

Healing: a prompt such as "def mai" is cut by the tokenizer where the model, which was trained on whole words,
would not cut it. The last tokens are taken back, as many as could begin one longer token, and the tokens that
come next may only be those that agree with the bytes taken back:

    vocabulary, mask = Vocabulary(tokenizer), vocabulary.mask
    healing = heal(vocabulary, prompt)                         # feed healing.ids
    stream = TokenStream(vocabulary, skip=healing.removed)     # the bytes taken back are not told twice
    remaining = healing.removed
    while remaining:
        token = sampler.sample(logits, allowed=mask.allowed(remaining)).token
        remaining = mask.advance(remaining, token)
"""

import codecs
from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models

from .encoding import encode
from .errors import ParameterError, TokenizerError


def _byte_of_character() -> dict[str, int]:
    """The byte-level alphabet: printable bytes are themselves, the others characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


_BYTE_OF = _byte_of_character()
_LONGEST_CHARACTER = 4
"""Bytes of UTF-8, each of which may be a token."""


class _ByteTokens(Sequence[bytes]):
    """The bytes of each token of a byte-level tokenizer, read when they are asked for first.

    A text needs few of them, and to read all takes a tenth of the time in which a bundle is loaded.
    """

    def __init__(self, tokenizer: Tokenizer, silent: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._known: list[bytes | None] = [None] * tokenizer.get_vocab_size(with_added_tokens=True)
        for token in silent:
            self._known[token] = b""

    def __len__(self) -> int:
        return len(self._known)

    def __getitem__(self, token: Any) -> Any:
        if (data := self._known[token]) is None:
            text = self._tokenizer.id_to_token(token) or ""
            known = all(character in _BYTE_OF for character in text)
            self._known[token] = data = bytes(_BYTE_OF[c] for c in text) if known else text.encode()
        return data


class Vocabulary:
    """What each token of a tokenizer says, in bytes. Special tokens say nothing.

    Made once for a tokenizer. Raises TokenizerError where tokens have no bytes of their own.
    """

    first: Sequence[bytes]
    """Bytes of each token where nothing stands before it."""
    following: Sequence[bytes]
    """Bytes of each token where something does."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        silent = {number for number, t in tokenizer.get_added_tokens_decoder().items() if t.special}
        if self.byte_level:
            self.first = self.following = _ByteTokens(tokenizer, silent)
        elif isinstance(tokenizer.model, models.WordLevel) and (words := self._words(silent)):
            self.first, self.following = self._read_words(words)
        else:
            raise TokenizerError(
                "tokenizer: expected a byte-level decoder or a model of whole words, got "
                f"{type(tokenizer.model).__name__} with {type(tokenizer.decoder).__name__}; "
                "use a tokenizer made by sdgm-edge"
            )

    def _words(self, silent: Collection[int]) -> list[int]:
        return sorted(set(self.tokenizer.get_vocab(with_added_tokens=True).values()) - set(silent))

    def _read_words(self, words: list[int]) -> tuple[list[bytes], list[bytes]]:
        before = words[0]
        prefix = self.tokenizer.decode([before])
        size = self.tokenizer.get_vocab_size(with_added_tokens=True)
        first, following = [b""] * size, [b""] * size
        for number in words:
            both = self.tokenizer.decode([before, number])
            if not both.startswith(prefix):
                raise TokenizerError(
                    f"tokenizer: expected a decoder that leaves earlier words as they are, got {both!r} "
                    f"after {prefix!r}; use a tokenizer made by sdgm-edge"
                )
            first[number] = self.tokenizer.decode([number]).encode()
            following[number] = both[len(prefix) :].encode()
        return first, following

    @cached_property
    def mask(self) -> "HealingMask":
        """The lookup of tokens by their first bytes."""
        return HealingMask(self.following)

    def tail(self, tokens: Sequence[int]) -> bytes:
        """The bytes of the last tokens, which tell whether a text ends within a character."""
        return b"".join(self.following[token] for token in tokens[-_LONGEST_CHARACTER:])

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with nothing put before it. Raises ParameterError where it is not Unicode."""
        return list(encode(self.tokenizer, text))


class _Stop:
    """Follows one stop text through a stream, character by character (Knuth, Morris and Pratt)."""

    def __init__(self, text: str) -> None:
        self.text, self.matched = text, 0
        self._border = [
            0,
            0,
        ]  # by length of what matched: the longest proper start of it that is also its end
        for character in text[1:]:
            self._border.append(self._extend(self._border[-1], character))

    def _extend(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._border[matched]
        return matched + (self.text[matched] == character)

    def push(self, character: str) -> bool:
        """Whether this character completes the text."""
        self.matched = self._extend(self.matched, character)
        return self.matched == len(self.text)


class TokenStream:
    """Turns tokens into text, piece by piece: whole characters only, and nothing of a stop text.

    The pieces together are what the tokenizer decodes from all tokens at once, up to the stop text that is
    complete first (of several complete at once, the longest).
    """

    def __init__(
        self,
        source: Tokenizer | Vocabulary,
        stop: Iterable[str] = (),
        *,
        skip: bytes = b"",
        before: bytes = b"",
        continues: bool = False,
    ) -> None:
        """`skip`: what the first tokens repeat and is not told; `continues`: text stands before them, and
        `before` are its last bytes, where these may end within a character (see `Vocabulary.tail`).
        """
        vocabulary = source if isinstance(source, Vocabulary) else Vocabulary(source)
        self._bytes = vocabulary.following if continues or skip else vocabulary.first
        self._following = vocabulary.following
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(before + skip)
        self._skip = skip
        self._stops = [_Stop(text) for text in stop]
        self._held = ""
        self.stopped: str | None = None
        """The stop text that ended the stream."""

    def push(self, token: int) -> str:
        """Take one token; return the text that is now certain. Raises ParameterError on ids out of range."""
        if not 0 <= token < len(self._bytes):
            raise ParameterError(
                f"token: expected an id from 0 to {len(self._bytes) - 1}, got {token}; "
                "use the tokenizer of this model"
            )
        data = self._bytes[token]
        if data:
            self._bytes = self._following
        if self._skip:
            data = self._skipping(data)
        return self._release(self._decoder.decode(data))

    def finish(self, *, ended: bool = True) -> str:
        """The rest: what might have become a stop text, and U+FFFD for a character that is not complete.

        Where the text has not `ended`, that character is left to the stream that takes the next tokens.
        """
        rest = self._release(self._decoder.decode(b"", ended))
        held, self._held = self._held, ""
        return rest + held

    def _skipping(self, data: bytes) -> bytes:
        common = min(len(data), len(self._skip))
        if data[:common] != self._skip[:common]:
            raise ParameterError(
                f"token: expected bytes that begin with {self._skip!r}, got {data!r}; "
                "sample from HealingMask.allowed while bytes remain"
            )
        self._skip = self._skip[common:]
        return data[common:]

    def _release(self, text: str) -> str:
        if self.stopped is not None:
            return ""
        if not self._stops:
            return text
        held = len(self._held)
        text = self._held + text
        for place in range(held, len(text)):
            complete = [stop.text for stop in self._stops if stop.push(text[place])]
            if complete:
                self.stopped, self._held = max(complete, key=len), ""
                return text[: place + 1 - len(self.stopped)]
        certain = len(text) - max(stop.matched for stop in self._stops)
        self._held = text[certain:]
        return text[:certain]


class HealingMask:
    """Which tokens agree with bytes that have to come next."""

    def __init__(self, token_bytes: Iterable[bytes]) -> None:
        self._bytes = list(token_bytes)
        order = sorted(
            (number for number, data in enumerate(self._bytes) if data), key=self._bytes.__getitem__
        )
        self._ids = np.array(order, np.int64)
        self._sorted = [self._bytes[number] for number in order]
        self.longest = max(map(len, self._sorted), default=0)
        """Bytes of the longest token."""

    def _range(self, start: bytes) -> tuple[int, int]:
        """Where the tokens stand, in order, that begin with these bytes."""
        return bisect_left(self._sorted, start), bisect_left(
            self._sorted, start + b"\xff" * (self.longest + 1)
        )

    def begins_longer(self, start: bytes) -> bool:
        """Whether a token begins with these bytes and goes on."""
        low, high = self._range(start)
        return high > low and self._sorted[high - 1] != start

    def allowed(self, remaining: bytes) -> NDArray[np.int64]:
        """The ids, rising, that begin with `remaining`, or that it begins with and others can complete."""
        ends = [self._range(remaining[:length]) for length in range(1, len(remaining))]
        low, high = self._range(remaining)
        ids = [self._ids[low:high]]
        for length, (low, _) in enumerate(ends, 1):
            if self._can_complete(remaining[length:]):
                high = bisect_left(self._sorted, remaining[:length] + b"\0", low)
                ids.append(self._ids[low:high])
        return np.sort(np.concatenate(ids))

    def _can_complete(self, remaining: bytes) -> bool:
        size = len(remaining)
        reaches = [False] * size + [True]
        for place in reversed(range(size)):
            low, high = self._range(remaining[place:])
            reaches[place] = high > low or any(
                reaches[end] and self._is_token(remaining[place:end]) for end in range(place + 1, size)
            )
        return reaches[0]

    def _is_token(self, data: bytes) -> bool:
        place = bisect_left(self._sorted, data)
        return place < len(self._sorted) and self._sorted[place] == data

    def advance(self, remaining: bytes, token: int) -> bytes:
        """What remains to come after this token. Raises ParameterError where it does not agree."""
        data = self._bytes[token]
        if data.startswith(remaining):
            return b""
        if data and remaining.startswith(data):
            return remaining[len(data) :]
        raise ParameterError(
            f"token: expected bytes that agree with {remaining!r}, got {data!r}; "
            "sample from HealingMask.allowed"
        )


class Healing(NamedTuple):
    """A prompt to feed, and the bytes at its end that are still to be sampled: none, where all is well."""

    ids: list[int]
    removed: bytes


def heal(vocabulary: Vocabulary, prompt: str) -> Healing:
    """Take back the tokens at the end of a prompt that could begin a longer token.

    Raises:
        ParameterError: the prompt is not valid Unicode.
    """
    if not vocabulary.byte_level:
        return _heal_word(vocabulary, prompt)
    ids, data, taken, removed = vocabulary.encode(prompt), b"", 0, b""
    for number, token in enumerate(reversed(ids), 1):
        data = vocabulary.following[token] + data
        if not vocabulary.following[token] or len(data) >= vocabulary.mask.longest:
            break
        if vocabulary.mask.begins_longer(data):
            taken, removed = number, data
    return Healing(ids[: len(ids) - taken], removed)


def _heal_word(vocabulary: Vocabulary, prompt: str) -> Healing:
    """As `heal`, for whole words: an unfinished one is in no vocabulary, so the text gives its bytes."""
    word = prompt.split()[-1] if prompt and not prompt[-1].isspace() else ""
    removed = f" {word}".encode(errors="surrogatepass")  # in no token: `encode` will refuse it
    if (word or prompt.endswith(" ")) and vocabulary.mask.begins_longer(removed):
        return Healing(vocabulary.encode(prompt[: len(prompt) - len(word)]), removed)
    return Healing(vocabulary.encode(prompt), b"")
