import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from sdgm_edge.runtime import ParameterError, TokenizerError, encoding

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


@pytest.mark.parametrize("separator", "\x1c\x1d\x1e\x1f\x85\u00a0\u2028\v\f\t\r")
def test_a_long_text_is_cut_before_spaces_and_line_ends_alone(separator):
    """Python takes some separators for white space that tokenizers join with what stands before."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([f"a!{separator}b"] * 50, trainer)
    text = "b" * (encoding.PIECE - 1) + f"!{separator}b and more"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert list(encoding.encode(tokenizer, text)) == ids


def test_a_long_text_without_a_space_is_cut_all_the_same():
    text = "你" * (3 * encoding.PIECE)
    ids = list(encoding.encode(TOKENIZER, text))
    assert TOKENIZER.decode(ids) == text


def test_text_that_is_not_unicode_is_refused():
    with pytest.raises(ParameterError, match=r"text is not valid Unicode: .*; was it read as UTF-8"):
        list(encoding.encode(TOKENIZER, "a\ud800"))


def test_a_tokenizer_that_has_no_token_for_a_text_is_told():
    tokenizer = Tokenizer(models.WordLevel({"river": 0}, unk_token="<unk>"))
    with pytest.raises(TokenizerError, match=r"the tokenizer cannot encode 'sea': .*Missing \[UNK\] token"):
        list(encoding.encode(tokenizer, "sea"))


def test_a_panic_in_a_tokenizer_is_told():
    tokenizer = Tokenizer.from_buffer(tiny.tokenizer_json())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    with pytest.raises(TokenizerError, match=r"the tokenizer cannot encode 'a.*retry-limit-in-match over"):
        list(encoding.encode(tokenizer, "a" * 40 + "b"))
