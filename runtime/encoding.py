"""From text to ids, piece by piece, so that a long text needs no more memory than a short one."""

import re
from collections.abc import Iterator

from tokenizers import Tokenizer

from .container import shown
from .errors import ParameterError, TokenizerError

PIECE = 1 << 16
"""Characters that are encoded at once."""
_CUT = re.compile(r"(?<=\S)(?=[ \n]\S)")


def encode(tokenizer: Tokenizer, text: str) -> Iterator[int]:
    """The tokens of a text, with nothing put before it.

    A long text is cut before a single space or line end between two words, where the tokenizers of bundles
    cut too; where there is none for `PIECE` characters, it is cut there all the same.

    Raises:
        ParameterError: the text is not valid Unicode.
        TokenizerError: the tokenizer has no tokens for it.
    """
    start = 0
    while start < len(text):
        end = start + PIECE
        if end < len(text):
            cut = _CUT.search(text, end, end + PIECE)
            end = cut.start() if cut else end + PIECE
        yield from _encoded(tokenizer, text[start:end])
        start = end


def _encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    except (UnicodeEncodeError, TypeError) as e:
        raise ParameterError(f"text is not valid Unicode: {e}; was it read as UTF-8?") from e
    except BaseException as e:  # a bare Exception, or for a panic of its Rust code a bare BaseException
        if isinstance(e, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise TokenizerError(
            f"the tokenizer cannot encode {shown(text)}: {shown(str(e), 120)}; "
            "give text of its own kind, or train it anew with a token for what it does not know"
        ) from None
    return ids
