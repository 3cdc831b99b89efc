"""Probes: what is asked has one answer, the answer is where it should be, and who can see it learns it."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from sdgm_edge.models import build_model
from sdgm_edge.probe import (
    ASK,
    FILLER,
    LENGTH,
    NO_ANSWER,
    NOISE,
    SYMBOLS,
    TASKS,
    VOCABULARY,
    Probe,
    measure,
    probe,
    sequences,
    table,
    train,
)
from sdgm_edge.runtime import ConfigError, RunError

TINY = Probe(num_parameters=20_000, steps=2, batch_size=4, trained_distance=4, distances=(3, 300), tested=4)


def make(task, distance, batch=16, seed=0):
    return TASKS[task](np.random.default_rng(seed), batch, distance)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("distance", [1, 9, 70])
def test_questions_are_made_of_tokens_and_answers_of_symbols(task, distance):
    ids, answers = make(task, distance)
    assert ids.shape == answers.shape
    assert ids.min() >= 0
    assert ids.max() < VOCABULARY
    asked = answers != NO_ANSWER
    assert np.isin(answers[asked], SYMBOLS).all()
    assert (asked.sum(1) == asked[0].sum()).all()
    same = make(task, distance)
    np.testing.assert_array_equal(same[0], ids)
    assert not np.array_equal(make(task, distance, seed=1)[0], ids)


@pytest.mark.parametrize("task", ["copy", "selective"])
def test_what_is_said_again_is_what_was_told(task):
    ids, answers = make(task, 11)
    for row, answer in zip(ids, answers, strict=True):
        told, again = row[: LENGTH + 11], answer[LENGTH + 11 :]
        assert list(told[np.isin(told, SYMBOLS)]) == list(again)
        rest = told[~np.isin(told, SYMBOLS)]
        assert (rest == FILLER).all() if task == "copy" else np.isin(rest, NOISE).all()
        assert row[LENGTH + 11] == ASK
        assert list(row[LENGTH + 12 :]) == list(again[:-1])


def test_the_answer_to_a_key_is_its_value():
    ids, answers = make("recall", 5)
    for row, answer in zip(ids, answers, strict=True):
        pairs = dict(row[:16].reshape(8, 2).tolist())
        assert len(pairs) == 8
        assert [pairs[k] for k in row[21:][1::2]] == list(answer[21:][1::2])
        assert (row[21:][::2] == ASK).all()
        assert (answer[21:][::2] == NO_ANSWER).all()


def test_the_needle_lies_at_its_distance():
    ids, answers = make("needle", 13)
    place = ids.shape[1] - 1 - 13 - 1
    np.testing.assert_array_equal(ids[:, place], answers[:, -1])
    assert (ids[:, [place - 1, -1]] == ASK).all()
    assert (np.isin(ids, SYMBOLS).sum(1) == 1).all()


def test_a_model_learns_what_lies_within_its_reach_and_guesses_beyond():
    settings = dataclasses.replace(TINY, steps=400, batch_size=16, learning_rate=1e-2)
    torch.manual_seed(0)
    model = build_model(settings.model("nplm:depth=1"))  # sees eight tokens
    assert train(model, "needle", settings) < 1.0
    assert measure(model, "needle", 3, 64) > 0.9
    assert measure(model, "needle", 30, 64) < 0.2


@pytest.mark.parametrize("task", TASKS)
def test_the_same_task_begins_at_any_place(task):
    rng = np.random.default_rng(0)
    places = set()
    for _ in range(200):
        ids, answers = sequences(task, rng, 2, 6)
        lead = ids.shape[1] - make(task, 6)[0].shape[1]
        places.add(lead)
        assert (ids[:, :lead] == FILLER).all()
        assert (answers[:, :lead] == NO_ANSWER).all()
    assert places == set(range(16))


def test_accuracy_counts_answers_alone():
    class Knowing(torch.nn.Module):
        """Says what came three tokens before."""

        def initial_state(self, batch):
            return torch.zeros(batch, 3)

        def forward(self, ids, state):
            seen = torch.cat([state.long(), ids], dim=1)
            logits = torch.nn.functional.one_hot(seen[:, :-3], VOCABULARY).float()
            return logits, None, seen[:, -3:].float()

    assert measure(Knowing(), "needle", 2, 64) == 1.0
    assert measure(Knowing(), "needle", 2000, 64) == 0.0


@pytest.mark.parametrize("entry", ["sdgm", "gpt2"])
def test_nothing_is_dropped_from_a_text_that_is_made_anew(entry):
    model = TINY.model(entry)
    assert (model.dropout, model.atom_dropout, model.embedding_dropout) == (0, 0, 0)


@pytest.mark.parametrize("entry", ["sdgm:lr=1e-6", "sdgm:optimizer=muon", "sdgm:dropout=0.4", "sdgm:alpha=1"])
def test_what_a_probe_does_not_heed_is_refused(entry):
    with pytest.raises(
        ConfigError, match=f"{entry}: expected fields of the model alone, and none of dropout"
    ):
        Probe().model(entry)


def test_findings_are_kept(tmp_path):
    told = []
    first = probe(["sdgm", "gpt2"], ["needle", "recall"], TINY, tmp_path, told.append)
    assert [(f.task, f.entry) for f in first] == [
        ("needle", "sdgm"), ("needle", "gpt2"), ("recall", "sdgm"), ("recall", "gpt2")
    ]  # fmt: skip
    assert all(set(f.accuracy) == {3, 300} for f in first)
    assert told[0].startswith("needle, sdgm: 3: ")
    assert probe(["sdgm", "gpt2"], ["needle", "recall"], TINY, tmp_path) == first
    titles, rows = table(first)
    assert titles == ["task", "model", "3", "300"]
    assert [row[:2] for row in rows] == [[f.task, f.entry] for f in first]
    assert rows[0][2] == f"{first[0].accuracy[3]:.0%}"
    with pytest.raises(RunError, match=r"needle-gpt2\.json is a finding with other settings"):
        probe(["gpt2"], ["needle"], dataclasses.replace(TINY, seed=1), tmp_path)
    (tmp_path / "needle-gpt2.json").write_text("{")
    with pytest.raises(RunError, match=r"needle-gpt2\.json is damaged .* delete it"):
        probe(["gpt2"], ["needle"], TINY, tmp_path)


def test_minutes_are_as_many_steps_as_fit(tmp_path, monkeypatch):
    seconds = itertools.count()
    monkeypatch.setattr("sdgm_edge.probe.time.perf_counter", lambda: next(seconds))
    for minutes, steps in ((0.01, 12), (1e-9, 1)):  # twenty steps a second
        timed = dataclasses.replace(TINY, minutes=minutes)
        (found,) = probe(["lstm"], ["needle"], timed, tmp_path / str(steps))
        assert found.steps == steps


def test_windows_hold_what_is_trained():
    for distance in (1, 100, 128, 1000):
        settings = dataclasses.replace(TINY, trained_distance=distance)
        longest = 15 + max(TASKS[task](np.random.default_rng(0), 1, distance)[0].shape[1] for task in TASKS)
        assert longest <= settings.window < 4 * (longest + 16)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ConfigError, match="--tasks: expected copy, selective, recall, needle, got 'juggle'"):
        probe(["sdgm"], ["juggle"], TINY, tmp_path)
    with pytest.raises(ConfigError, match="probe: steps must be at least 1, got 0"):
        dataclasses.replace(TINY, steps=0)
    with pytest.raises(ConfigError, match="probe: minutes must be at least 0, got -1"):
        dataclasses.replace(TINY, minutes=-1)
    with pytest.raises(ConfigError, match="probe: distances must be numbers of at least 1, got"):
        dataclasses.replace(TINY, distances=())
