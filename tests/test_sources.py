import gzip
import io
import os
import sys
import tempfile
import threading
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdgm_edge import sources
from sdgm_edge.runtime import CorpusError
from sdgm_edge.sources import Document, content_key, lasting, open_documents, read_text
from sdgm_edge.tokenization import train_bpe


def text_of(documents: list[Document]) -> str:
    return "".join(piece for document in documents for piece in document.pieces())


def memory_document(data: bytes) -> Document:
    return Document("memory", "0" * 64, 0, len(data), lambda: io.BytesIO(data))


def test_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("première\r\nligne\n".encode())
    (document,) = open_documents([tmp_path / "a.txt"], tmp_path)
    assert text_of([document]) == "première\r\nligne\n"
    assert document.num_bytes == len("première\r\nligne\n".encode())


def test_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text", "utf-8-sig")
    assert text_of(open_documents([tmp_path / "a.txt"], tmp_path)) == "text"


def test_folder_in_order_without_hidden_and_foreign_files(tmp_path: Path) -> None:
    for name in ("b/2.md", "a/1.txt", "c.rst", "d.text", ".hidden.txt", ".git/x.txt", "code.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name + "\n")
    with gzip.open(tmp_path / "e.TXT.gz", "wb") as file:
        file.write(b"e\n")
    assert text_of(open_documents([tmp_path], tmp_path)) == "c.rst\nd.text\ne\na/1.txt\nb/2.md\n"


def test_glob_takes_what_it_matches_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "x.py").write_text("x\n")
    (tmp_path / "deep/y.py").write_text("y\n")
    assert text_of(open_documents(["**/*.py", "x.py", str(tmp_path / "x.py")], tmp_path)) == "y\nx\n"


def test_a_text_that_is_only_read_is_kept_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"private")))
    assert read_text(["-"]) == "private"
    assert list(tmp_path.iterdir()) == []


