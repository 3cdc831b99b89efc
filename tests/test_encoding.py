import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from sdgm_edge.runtime import ParameterError, encoding

TOKENIZER = Tokenizer.from_buffer(tiny.tokenizer_json())


def whole(text):
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def cut_by_force(text, piece):
    """Whether some piece has to end elsewhere than before a single space."""
    start = 0
    while start + piece < len(text):
        cut = encoding._CUT.search(text, start + piece, start + 2 * piece)
        if not cut:
            return True
        start = cut.start()
    return False


WORDS = ["Once", "time", " ", "  ", "\n", "\n\n", "é", "🙂", "'s", "42", ".", "\t"]


@given(text=st.lists(st.sampled_from(WORDS)).map("".join), piece=st.integers(1, 40))
def test_pieces_are_the_whole(text, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "PIECE", piece)
        ids = list(encoding.encode(TOKENIZER, text))
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    if not cut_by_force(text, piece):
        assert ids == whole(text)


def test_a_long_text_is_encoded_in_pieces_and_the_same(monkeypatch):
    text = tiny.TEXT * 2000
    assert len(text) > 4 * encoding.PIECE
    assert list(encoding.encode(TOKENIZER, text)) == whole(text)


def test_a_long_text_without_a_space_is_cut_all_the_same():
    text = "你" * (3 * encoding.PIECE)
    ids = list(encoding.encode(TOKENIZER, text))
    assert TOKENIZER.decode(ids) == text


def test_text_that_is_not_unicode_is_refused():
    with pytest.raises(ParameterError, match=r"text is not valid Unicode: .*; was it read as UTF-8"):
        list(encoding.encode(TOKENIZER, "a\ud800"))
