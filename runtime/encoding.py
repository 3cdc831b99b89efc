"""From text to ids, piece by piece, so that a long text needs no more memory than a short one."""

import re
from collections.abc import Iterator

from tokenizers import Tokenizer

from .errors import ParameterError

PIECE = 1 << 16
"""Characters that are encoded at once."""
_CUT = re.compile(r"(?<=\S)(?=[ \n]\S)")


def encode(tokenizer: Tokenizer, text: str) -> Iterator[int]:
    """The tokens of a text, with nothing put before it.

    A long text is cut before a single space or line end between two words, where the tokenizers of bundles
    cut too; where there is none for `PIECE` characters, it is cut there all the same.

    Raises:
        ParameterError: the text is not valid Unicode.
    """
    start = 0
    while start < len(text):
        end = start + PIECE
        if end < len(text):
            cut = _CUT.search(text, end, end + PIECE)
            end = cut.start() if cut else end + PIECE
        try:
            ids = tokenizer.encode(text[start:end], add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError) as e:
            raise ParameterError(f"text is not valid Unicode: {e}; was it read as UTF-8?") from e
        yield from ids
        start = end