def test_glob_passes_over_folders_without_text(tmp_path: Path) -> None:
    for name in ("pictures/a.png", "deep/x.txt", "y.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for pattern in ("*", "**", "**/*"):
        matched = open_documents([f"{tmp_path}/{pattern}", tmp_path / "y.txt"], tmp_path)
        assert {Path(document.name).name for document in matched} >= {"x.txt", "y.txt"}
    with pytest.raises(CorpusError, match="matches no file"):
        open_documents([f"{tmp_path}/pic*"], tmp_path)


def test_name_with_glob_characters_is_a_name_first(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("it")
    assert text_of(open_documents([tmp_path / "a[1].txt"], tmp_path)) == "it"


def test_gzip_is_told_by_content(tmp_path: Path) -> None:
    (tmp_path / "packed").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "plain.gz").write_bytes(b"plain")
    assert text_of(open_documents([tmp_path / "packed", tmp_path / "plain.gz"], tmp_path)) == "packedplain"


@pytest.mark.parametrize("data", [b"typed\n", gzip.compress(b"typed\n")], ids=["plain", "packed"])
def test_standard_input_can_be_read_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    documents = open_documents(["-"], tmp_path / "spool")
    assert text_of(documents) == text_of(documents) == "typed\n"
    assert documents[0].name == "standard input"
    assert len(list((tmp_path / "spool").iterdir())) == 1


def test_standard_input_that_is_closed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(CorpusError, match="standard input is closed: expected text; name a file, or pipe"):
        open_documents(["-"], tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without named pipes")
def test_pipe_can_be_read_twice(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("piped\n",))
    writer.start()
    documents = open_documents([pipe], tmp_path / "spool")
    writer.join()
    assert text_of(documents) == text_of(documents) == "piped\n"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without named pipes")
def test_lasting_sources_are_the_same_from_another_folder_and_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "a.txt").write_text("filed\n")
    os.mkfifo("pipe")
    writer = threading.Thread(target=Path("pipe").write_text, args=("piped\n",))
    writer.start()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"typed\n")))
    found = lasting(["a.txt", "*.txt", "-", "pipe", "pydoc"], tmp_path / "spool")
    writer.join()
    monkeypatch.chdir(tmp_path / "here")
    assert found[4] == "pydoc"
    assert text_of(open_documents(found[:4], tmp_path / "spool")) == "filed\ntyped\npiped\n"


def test_embedded_corpus_has_one_document_a_topic_and_no_text_twice(tmp_path: Path) -> None:
    documents = open_documents(["pydoc"], tmp_path)
    assert len(documents) > 50
    assert len({document.sha256 for document in documents}) == len(documents)
    assert 'The "with" statement' in text_of(documents)


def test_embedded_corpus_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(CorpusError, match="this Python lacks; name a text file"):
        open_documents(["pydoc"], tmp_path)


def test_content_key_depends_on_content_and_parts_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.txt").write_text("one\ntwo\n")
    a, b = ([*open_documents([tmp_path / name], tmp_path)] for name in ("a.txt", "b.txt"))
    assert content_key(a) == content_key(b)
    assert len({content_key(a), content_key([a[0].split(0.5)[0]]), content_key([*a, *b])}) == 3


# ---- what cannot be used, each with what, where and the remedy


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"nowhere\.txt: no such file or folder; check the path"):
        open_documents([tmp_path / "nowhere.txt"], tmp_path)


def test_glob_without_a_match(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"\*\.txt matches no file; check the pattern"):
        open_documents([f"{tmp_path}/*.txt"], tmp_path)


def test_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("a")
    with pytest.raises(CorpusError, match=r"no text file in this folder, expected \.txt.* give a glob"):
        open_documents([tmp_path], tmp_path)


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_empty_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(CorpusError, match=r"a\.txt is empty; name a text file with"):
        open_documents([tmp_path / "a.txt"], tmp_path)


def test_a_byte_order_mark_alone_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(CorpusError, match=r"a.txt is empty"):
        open_documents([tmp_path / "a.txt"], tmp_path)


def test_a_folder_that_cannot_be_listed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("text")
    scandir = os.scandir

    def refusing(path: str) -> object:  # as for those who may not read it, whom root is not among
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(CorpusError, match=r"closed cannot be read: Permission denied; check its permissions"):
        open_documents([tmp_path], tmp_path)


def test_a_pattern_lasts_also_where_the_folder_s_name_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data[1]").mkdir()
    (tmp_path / "data[1]" / "x.txt").write_text("text")
    monkeypatch.chdir(tmp_path / "data[1]")
    (kept,) = lasting(["*.txt"], tmp_path)
    monkeypatch.chdir(tmp_path)
    assert text_of(open_documents([kept], tmp_path)) == "text"


def test_empty_file_in_a_folder_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.txt").write_text("b")
    assert text_of(open_documents([tmp_path], tmp_path)) == "b"
    assert "a.txt is empty and is left out" in caplog.text


def test_folder_of_empty_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.txt").touch()
    with pytest.raises(CorpusError, match=r"no text in .*; name a text file"):
        open_documents([tmp_path], tmp_path)


def test_no_source(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no text in an empty list"):
        open_documents([], tmp_path)


def test_binary_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 300_000 + b"\0")
    with pytest.raises(
        CorpusError, match=r"a\.txt is not a text file: NUL at byte 300000; .*iconv -f UTF-16"
    ):
        open_documents([tmp_path / "a.txt"], tmp_path)


@pytest.mark.parametrize("at", [5, sources._BLOCK - 1, sources._BLOCK])
def test_invalid_utf8(tmp_path: Path, at: int) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * at + b"\xe9t\xe9")
    with pytest.raises(CorpusError, match=rf"is not UTF-8: .* at byte {at}; convert it.*iconv -f LATIN1"):
        open_documents([tmp_path / "a.txt"], tmp_path)


def test_character_broken_off_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("né".encode()[:-1])
    with pytest.raises(CorpusError, match="unexpected end of data at byte 1"):
        open_documents([tmp_path / "a.txt"], tmp_path)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-12], lambda data: data[:30] + b"\xff" * 20 + data[50:]]
)
def test_damaged_gzip(tmp_path: Path, damage) -> None:
    (tmp_path / "a.txt.gz").write_bytes(damage(gzip.compress(os.urandom(200).hex().encode())))
    with pytest.raises(
        CorpusError, match=r"a\.txt\.gz cannot be read: .*; check its permissions or fetch it anew"
    ):
        open_documents([tmp_path / "a.txt.gz"], tmp_path)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr(sources, "_open_file", refuse)
    with pytest.raises(CorpusError, match=r"a\.txt cannot be read: Permission denied"):
        open_documents([tmp_path / "a.txt"], tmp_path)


def test_text_too_short_to_split() -> None:
    with pytest.raises(CorpusError, match=r"memory: 1 bytes cannot be split .* name a validation file"):
        memory_document(b"a").split(0.5)


# ---- pieces and parts

WORDS = st.text(st.sampled_from("ab1.é \t\n"), max_size=300)


@given(WORDS, st.integers(1, 50))
def test_pieces_join_to_the_text(text: str, size: int) -> None:
    pieces = list(memory_document(text.encode()).pieces(size))
    assert "".join(pieces) == text
    assert all(pieces)
    assert max(map(len, pieces), default=0) <= size + 2


BPE = train_bpe(["ab a1 é. \n\t 11 aab  \n"] * 3, vocab_size=262)


@given(
    st.lists(st.sampled_from(["ab", " ab", "\n", "  b", "1.", " \n", "\t", "é"]), max_size=60).map("".join)
)
def test_pieces_have_the_tokens_of_the_whole_where_a_line_end_or_a_space_allows(text: str) -> None:
    pieces = list(memory_document(text.encode()).pieces(20))
    together, at = BPE.encode(text), 0
    apart = [token for ids in BPE.encode_batch(pieces) for token in ids]
    clean = True
    for piece, following in pairwise(pieces):
        at += len(piece)
        spaces = len(following) - len(following.lstrip())
        after_line = piece.endswith("\n") and (spaces == 1 or (spaces == 0 and not piece[-2:-1].isspace()))
        between_words = spaces == 1 and following[0] == " " and not piece[-1].isspace()
        clean &= after_line or between_words
    assert not clean or apart == together


def test_pieces_of_lines_that_end_in_two_characters_have_the_tokens_of_the_whole() -> None:
    text = "ab é 11 aab.\r\n  b ab 1.\r\n" * 30
    pieces = list(memory_document(text.encode()).pieces(20))
    assert len(pieces) > 20
    assert [token for ids in BPE.encode_batch(pieces) for token in ids] == BPE.encode(text)


@given(WORDS.filter(lambda text: len(text.encode()) > 1 and len(text) > 1), st.floats(0.01, 0.99))
def test_split_is_head_and_tail(text: str, share: float) -> None:
    head, tail = memory_document(text.encode()).split(share)
    assert text_of([head]) + text_of([tail]) == text
    assert head.num_bytes > 0 < tail.num_bytes


def test_split_is_at_the_nearest_line_end() -> None:
    data = b"".join(b"line %d\n" % number for number in range(1000))
    head, tail = memory_document(data).split(0.05)
    assert text_of([head]).endswith("\n")
    assert tail.num_bytes == pytest.approx(0.05 * len(data), abs=10)
