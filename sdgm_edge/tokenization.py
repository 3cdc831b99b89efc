"""From text to tokens and back: byte-level BPE for use, whole words for the published benchmarks.

*bpe*: text is bytes, so that every text can be written and `<unk>` cannot occur; `<|endoftext|>` stands
before each document. A word carries the space before it, and nothing is put before the first: a prompt is
encoded as it is typed.

*word*: Penn Treebank and WikiText as published: words are what white space separates, each line ends with
`<eos>`, and a word that the training text lacks is `<unk>`.

In both, token 0 begins a text: it stands before the first document, and a model is given it before a prompt.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from sdgm_edge.runtime import ConfigError, TokenizerError, replacing

Kind = Literal["bpe", "word"]

END_OF_TEXT = "<|endoftext|>"
END_OF_LINE = "<eos>"
UNKNOWN = "<unk>"
BEGIN_ID = 0
"""The token that begins a text: `END_OF_TEXT` of bpe, `END_OF_LINE` of word."""

BPE_VOCABULARY = 4096
SMALLEST_BPE, LARGEST_BPE = 257, 65_536  # every byte and END_OF_TEXT; what sixteen bits can number


class Tokenizer:
    """A tokenizer of one of the two kinds.

    Example:
        >>> tokenizer = train_bpe(["to be or not to be"] * 9, vocab_size=260)
        >>> tokenizer.decode(tokenizer.encode("Être?"))
        'Être?'
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._json = backend.to_str()
        self.kind: Kind = "bpe" if isinstance(backend.model, models.BPE) else "word"
        self.vocab_size: int = backend.get_vocab_size()

    @property
    def sha256(self) -> str:
        """Of the file that `save` writes."""
        return hashlib.sha256(self._json.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`, with no begin token before them."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text; on all cores."""
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as error:
            raise TokenizerError(
                f"text cannot be encoded: {error}; expected Unicode without lone surrogates (was it UTF-8?)"
            ) from error
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens included."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=False)
        return text

    def token_id(self, token: str) -> int | None:
        """The number of a token, or None."""
        number: int | None = self._backend.token_to_id(token)
        return number

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        with replacing(path, TokenizerError) as file:
            file.write(self._json.encode())

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a file that `save` wrote.

        Raises:
            TokenizerError: the file is missing, damaged, or a tokenizer of another make.
        """
        try:
            text = path.read_text("utf-8")
            kind = json.loads(text)["model"]["type"]
            backend = tokenizers.Tokenizer.from_str(text)
        except OSError as error:
            raise TokenizerError(f"{path} cannot be read: {error.strerror}; name one of a run") from error
        except Exception as error:  # tokenizers raises nothing narrower
            raise TokenizerError(f"{path} is damaged or no tokenizer: {error}; copy it anew") from error
        vocabulary = backend.get_vocab(with_added_tokens=True)
        needed = {"BPE": _bpe_alphabet(), "WordLevel": [END_OF_LINE, UNKNOWN]}.get(kind)
        if needed is None:
            raise TokenizerError(
                f"{path}: expected a model BPE or WordLevel, got {kind}; use one trained here"
            )
        numbers = sorted(vocabulary.values())
        if numbers != list(range(len(numbers))) or vocabulary.get(needed[0]) != BEGIN_ID:
            raise TokenizerError(
                f"{path}: expected tokens numbered from 0 on, {needed[0]} first; use one trained here"
            )
        if lacking := [token for token in needed if token not in vocabulary]:
            raise TokenizerError(
                f"{path} lacks {len(lacking)} basic tokens, as {lacking[0]!r}; use one trained here"
            )
        return cls(backend)


def train_bpe(texts: Iterable[str], vocab_size: int = BPE_VOCABULARY) -> Tokenizer:
    """Learn byte-level BPE; `vocab_size` counts the 256 bytes and `END_OF_TEXT`. Same texts, same tokens.

    A small text gives fewer tokens, since a merge must occur twice.

    Raises:
        ConfigError: `vocab_size` is out of range.
    """
    if not SMALLEST_BPE <= vocab_size <= LARGEST_BPE:
        raise ConfigError(f"vocab_size: expected {SMALLEST_BPE} to {LARGEST_BPE} for bpe, got {vocab_size}")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(END_OF_TEXT, special=True, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


def train_words(texts: Iterable[str], vocab_size: int | None = None) -> Tokenizer:
    """Number the words of `texts`, the frequent first: all, or `vocab_size` with `<eos>` and `<unk>`.

    Raises:
        ConfigError: `vocab_size` leaves no room for a word.
    """
    if vocab_size is not None and vocab_size < 3:
        raise ConfigError(f"vocab_size: expected 3 or more for word, got {vocab_size}")
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text.split())
    words = sorted(counts.keys() - {END_OF_LINE, UNKNOWN}, key=lambda word: (-counts[word], word))
    vocabulary = {token: number for number, token in enumerate([END_OF_LINE, UNKNOWN, *words][:vocab_size])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Replace("\n", f" {END_OF_LINE} ")
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix="\0", cleanup=False), decoders.Replace(Regex(f" ?{END_OF_LINE}"), "\n")]
    )
    return Tokenizer(backend)


def _bpe_alphabet() -> list[str]:
    return [END_OF_TEXT, *sorted(pre_tokenizers.ByteLevel.alphabet())]
