import errno
import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from sdgm_edge import shards
from sdgm_edge.evaluation import score, total_nll
from sdgm_edge.models import build_model, preset
from sdgm_edge.runtime import ConfigError, CorpusError, count_words
from sdgm_edge.shards import Corpus, build_shard, prepare_corpus, split_documents
from sdgm_edge.sources import Document, open_documents
from sdgm_edge.tokenization import BEGIN_ID, train_bpe, train_words

LINES = "".join(f"line {number} of a text about cats, no. {number * 7919 % 10007}\n" for number in range(400))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(LINES)
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def prepare(source: Path, cache: Path, **options: Any) -> Corpus:
    return prepare_corpus([source], cache=cache, **{"vocab_size": 300} | options)


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


# ---- what is in a shard


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=4))
def test_bpe_shard_is_the_documents_each_after_a_begin_token(tmp_path_factory, texts: list[str]) -> None:
    assume(not any("\0" in content or content.startswith("\ufeff") for content in texts))
    folder = tmp_path_factory.mktemp("documents")
    for number, content in enumerate(texts):
        (folder / f"{number}.txt").write_bytes(content.encode())
    tokenizer = train_bpe(["nothing"], vocab_size=257)
    shard = build_shard(open_documents([folder], folder), tokenizer, folder / "cache")
    expected = [number for content in texts for number in (BEGIN_ID, *tokenizer.encode(content))]
    assert shard.tokens.tolist() == expected
    assert len(shard) == len(expected)
    assert shard.num_bytes == len("".join(texts).encode())
    assert shard.num_words == sum(map(count_words, texts))


def test_word_shard_counts_as_published(text: Path, cache: Path) -> None:
    documents = open_documents([text], cache)
    shard = build_shard(documents, train_words([LINES]), cache)
    assert shard.tokens[0] == BEGIN_ID
    assert len(shard) - 1 == shard.num_words == len(LINES.split()) + 400


