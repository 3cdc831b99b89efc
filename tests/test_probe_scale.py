"""The probe of scale: what is trained in which setting, what is said of what cannot be, and what is told."""

import dataclasses

import pytest

from sdgm_edge import probe_scale as module
from sdgm_edge.compare import Outcome, entry_config
from sdgm_edge.config import CorpusConfig
from sdgm_edge.inference import Inference
from sdgm_edge.probe_scale import COLUMNS, Scale, ScaleRow, cells, probe_scale
from sdgm_edge.runtime import ConfigError, ContextCost, CorpusError
from sdgm_edge.trial import Result

LINE = "the cat sat on the mat and the dog lay on the rug by the fire.\n"


@pytest.fixture
def scale(tmp_path):
    (tmp_path / "text.txt").write_text(LINE * 200)
    return Scale(
        corpus=CorpusConfig(train=(str(tmp_path / "text.txt"),)),
        windows=(64, 128),
        vocabularies=(260, 270),
        num_parameters=50_000,
        max_steps=3,
        minutes=0,
        device="cpu",
    )


@pytest.fixture
def calls(monkeypatch):
    """What is asked of `compare`, which trains nothing here."""
    asked = []

    def compare(entries, terms, folder, cache, seeds=1, contexts=(), progress=None):
        asked.append((list(entries), terms, contexts))
        result = Result(status="finished", num_parameters=2_000_000, tokens_per_second=50.0, steps=3)
        cost = ContextCost(
            tokens_per_second=7.0, tokens_per_second_by_clock=8.0, peak=3_000_000, first_token=0.1
        )
        return [
            Outcome(e, 0, folder, result, Inference(costs=dict.fromkeys(contexts, cost))) for e in entries
        ]

    monkeypatch.setattr(module, "compare", compare)
    return asked


def test_windows_grow_and_then_vocabularies(scale):
    assert scale.settings == [(64, 260), (128, 260), (64, 270)]


def test_nothing_changes_but_what_is_said(scale, calls, tmp_path):
    rows = probe_scale(["sdgm", "gpt2:depth=1"], scale, tmp_path / "out", tmp_path / "cache")
    assert [(r.entry, r.window, r.vocab_size) for r in rows] == [
        (entry, window, size) for window, size in scale.settings for entry in ("sdgm", "gpt2:depth=1")
    ]
    assert [contexts for *_, contexts in calls] == [(0,), (64,), (0,)]
    base = entry_config("gpt2:depth=1", calls[0][1], 0).model
    for (window, size), (entries, terms, _) in zip(scale.settings, calls, strict=True):
        config = entry_config(entries[1], terms, 0)
        assert config.model == dataclasses.replace(base, window=window, vocab_size=size)
        assert config.training.batch_size * window == 128, "a batch has the tokens of the longest window"
        assert config.training.max_steps == 3
        assert config.corpus.vocab_size == size


def test_what_came_of_it_is_told_in_units(scale, calls, tmp_path):
    row, _, larger = probe_scale(["sdgm"], scale, tmp_path / "out", tmp_path / "cache")
    assert (row.decode_per_second, row.decode_peak_bytes, row.status) == (7.0, 3_000_000, "finished")
    assert 1 < row.bytes_per_token < larger.bytes_per_token
    told = dict(zip(COLUMNS, cells([row])[0], strict=True))
    assert told["parameters, M"] == pytest.approx(2)
    assert told["decoding peak, MB"] == pytest.approx(3)
    assert (told["window"], told["vocabulary"], told["bits per byte"]) == (64, 260, None)
    fields = {field.name for field in dataclasses.fields(ScaleRow)}
    assert {name for name, _ in COLUMNS.values()} == fields - {"reason"}
    probe_scale(["sdgm"], dataclasses.replace(scale, inference=False), tmp_path / "out", tmp_path / "cache")
    assert calls[-1][2] == ()


def test_what_the_text_does_not_give_is_said(scale, calls, tmp_path):
    large = dataclasses.replace(scale, windows=(64, 10_000), vocabularies=(260, 60_000))
    rows = probe_scale(["sdgm", "gpt2"], large, tmp_path / "out", tmp_path / "cache")
    assert [row.status for row in rows] == ["impossible"] * 6  # no batch of the longest window fits either
    assert "and a batch of such windows needs 9985" in rows[0].reason  # 156 windows of 64
    assert "a batch of such windows needs 10001" in rows[2].reason
    assert "the text is too small for a vocabulary of 60000" in rows[4].reason
    assert calls == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": ()}, r"expected windows of at least 1 token, got \[\]"),
        ({"windows": (8, 0)}, r"expected windows of at least 1 token, got \[8, 0\]"),
        ({"vocabularies": (70_000,)}, r"expected vocabularies of 257 to 65536, got \[70000\]"),
        ({"minutes": 1.0}, "expected minutes or max_steps, got 1 and 3"),
        ({"max_steps": 0}, "expected minutes or max_steps, got 0 and 0"),
        ({"corpus": CorpusConfig(tokenizer="word")}, "expected a bpe tokenizer, .*, got word"),
    ],
)
def test_settings_that_make_no_sense_are_refused(scale, changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(scale, **changes)


def test_a_text_that_cannot_be_read_is_no_row(scale, calls, tmp_path):
    missing = dataclasses.replace(scale, corpus=CorpusConfig(train=(str(tmp_path / "none.txt"),)))
    with pytest.raises(CorpusError, match=r"none.txt: no such file or folder"):
        probe_scale(["sdgm"], missing, tmp_path / "out", tmp_path / "cache")
    assert calls == []


def test_an_entry_that_cannot_be_read_is_refused_before_anything_is_trained(scale, calls, tmp_path):
    with pytest.raises(ConfigError, match="got 'gpt9'"):
        probe_scale(["sdgm", "gpt9"], scale, tmp_path / "out", tmp_path / "cache")
    assert calls == []
