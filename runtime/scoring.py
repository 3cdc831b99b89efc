"""How good a model is on a text, in figures that compare: one definition for training and for devices.

    token_perplexity = exp(nll / num_tokens)        depends on the tokenizer: compare only where it is shared
    word_perplexity  = exp(nll / num_words)         as published results count, see `count_words`
    bits_per_byte    = nll / (num_bytes · ln 2)
    byte_perplexity  = 2 ** bits_per_byte

nll = −Σ ln p over all tokens of the text, each scored exactly once: the first one is predicted from the token
that ends or begins a text, which the caller puts before it and does not score. Words and bytes are those of
the original text, whatever the tokenizer makes of it.

T positions, V vocabulary.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from .errors import ParameterError, StateError, TokenizerError

if TYPE_CHECKING:
    from .engine import Engine


def count_words(text: str) -> int:
    """Count words as the published word-level results do.

    That is what whitespace separates, and one `<eos>` for each line. The last line needs no line end.

    >>> count_words("the cat\\nsat down")
    6
    """
    return len(text.split()) + text.count("\n") + (text != "" and not text.endswith("\n"))


def with_line_end(text: str) -> str:
    """The text with an end of its last line, for models of words, to which that is an `<eos>` to predict."""
    return text if text.endswith("\n") or not text else text + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A model's score on a text."""

    nll: float
    """−Σ ln p over all tokens, in nats."""
    num_tokens: int
    """Tokens that were scored."""
    num_words: int
    """Words of the text, by `count_words`."""
    num_bytes: int
    """Bytes of the text in UTF-8."""
    sha256: str
    """Of the text in UTF-8."""
    has_unk: bool = False
    """Whether the tokenizer gave `<unk>` for some of the text, which is then not told in full."""

    def __post_init__(self) -> None:
        if min(self.num_tokens, self.num_words, self.num_bytes) < 1:
            raise ParameterError(
                f"text to score: expected tokens, got {self.num_tokens} of {self.num_bytes} bytes; "
                "give a text that is not empty"
            )
        if math.isnan(self.nll):
            raise StateError(
                "score: expected a number, got NaN; the session's state or the bundle is damaged: "
                "check the bundle with `sdgm-edge verify`"
            )

    @classmethod
    def of(cls, text: str, nll: float, num_tokens: int, *, has_unk: bool = False) -> Self:
        """Score a text whose tokens have this NLL in all. Raises ParameterError, StateError."""
        data = text.encode()
        return cls(
            nll=nll,
            num_tokens=num_tokens,
            num_words=count_words(text),
            num_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            has_unk=has_unk,
        )

    @property
    def token_perplexity(self) -> float:
        """exp(nll / num_tokens). Tokenizer-dependent: compare only models that share a tokenizer."""
        return _exp(self.nll / self.num_tokens)

    @property
    def word_perplexity(self) -> float:
        """exp(nll / num_words): comparable between tokenizers, and with published word-level results."""
        return _exp(self.nll / self.num_words)

    @property
    def bits_per_byte(self) -> float:
        """nll / (num_bytes · ln 2). Raises TokenizerError where `<unk>` hides part of the text."""
        if self.has_unk:
            raise TokenizerError(
                "bits_per_byte: expected a tokenizer that can tell every byte, got <unk>; "
                "use word_perplexity, or a byte-level tokenizer"
            )
        return self.nll / (self.num_bytes * math.log(2))

    @property
    def byte_perplexity(self) -> float:
        """2 ** bits_per_byte. Raises as that does."""
        return _exp(self.bits_per_byte * math.log(2))

    def to_dict(self) -> dict[str, Any]:
        """All fields and figures, as JSON knows them.

        The byte figures are None where `<unk>` occurs, and every figure is that no float holds: the word
        perplexity of a text that is one long word.
        """
        figures = {
            "nll": self.nll,
            "num_tokens": self.num_tokens,
            "num_words": self.num_words,
            "num_bytes": self.num_bytes,
            "sha256": self.sha256,
            "has_unk": self.has_unk,
            "token_perplexity": self.token_perplexity,
            "word_perplexity": self.word_perplexity,
            "bits_per_byte": None if self.has_unk else self.bits_per_byte,
            "byte_perplexity": None if self.has_unk else self.byte_perplexity,
        }
        return {name: None if value == math.inf else value for name, value in figures.items()}


def score_chunks(text: str, chunks: Iterable[NDArray[np.floating[Any]]], *, has_unk: bool = False) -> Score:
    """Score a text from the NLLs of its tokens, given chunk by chunk. Raises ParameterError, StateError."""
    nll, num_tokens = 0.0, 0
    for chunk in chunks:
        nll += float(np.sum(chunk, dtype=np.float64))
        num_tokens += len(chunk)
    return Score.of(text, nll, num_tokens, has_unk=has_unk)


def token_nlls(
    logits_TV: NDArray[np.floating[Any]], targets_T: NDArray[np.integer[Any]]
) -> NDArray[np.float64]:
    """−ln softmax(logits)[target] of each position, (T,). Raises ParameterError on ids out of range."""
    num_positions, vocab_size = logits_TV.shape
    targets_T = np.asarray(targets_T)
    if targets_T.shape != (num_positions,):
        raise ParameterError(
            f"targets: expected shape ({num_positions},), got {targets_T.shape}; give one for each position"
        )
    if num_positions and not 0 <= targets_T.min() <= targets_T.max() < vocab_size:
        raise ParameterError(
            f"targets: expected ids from 0 to {vocab_size - 1}, got {targets_T.min()} to {targets_T.max()}; "
            "use this model's tokenizer"
        )
    with np.errstate(invalid="ignore"):  # infinite logits give NaN, which `Score` refuses
        shifted_TV = logits_TV - logits_TV.max(axis=1, keepdims=True)
    at_target_T = shifted_TV[np.arange(num_positions), targets_T].astype(np.float64)
    np.exp(shifted_TV, out=shifted_TV)
    return np.asarray(np.log(shifted_TV.sum(axis=1, dtype=np.float64)) - at_target_T)


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf


def chunk_nlls(
    engine: "Engine", chunks: Iterable[list[int]], begin_token: int
) -> Iterator[tuple[list[int], NDArray[np.float64]]]:
    """The tokens of a text, in chunks of at most `engine.chunk`, with −ln p of each."""
    state, before = engine.zeros(), begin_token
    for ids in chunks:
        logits_TV, state = engine.all([before, *ids[:-1]], state)
        before = ids[-1]
        yield ids, token_nlls(logits_TV, np.array(ids))