def test_word_document_ends_with_end_of_line(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.txt").write_text("a b")
    shard = build_shard(open_documents([tmp_path], cache), train_words(["a b"]), cache)
    assert shard.tokens.tolist() == [0, 2, 3, 0]


@pytest.mark.parametrize("kind", ["bpe", "word"])
def test_an_unfinished_last_line_is_counted_and_scored_as_one(tmp_path: Path, cache: Path, kind: str) -> None:
    text = "a b c\nd e f\n" * 300 + "a b"
    (tmp_path / "t.txt").write_text(text)
    settings = {"tokenizer_kind": kind, "vocab_size": 260 if kind == "bpe" else None}
    corpus = prepare_corpus([tmp_path / "t.txt"], [tmp_path / "t.txt"], cache=cache, **settings)
    torch.manual_seed(0)
    model = build_model(preset("edge-nano", vocab_size=corpus.tokenizer.vocab_size, width=16, num_atoms=8))
    scored = score(model, corpus.tokenizer, text)
    assert scored.num_words == corpus.valid.num_words
    assert scored.num_tokens == len(corpus.valid) - 1
    assert scored.nll == pytest.approx(total_nll(model, corpus.valid.tokens))


def test_words_are_counted_across_pieces(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 100_000 + " two")
    shard = build_shard(open_documents([tmp_path], cache), train_bpe(["x"], 257), cache)
    assert shard.num_words == 3, "two, and an end of the line"


def test_hash_is_that_of_the_file(text: Path, cache: Path) -> None:
    (document,) = open_documents([text], cache)
    assert build_shard([document], train_bpe(["x"], 257), cache).sha256 == document.sha256


@pytest.mark.parametrize(("num_words", "dtype"), [(65_534, "uint16"), (65_535, "uint32")])
def test_width_of_tokens_follows_the_vocabulary(
    tmp_path: Path, cache: Path, num_words: int, dtype: str
) -> None:
    content = " ".join(map(str, range(num_words))) + "\n"
    (tmp_path / "a.txt").write_text(content)
    tokenizer = train_words([content])
    shard = build_shard(open_documents([tmp_path], cache), tokenizer, cache)
    assert shard.tokens.dtype == dtype
    assert shard.tokens.max() == tokenizer.vocab_size - 1 == num_words + 1
    assert len(np.unique(shard.tokens)) == num_words + 1  # all but <unk>


def test_tokens_are_mapped_and_read_only(text: Path, cache: Path) -> None:
    tokens = prepare(text, cache).train.tokens
    assert isinstance(tokens, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def test_compressed_text_gives_the_same_shard(text: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "packed.gz").write_bytes(gzip.compress(LINES.encode()))
    prepare(text, cache)
    before = files(cache)
    prepare(tmp_path / "packed.gz", cache)
    assert files(cache) == before


# ---- training and validation text


def test_one_document_is_split_at_its_tail(text: Path, cache: Path) -> None:
    corpus = prepare(text, cache)
    head = corpus.tokenizer.decode(corpus.train.tokens[1:].tolist())
    tail = corpus.tokenizer.decode(corpus.valid.tokens[1:].tolist())
    assert head + tail == LINES
    assert head.endswith("\n")
    assert len(tail) == pytest.approx(0.05 * len(LINES), abs=60)
    assert corpus.heldout_text == tail


def test_many_documents_are_split_by_content(tmp_path: Path, cache: Path) -> None:
    for number in range(100):
        (tmp_path / f"{number}.txt").write_text(f"document {number}\n")
    documents = open_documents([tmp_path], cache)
    train, valid = split_documents(documents)
    assert {*train, *valid} == {*documents}
    assert 3 <= len(valid) <= 10
    assert {part.sha256 for part in split_documents(documents[::-1])[1]} == {part.sha256 for part in valid}


def test_few_large_documents_are_not_held_out_whole(tmp_path: Path, cache: Path) -> None:
    for name, times in (("a", 1), ("b", 3), ("c", 2)):
        (tmp_path / f"{name}.txt").write_text(LINES * times + name)
    train, (tail,) = split_documents(open_documents([tmp_path], cache))
    assert len(train) == 3
    assert tail.name.endswith("b.txt")
    assert tail.num_bytes == pytest.approx(0.05 * 6 * len(LINES), rel=0.05)


def test_validation_text_of_its_own(text: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "valid.txt").write_text("held\n")
    corpus = prepare(text, cache, valid_sources=[tmp_path / "valid.txt"])
    assert corpus.train.num_bytes == len(LINES)
    assert corpus.heldout_text == "held\n"


def test_validation_text_seen_in_training_is_told(
    text: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(text, cache, valid_sources=[text])
    assert "text.txt (1 of 1 validation texts) is training text too" in caplog.text


def test_what_is_held_out_is_trained_on_nowhere(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "a.txt").write_text(LINES)
    (tmp_path / "book" / "a.txt.gz").write_bytes(gzip.compress(LINES.encode()))
    corpus = prepare(tmp_path / "book", cache)
    assert corpus.train.num_bytes + corpus.valid.num_bytes == len(LINES)
    assert "a.txt.gz is left out: " in caplog.text


def test_vocabulary_is_of_the_training_text(text: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "valid.txt").write_text("unheard\n")
    corpus = prepare(
        text, cache, valid_sources=[tmp_path / "valid.txt"], tokenizer_kind="word", vocab_size=None
    )
    assert corpus.valid.tokens.tolist() == [0, 1, 0]


def test_heldout_text_is_capped_at_a_line_end(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(f"é{number}\nsecond\n")
    documents = open_documents([tmp_path], cache)
    assert shards._beginning(documents, 1000) == "é0\nsecond\n\né1\nsecond\n"
    assert shards._beginning(documents, 8) == "é0\n"
    assert shards._beginning(documents, 13) == "é0\nsecond\n\né"
    assert shards._beginning(documents, 1) == ""


def test_given_tokenizer_is_used(text: Path, cache: Path) -> None:
    tokenizer = train_bpe(["x"], 257)
    corpus = prepare(text, cache, tokenizer=tokenizer)
    assert corpus.tokenizer is tokenizer
    assert len(corpus.train) == corpus.train.num_bytes + 1


def test_unknown_kind(text: Path, cache: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer_kind: expected bpe or word, got 'char'"):
        prepare(text, cache, tokenizer_kind="char")


def test_vocabulary_too_large_leaves_no_tokens(text: Path, cache: Path) -> None:
    for _ in range(2):  # the second time what was learnt is found
        with pytest.raises(CorpusError, match="too small for a vocabulary of 60000: it gives"):
            prepare(text, cache, vocab_size=60_000)
    assert not list(cache.glob("shard-*"))


def test_vocabulary_of_at_most_so_many(text: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = prepare(text, cache, vocab_size=60_000, at_most=True).tokenizer
    assert 257 < small.vocab_size < 60_000
    assert f"it gives {small.vocab_size} tokens, which are taken" in caplog.text
    caplog.clear()
    assert prepare(text, cache, vocab_size=small.vocab_size, at_most=True).tokenizer.sha256 == small.sha256
    assert not caplog.text


def test_default_vocabulary_on_the_embedded_corpus(cache: Path) -> None:
    corpus = prepare_corpus(["pydoc"], cache=cache)
    assert corpus.tokenizer.vocab_size == 4096
    assert len(corpus.train) > 20 * len(corpus.valid) / 2 > 10_000


# ---- used again, made anew


def test_reused_when_nothing_changed(text: Path, cache: Path) -> None:
    first = prepare(text, cache)
    before = files(cache)
    second = prepare(text, cache)
    assert files(cache) == before
    assert len(before) == 5  # two shards of two files, and a tokenizer
    assert second.train.tokens.tolist() == first.train.tokens.tolist()
    assert second.tokenizer.sha256 == first.tokenizer.sha256


def test_made_anew_when_the_text_or_the_vocabulary_changed(text: Path, cache: Path) -> None:
    prepare(text, cache)
    prepare(text, cache, vocab_size=310)
    assert len(files(cache)) == 10
    text.write_text(LINES.replace("cats", "dogs"))
    corpus = prepare(text, cache)
    assert len(files(cache)) == 15
    assert "dogs" in corpus.heldout_text


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-2]),
        lambda path: path.write_bytes(path.read_bytes() + b"\0\0"),
        lambda path: path.write_bytes(b""),
        lambda path: path.with_suffix(".json").write_text("{"),
        lambda path: path.with_suffix(".json").write_text("[]"),
        lambda path: path.with_suffix(".json").write_text('{"format": 1}'),
        lambda path: path.with_suffix(".json").write_text(
            json.dumps(json.loads(path.with_suffix(".json").read_text()) | {"dtype": "text"})
        ),
    ],
)
def test_damaged_shard_is_made_anew(
    text: Path, cache: Path, caplog: pytest.LogCaptureFixture, damage
) -> None:
    first = prepare(text, cache).valid.tokens.tolist()
    for path in cache.glob("shard-*.bin"):
        damage(path)
    assert prepare(text, cache).valid.tokens.tolist() == first
    assert "is made anew" in caplog.text


def test_shard_without_its_second_file_is_made_anew(text: Path, cache: Path) -> None:
    first = prepare(text, cache).valid.tokens.tolist()
    for path in cache.glob("shard-*.json"):
        path.unlink()
    assert prepare(text, cache).valid.tokens.tolist() == first


def test_damaged_tokenizer_is_made_anew(text: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = prepare(text, cache).tokenizer.sha256
    (path,) = cache.glob("tokenizer-*.json")
    path.write_text("{")
    assert prepare(text, cache).tokenizer.sha256 == first
    assert "it is made anew" in caplog.text


def test_full_disk_leaves_no_shard(text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    documents = open_documents([text], cache)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        CorpusError, match=r"shard-.*\.bin: cannot be written: No space left on device; free some"
    ):
        build_shard(documents, train_bpe(["x"], 257), cache)
    assert not list(cache.iterdir())


def test_interrupted_shard_leaves_nothing(text: Path, cache: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_shard(open_documents([text], cache), train_bpe(["x"], 257), cache, interrupt)
    assert not list(cache.iterdir())


# ---- at work


def test_progress_reaches_the_end(text: Path, cache: Path) -> None:
    told: list[tuple[str, int, int]] = []
    prepare(text, cache, progress=lambda *step: told.append(step))
    for what in ("learning the vocabulary", "tokenising"):
        steps = [(done, total) for name, done, total in told if name == what]
        assert steps
        assert all(0 <= done <= total for done, total in steps)
    assert told[-1][1] == told[-1][2]


def test_vocabulary_is_learnt_from_a_spread_sample(
    text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "VOCABULARY_BYTES", 4096)
    monkeypatch.setattr(shards, "_PIECE", 1024)
    seen: list[str] = []

    def learn(texts, vocab_size: int):
        seen.extend(texts)
        return train_bpe([LINES], vocab_size)

    monkeypatch.setattr(shards, "train_bpe", learn)
    prepare(text, cache)
    assert 2048 < len("".join(seen)) <= 4096 + 1024
    assert LINES.index(seen[0]) == 0
    assert LINES.index(seen[-1]) > len(LINES) / 2


class CountingReader(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:
        assert size is not None
        assert 0 < size <= 1 << 20
        return super().read(size)


def test_text_is_read_no_further_than_it_is_tokenised(cache: Path) -> None:
    """Memory does not grow with the corpus: little is read that is not yet tokenised."""
    data = b"a line of text\n" * 500_000
    stream = CountingReader(data)
    ahead: list[int] = []
    document = Document("memory", "0" * 64, 0, len(data), lambda: stream)
    shard = build_shard(
        [document],
        train_words(["a line of text"]),
        cache,
        lambda what, done, total: ahead.append(-1 if stream.closed else stream.tell() - done),
    )
    assert len(shard) == 2_500_001
    assert len(ahead) > 2
    assert max(ahead) <= 1 << 19
