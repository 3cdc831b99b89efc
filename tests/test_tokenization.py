import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sdgm_edge.runtime import ConfigError, TokenizerError
from sdgm_edge.tokenization import (
    BEGIN_ID,
    END_OF_LINE,
    END_OF_TEXT,
    UNKNOWN,
    Tokenizer,
    train_bpe,
    train_words,
)

TEXT = "the cat sat on the mat\nand the cat sat again, naïvely\n"
BPE = train_bpe([TEXT] * 2, vocab_size=280)
WORD = train_words(["the cat\nsat <unk>\n", "the mat\n"])


@given(st.text())
@example("")
@example("  leading and trailing \r\n\n ")
@example("\x00\x7f\u200b\ufeff\U0001f600 e\u0301")
@example(f"a{END_OF_TEXT}b")
def test_bpe_gives_back_any_text(text: str) -> None:
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text
    assert all(0 <= number < BPE.vocab_size for number in ids)


def test_bpe_adds_nothing_to_a_prompt() -> None:
    assert BPE.decode(BPE.encode("the")) == "the"
    assert BPE.encode("the")[0] != BPE.encode(" the")[0]
    assert BPE.encode("the cat") + BPE.encode(" sat") == BPE.encode("the cat sat")


def test_bpe_numbers() -> None:
    assert BPE.kind == "bpe"
    assert BPE.vocab_size == 280
    assert BPE.token_id(END_OF_TEXT) == BEGIN_ID
    assert BPE.token_id(UNKNOWN) is None
    assert BPE.encode(END_OF_TEXT) == [BEGIN_ID]


def test_bpe_compresses() -> None:
    assert len(BPE.encode(TEXT)) < 0.7 * len(TEXT)


def test_smallest_bpe_is_the_bytes() -> None:
    tokenizer = train_bpe(["any"], vocab_size=257)
    assert len(tokenizer.encode("naïve")) == len("naïve".encode())


def test_bpe_is_deterministic_across_processes() -> None:
    code = (
        "from sdgm_edge.tokenization import train_bpe;"
        f"print(train_bpe([{TEXT!r}] * 2, vocab_size=280).sha256)"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == BPE.sha256


@pytest.mark.parametrize("size", [256, 65_537])
def test_bpe_vocabulary_out_of_range(size: int) -> None:
    with pytest.raises(ConfigError, match=f"vocab_size: expected 257 to 65536 for bpe, got {size}"):
        train_bpe([TEXT], vocab_size=size)


def test_bpe_vocabulary_larger_than_the_text_can_give() -> None:
    found = train_bpe([TEXT] * 2, vocab_size=4096)
    assert 257 < found.vocab_size < 4096
    assert train_bpe([TEXT] * 2, vocab_size=found.vocab_size).sha256 == found.sha256


def test_words_as_published() -> None:
    ids = WORD.encode(" the dog \n sat \n")
    the, sat = WORD.token_id("the"), WORD.token_id("sat")
    assert ids == [the, WORD.token_id(UNKNOWN), BEGIN_ID, sat, BEGIN_ID]
    assert WORD.token_id(END_OF_LINE) == BEGIN_ID
    assert WORD.kind == "word"
    assert WORD.vocab_size == 6  # the cat sat mat <unk> <eos>


def test_words_are_numbered_by_frequency_then_name() -> None:
    assert [WORD.token_id(token) for token in (END_OF_LINE, UNKNOWN, "the", "cat", "mat", "sat")] == list(
        range(6)
    )


def test_words_decode_to_lines() -> None:
    assert WORD.decode(WORD.encode("the cat\nsat\n")) == "the cat\n sat\n"
    assert WORD.decode([BEGIN_ID, *WORD.encode("the mat")]) == "\n the mat"


@given(st.lists(st.sampled_from(["the", "cat", "sat", "mat", "<unk>"]), max_size=9))
def test_words_give_back_their_words(words: list[str]) -> None:
    assert WORD.decode(WORD.encode(" ".join(words))).split() == words


def test_word_vocabulary_can_be_cut_to_the_frequent() -> None:
    tokenizer = train_words(["the the cat"], vocab_size=3)
    assert tokenizer.encode("the cat") == [2, 1]


def test_word_vocabulary_without_room() -> None:
    with pytest.raises(ConfigError, match="vocab_size: expected 3 or more for word, got 2"):
        train_words(["a"], vocab_size=2)


def test_word_vocabulary_larger_than_the_text_can_give() -> None:
    assert train_words(["a b"], vocab_size=9).vocab_size == 4


@pytest.mark.parametrize("tokenizer", [BPE, WORD])
def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "new" / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.kind == tokenizer.kind
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    assert [file.name for file in path.parent.iterdir()] == ["tokenizer.json"]


def test_save_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: cannot be written: .*; free some space"):
        BPE.save(tmp_path / "file" / "tokenizer.json")


def test_load_missing(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"none\.json cannot be read: No such file"):
        Tokenizer.load(tmp_path / "none.json")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": {"type": "BPE"}}', "\ud800"])
def test_load_damaged(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is damaged or no tokenizer"):
        Tokenizer.load(path)


def stored(tmp_path: Path, tokenizer: Tokenizer) -> tuple[Path, dict[str, dict[str, object]]]:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    return path, json.loads(path.read_text("utf-8"))


def test_load_another_kind(tmp_path: Path) -> None:
    path, content = stored(tmp_path, BPE)
    content["model"] = {"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "#",
                        "max_input_chars_per_word": 9, "vocab": {"a": 0}}  # fmt: skip
    path.write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match="expected a model BPE or WordLevel, got WordPiece"):
        Tokenizer.load(path)


def test_load_with_a_gap_in_its_numbers(tmp_path: Path) -> None:
    path, content = stored(tmp_path, WORD)
    content["model"]["vocab"] = {END_OF_LINE: 0, UNKNOWN: 1, "the": 3}
    path.write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=r"tokens numbered from 0 on, <eos> first"):
        Tokenizer.load(path)


def test_load_without_a_byte(tmp_path: Path) -> None:
    path, content = stored(tmp_path, train_bpe(["any"], vocab_size=257))
    vocabulary = content["model"]["vocab"]
    assert isinstance(vocabulary, dict)
    vocabulary["spare"] = vocabulary.pop("z")
    path.write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=r"lacks 1 basic tokens, as 'z'"):
        Tokenizer.load(path)


def test_text_that_is_no_unicode() -> None:
    with pytest.raises(TokenizerError, match="expected Unicode without lone surrogates"):
        BPE.encode("a\ud800")
