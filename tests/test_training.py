"""The loop with everything real: files, subprocesses, signals, `torchrun`."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sdgm_edge import checkpoint, losses
from sdgm_edge.config import load_config
from sdgm_edge.losses import vocabulary_nll
from sdgm_edge.optimizers import learning_rate
from sdgm_edge.process import supports_bf16
from sdgm_edge.recorder import read_log
from sdgm_edge.run import load_run, locked, new_folder, newest_run
from sdgm_edge.runtime import CheckpointError, CorpusError, DivergedError, RunError
from sdgm_edge.shards import prepare_corpus
from sdgm_edge.tokenization import BEGIN_ID
from sdgm_edge.training import Interrupted, train

TINY = {"num_layers": 1, "width": 16, "num_atoms": 8, "glu_width": 16, "window": 16, "dropout": 0.2}
TOGETHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rng = np.random.default_rng(0)
    path.write_text("".join(" ".join(words[i:] + words[:i]) + ".\n" for i in rng.integers(0, 10, 600)))
    return path


@pytest.fixture(scope="session")
def corpus(text):
    return prepare_corpus([text], vocab_size=280, cache=text.parent / "cache")


def config(preset="edge-nano", model=None, loss=None, **training):
    base = {"batch_size": 4, "max_steps": 24, "num_components": 3}
    return load_config(
        preset=preset, model={**TINY, **(model or {})}, loss=loss or {}, training={**base, **training}
    )


def final(folder):
    return checkpoint.load(checkpoint.existing(folder / "checkpoints", "last")[-1]).tensors


class StopAfter:
    """Sends this process SIGINT at a step, as Ctrl-C does."""

    def __init__(self, step):
        self.step = step

    def __call__(self, progress):
        if progress.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


LOSSES = {"reconstruction": 1.0, "spectrum": 0.1, "prior": 1e-3}
PAPER = {"num_layers": 1, "width": 16, "num_atoms": 8, "glu_width": 0, "window": 16, "copy_window": 8}


@pytest.mark.parametrize(
    ("preset", "model", "loss", "training"),
    [
        ("edge-nano", {}, {}, {}),
        ("edge-nano", {}, {}, {"optimizer": "muon"}),
        ("edge-nano", {"copy_window": 8}, {}, {"sampled_words": 40}),
        ("paper", PAPER, LOSSES, {}),
    ],
    ids=["edge", "edge, by muon", "edge, sampled words", "paper, all losses"],
)
def test_resumed_is_bit_for_bit_the_uninterrupted_run(corpus, tmp_path, preset, model, loss, training):
    settings = config(preset, model, loss, valid_steps=5, early_stop=0, **training)
    train(settings, corpus, tmp_path / "whole")
    with pytest.raises(Interrupted, match="stopped at step 11 of 24; go on with --resume"):
        train(settings, corpus, tmp_path / "parts", on_step=StopAfter(11))
    train(settings, corpus, tmp_path / "parts", resume=True)
    whole, parts = final(tmp_path / "whole"), final(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
    for name in ("weights", "means", "variances"):
        with np.load(tmp_path / "whole/gmm.npz") as one, np.load(tmp_path / "parts/gmm.npz") as other:
            np.testing.assert_array_equal(one[name], other[name])
    steps = [[row["step"] for row in read_log(tmp_path / run / "log.csv")] for run in ("whole", "parts")]
    assert steps[0] == steps[1]


def test_training_learns_and_leaves_a_whole_run(corpus, tmp_path):
    summary = train(config(max_steps=150, valid_steps=50, learning_rate=1e-2), corpus, tmp_path / "run")
    assert summary.valid_token_perplexity < 10 < corpus.tokenizer.vocab_size
    run = load_run(tmp_path / "run")
    assert not run.model.training
    assert run.config.vocab_size == corpus.tokenizer.vocab_size
    assert {name: a.shape for name, a in run.prior.items()} == {
        "weights": (3,),
        "means": (3, 16),
        "variances": (3, 16),
    }
    assert run.heldout == corpus.heldout_text
    assert (tmp_path / "run/curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "run/tensorboard").glob("events*"))
    rows = read_log(tmp_path / "run/log.csv")
    assert float(rows[0]["loss"]) > float([row for row in rows if row["loss"]][-1]["loss"])
    assert [row["step"] for row in rows if row["valid_token_perplexity"]] == ["50", "100", "150"]


def test_words_are_sampled_until_the_last_part_and_never_in_validation(corpus, tmp_path, monkeypatch):
    asked = []

    def spy(features, model, targets, sampled_words=0):
        asked.append(sampled_words if torch.is_grad_enabled() else "validation")
        return vocabulary_nll(features, model, targets, sampled_words)

    monkeypatch.setattr(losses, "vocabulary_nll", spy)
    train(config(max_steps=10, sampled_words=40, exact_part=0.3), corpus, tmp_path / "run")
    assert asked == [40] * 7 + [0] * 3
    train(config(max_steps=2), corpus, tmp_path / "plain")
    assert asked[10:] == [0, 0]


def test_a_fresh_window_has_no_past_and_follows_the_begin_token(corpus, tmp_path, monkeypatch):
    seen = []

    def objective(self, ids, targets, state):
        seen.append((ids.clone(), state.clone()))
        return forward(self, ids, targets, state)

    forward = losses.Objective.forward
    monkeypatch.setattr(losses.Objective, "forward", objective)
    train(config(max_steps=12, fresh_starts=0.4), corpus, tmp_path / "run")
    fresh = torch.cat([ids[:, 0] == BEGIN_ID for ids, _ in seen[1:]])  # the first step has no state yet
    empty = torch.cat([(state == 0).all(1) for _, state in seen[1:]])
    assert torch.equal(fresh, empty)
    assert 0 < fresh.sum() < len(fresh)


@pytest.mark.parametrize("carried", [True, False])
def test_state_is_empty_where_an_epoch_begins_and_wherever_none_is_carried(
    corpus, tmp_path, monkeypatch, carried
):
    empty = []

    def objective(self, ids, targets, state):
        empty.append(bool((state == 0).all()))
        return forward(self, ids, targets, state)

    forward = losses.Objective.forward
    monkeypatch.setattr(losses.Objective, "forward", objective)
    settings = config(epochs=2, max_steps=0, batch_size=64, carry_state=carried, fresh_starts=0.0)
    summary = train(settings, corpus, tmp_path / "run")
    epoch = summary.steps // 2
    assert empty == [not carried or step % epoch == 0 for step in range(2 * epoch)]


def test_early_stop_ends_when_validation_does_not_improve(corpus, tmp_path):
    settings = config(
        max_steps=400, valid_steps=2, early_stop=2, learning_rate=1e-9, ema_decay=0.0, warmup=0.0
    )
    # A step of 1e-9 changes nothing that a validation in float32 would see as better for long.
    summary = train(settings, corpus, tmp_path / "run")
    assert summary.steps < 400


def test_a_loss_that_is_no_number_stops_with_what_to_try(corpus, tmp_path):
    settings = config(
        learning_rate=9.9, clip=0.0, warmup=0.0, valid_steps=1, max_steps=2000, optimizer="adam"
    )

    def poison(progress):
        if progress.step == 3:
            weight = next(frame for frame in [sys._getframe()]).f_back.f_locals["self"].model.bias
            weight.data.fill_(math.nan)

    with pytest.raises(
        DivergedError, match=r"loss is nan at step 4, learning rate 9.90e\+00: try a lower .*last-0+3"
    ):
        train(settings, corpus, tmp_path / "run", on_step=poison)
    assert all(tensor.isfinite().all() for tensor in final(tmp_path / "run").values())


def test_a_run_that_ended_before_its_first_checkpoint_is_begun_anew(corpus, tmp_path):
    train(config(max_steps=3), corpus, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")  # as a process leaves it that memory ran out for
    with pytest.raises(RunError, match="has no checkpoint to resume from: train without --resume"):
        train(config(), corpus, tmp_path / "run", resume=True)
    assert train(config(max_steps=2), corpus, tmp_path / "run").steps == 2
    assert [row["step"] for row in read_log(tmp_path / "run/log.csv")] == ["2"]


def test_a_model_that_has_gone_astray_is_told_and_no_failure_of_python(corpus, tmp_path):
    lost = config(learning_rate=9.9, warmup=0.0, max_steps=6, ema_decay=0.0, optimizer="adam")
    assert train(lost, corpus, tmp_path / "far").valid_word_perplexity > 1e6

    def poison(progress):
        sys._getframe().f_back.f_locals["self"].averaged.bias.data.fill_(math.nan)

    with pytest.raises(DivergedError, match="loss of the validation text is nan after step 2: try a lower"):
        train(config(valid_steps=2), corpus, tmp_path / "nan", on_step=poison)


def test_the_seconds_of_a_run_are_those_of_all_its_sessions(corpus, tmp_path):
    with pytest.raises(Interrupted):
        train(config(), corpus, tmp_path / "run", on_step=StopAfter(3))
    [last] = checkpoint.existing(tmp_path / "run/checkpoints", "last")
    meta = json.loads((last / "meta.json").read_text())
    meta["values"]["seconds"] = 5000.0
    (last / "meta.json").write_text(json.dumps(meta))
    summary = train(config(), corpus, tmp_path / "run", resume=True)
    assert 5000 < summary.seconds < 6000
    assert summary.tokens_per_second > 1


def test_mixing_vectors_are_collected_where_the_prior_counts(corpus, tmp_path):
    train(config(max_steps=2), corpus, tmp_path / "edge")
    assert "reservoir" not in final(tmp_path / "edge")
    many = config("paper", PAPER, LOSSES, max_steps=2, valid_steps=1, num_components=100)
    train(many, corpus, tmp_path / "paper")  # fewer vectors than components, after the first step
    assert "reservoir" in final(tmp_path / "paper")


@pytest.mark.parametrize(
    ("damage", "written"),
    [("no heldout.txt", b""), ("heldout.txt", b""), ("heldout.txt", b"\x80\xff"), ("gmm.npz", b"\x80\xff")],
)
def test_a_damaged_run_is_told(corpus, tmp_path, damage, written):
    train(config(max_steps=2), corpus, tmp_path / "run")
    path = tmp_path / "run" / damage.removeprefix("no ")
    path.unlink() if damage.startswith("no ") else path.write_bytes(written)
    with pytest.raises(RunError, match=f"{path.name} is missing or damaged .*: copy the run again, or train"):
        load_run(tmp_path / "run")


def test_a_folder_takes_one_run(corpus, tmp_path):
    folder = tmp_path / "run"
    with (
        locked(folder),
        pytest.raises(RunError, match=r"another run is writing to .*run: wait for it, or choose"),
    ):
        train(config(), corpus, folder)
    train(config(max_steps=2), corpus, folder)
    with pytest.raises(RunError, match="holds a run already: go on with it by --resume"):
        train(config(), corpus, folder)


def test_a_run_goes_on_in_the_precision_it_began_with(corpus, tmp_path):
    usual, other = ("bf16", "float32") if supports_bf16(torch.device("cpu")) else ("float32", "bf16")

    def embedding(name, **resumed):
        with pytest.raises(Interrupted):
            train(config(max_steps=6), corpus, tmp_path / name, precision=other, on_step=StopAfter(3))
        train(config(), corpus, tmp_path / name, resume=True, **resumed)
        return final(tmp_path / name)["model.embedding.weight"]

    train(config(max_steps=6), corpus, tmp_path / "whole", precision=other)
    whole = final(tmp_path / "whole")["model.embedding.weight"]
    assert torch.equal(embedding("auto"), whole)
    assert not torch.equal(embedding("asked", precision=usual), whole)


def begun_from(folder, **training):
    """Settings of a run that begins with the best weights of another."""
    return dataclasses.replace(config(**training), begun_from=str(folder))


def test_a_run_can_begin_with_the_weights_of_another(corpus, tmp_path):
    train(config(max_steps=12), corpus, tmp_path / "base")
    best = load_run(tmp_path / "base").model.state_dict()
    still = {"learning_rate": 1e-12, "weight_decay": 0.0, "warmup": 0.0}
    train(begun_from(tmp_path / "base", max_steps=1, **still), corpus, tmp_path / "run")
    for name, tensor in load_run(tmp_path / "run").model.state_dict().items():
        torch.testing.assert_close(tensor, best[name], atol=1e-6, rtol=1e-6, msg=name)
    with pytest.raises(Interrupted):
        train(begun_from(tmp_path / "base"), corpus, tmp_path / "parts", on_step=StopAfter(11))
    train(begun_from(tmp_path / "base"), corpus, tmp_path / "whole")
    shutil.rmtree(tmp_path / "base")
    train(config(), corpus, tmp_path / "parts", resume=True)
    whole, parts = final(tmp_path / "whole"), final(tmp_path / "parts")
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    with pytest.raises(RunError, match="base has no checkpoint yet"):
        train(begun_from(tmp_path / "base"), corpus, tmp_path / "orphan")


def test_a_run_of_another_shape_is_no_beginning(corpus, tmp_path):
    train(config(model={"num_atoms": 6}, max_steps=1), corpus, tmp_path / "base")
    with pytest.raises(CheckpointError, match="does not fit"):
        train(begun_from(tmp_path / "base"), corpus, tmp_path / "run")
    assert not (tmp_path / "run/config.json").exists(), "nothing was begun"


def test_weights_go_on_as_they_were_where_they_are_averaged_no_more(corpus, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(config(max_steps=4, ema_decay=0.9), corpus, folder, on_step=StopAfter(3))
    plain = final(folder)["model.embedding.weight"]
    changed = json.loads((folder / "config.json").read_text())
    changed["training"] |= {"ema_decay": 0.0, "learning_rate": 1e-12, "max_steps": 4}
    (folder / "config.json").write_text(json.dumps(changed))
    train(config(), corpus, folder, resume=True)
    assert torch.allclose(final(folder)["model.embedding.weight"], plain, atol=1e-6)


def test_resuming_names_what_does_not_fit(corpus, text, tmp_path):
    with pytest.raises(RunError, match=r"is not a run folder: it has no config.json"):
        train(config(), corpus, tmp_path / "none", resume=True)
    train(config(max_steps=2), corpus, tmp_path / "run")
    other = text.parent / "other.txt"
    other.write_text(text.read_text()[:-200])
    changed = prepare_corpus([other], tokenizer=corpus.tokenizer, cache=text.parent / "cache")
    with pytest.raises(CheckpointError, match="was trained on another text"):
        train(config(), changed, tmp_path / "run", resume=True)
    judged = prepare_corpus([text], [other], tokenizer=corpus.tokenizer, cache=text.parent / "cache")
    judged = dataclasses.replace(corpus, valid=judged.valid)
    with pytest.raises(CheckpointError, match="was validated on another text"):
        train(config(), judged, tmp_path / "run", resume=True)
    settings = json.loads((tmp_path / "run/config.json").read_text())
    for table, name, value in (
        ("model", "width", 20),
        ("loss", "prior", 0.5),
        ("training", "optimizer", "muon"),
        ("training", "batch_size", 8),
    ):
        edited = {**settings, table: {**settings[table], name: value}}
        (tmp_path / "run/config.json").write_text(json.dumps(edited))
        told = (
            rf"{table}.{name} is {value!r}, and the checkpoint is of {settings[table][name]!r}: put that back"
        )
        with pytest.raises(CheckpointError, match=told):
            train(config(), corpus, tmp_path / "run", resume=True)
    last = checkpoint.existing(tmp_path / "run/checkpoints", checkpoint.LAST)[-1]
    saved = checkpoint.load(last)
    del saved.values["settings"], saved.values["valid"]  # as checkpoints of before have none
    checkpoint.save(saved, tmp_path / "run/checkpoints", checkpoint.LAST, 2)
    (tmp_path / "run/config.json").write_text(
        json.dumps({**settings, "model": {**settings["model"], "width": 20}})
    )
    with pytest.raises(CheckpointError, match="does not fit"):
        train(config(), corpus, tmp_path / "run", resume=True)
    (tmp_path / "run/config.json").write_text("{")
    with pytest.raises(RunError, match=r"config.json is damaged"):
        train(config(), corpus, tmp_path / "run", resume=True)


def test_a_run_whose_best_weights_were_deleted_finds_them_again(corpus, tmp_path):
    train(config(max_steps=2), corpus, tmp_path / "run")
    (best,) = checkpoint.existing(tmp_path / "run/checkpoints", checkpoint.BEST)
    shutil.rmtree(best)
    summary = train(config(), corpus, tmp_path / "run", resume=True)
    assert math.isfinite(summary.valid_word_perplexity)
    assert checkpoint.existing(tmp_path / "run/checkpoints", checkpoint.BEST) == [best]


def test_a_first_save_that_fails_says_to_train_again(corpus, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        CheckpointError, match="No space left on device; free some space and train again: there is no"
    ):
        train(config(max_steps=2), corpus, tmp_path / "run")


def test_runs_are_found_and_named(corpus, tmp_path):
    with pytest.raises(RunError, match=r"no trained run under .*: train one first"):
        newest_run(tmp_path)
    for name in ("b", "a"):
        train(config(max_steps=1), corpus, tmp_path / name)
    assert newest_run(tmp_path).name == "a"
    (tmp_path / "dead").mkdir()
    (tmp_path / "dead/config.json").write_text("{}")  # of a process that was killed before it saved
    assert newest_run(tmp_path).name == "a"
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="is not a run folder"):
        load_run(tmp_path / "empty")
    settings = load_config(preset="edge-nano", corpus={"train": ["some/dir/my.book.txt"]})
    assert new_folder(tmp_path, settings).name == "my-edge-nano"
    (tmp_path / "my-edge-nano").mkdir()
    assert new_folder(tmp_path, settings).name == "my-edge-nano-2"
    assert new_folder(tmp_path, load_config()).name == "pydoc-edge-micro"


def test_a_text_shorter_than_a_batch_is_told(corpus, tmp_path):
    with pytest.raises(CorpusError, match="need 160001: give more text, or a smaller batch_size or window"):
        train(config(batch_size=10_000), corpus, tmp_path / "run")
    assert not (tmp_path / "run/config.json").exists()


def test_schedule():
    settings = config(learning_rate=1.0, warmup=0.1).training
    rates = [learning_rate(settings, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5, abs=0.02)
    assert 0 < rates[-1] < 0.01
    assert learning_rate(config(schedule="constant", learning_rate=1.0).training, 99, 100) == 1.0


def test_training_works_outside_the_main_thread(corpus, tmp_path):
    result = []
    thread = threading.Thread(
        target=lambda: result.append(train(config(max_steps=2), corpus, tmp_path / "run"))
    )
    thread.start()
    thread.join()
    assert result[0].steps == 2


def command(*arguments):
    return [sys.executable, "-m", "sdgm_edge", *map(str, arguments)]


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "tiny.toml"
    whole = {**TINY, "dropout": 0.0, "atom_dropout": 0.0}
    lines = "\n".join(f"{key} = {value}" for key, value in whole.items())
    path.write_text(
        f'preset = "edge-nano"\n[model]\n{lines}\n[training]\nbatch_size = 4\nnum_components = 3\n'
    )
    return path


def test_ctrl_c_saves_exits_130_and_resume_goes_on(text, tmp_path, toml):
    out = tmp_path / "run"
    environment = {**os.environ, "SDGM_EDGE_CACHE": str(tmp_path / "cache")}
    arguments = ("train", text, "--config", toml, "--vocab-size", 280, "--out", out, "--max-steps", 100_000)
    process = subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, text=True, env=environment)
    while not (out / "log.csv").exists() or len(read_log(out / "log.csv")) < 2:
        time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "go on with --resume" in errors
    assert "Traceback" not in errors
    step = int(checkpoint.existing(out / "checkpoints", "last")[-1].name.removeprefix("last-"))
    settings = json.loads((out / "config.json").read_text())
    settings["training"]["max_steps"] = step + 5
    (out / "config.json").write_text(json.dumps(settings))
    done = subprocess.run(
        command("train", "--resume", "--out", out, "--json"), capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == step + 5


@pytest.mark.parametrize("source", ["of the config", "standard input"])
def test_a_run_is_resumed_from_any_folder_whatever_its_text_came_from(text, tmp_path, toml, source):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "my.txt").write_text(text.read_text())
    named = '[corpus]\ntrain = ["my.txt"]\nvocab_size = 280\n' if source == "of the config" else ""
    toml.write_text(toml.read_text() + named)
    texts = [] if named else ["-", "--vocab-size", 280]

    def sdgm(folder, *arguments, typed=""):
        return subprocess.run(
            command("train", *arguments), cwd=folder, input=typed, capture_output=True, text=True,
            env={**os.environ, "SDGM_EDGE_CACHE": str(tmp_path / "cache")},
        )  # fmt: skip

    begun = sdgm(tmp_path, *texts, "--config", toml, "--out", "run", "--max-steps", 3, typed=text.read_text())
    assert begun.returncode == 0, begun.stderr
    settings = json.loads((tmp_path / "run/config.json").read_text())
    settings["training"]["max_steps"] = 5
    (tmp_path / "run/config.json").write_text(json.dumps(settings))
    resumed = sdgm(tmp_path / "elsewhere", "--resume", "--out", "../run", "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["steps"] == 5


def on_one_thread(tmp_path, *arguments):
    environment = {**os.environ, "SDGM_EDGE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, arguments)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_command_begins_from_a_run_with_its_tokenizer_on_another_text(text, tmp_path, toml):
    def sdgm(*arguments):
        environment = {**os.environ, "SDGM_EDGE_CACHE": str(tmp_path / "cache")}
        return subprocess.run(command(*arguments), capture_output=True, text=True, env=environment)

    base = tmp_path / "base"
    sdgm("train", text, "--config", toml, "--vocab-size", 280, "--max-steps", 3, "--out", base)
    other = tmp_path / "other.txt"
    other.write_text("and now for something completely different, every day\n" * 300)
    done = sdgm("train", other, "--from", base, "--max-steps", 2, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    for name in ("tokenizer.json", "config.json"):
        assert (tmp_path / "run" / name).is_file()
    assert (tmp_path / "run/tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    made, of = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "run", base))
    assert made["model"] == of["model"]
    assert made["begun_from"] == str(base)
    shutil.rmtree(base)
    again = sdgm("train", "--resume", "--out", tmp_path / "run")
    assert again.returncode == 0, again.stderr
    for flags, told in (
        (("--from", tmp_path / "run", "--vocab-size", 300), "--from takes the tokenizer of .*got bpe of 300"),
        (("--from", tmp_path / "run", "--preset", "paper"), "preset: expected none beside a run"),
        (("--from", base), "is not a run folder"),
        (("--resume", "--from", tmp_path / "run"), "expected none of its settings, got --from"),
    ):
        refused = sdgm("train", *(() if "--resume" in flags else (other,)), *flags)
        assert refused.returncode in (1, 2)
        assert re.search(told, refused.stderr), refused.stderr


def test_two_processes_train_as_one(text, tmp_path, toml):
    arguments = (
        "train",
        text,
        "--config",
        toml,
        "--vocab-size",
        280,
        "--max-steps",
        30,
        "--precision",
        "float32",
    )
    on_one_thread(tmp_path, *command(*arguments, "--out", tmp_path / "one"))
    on_one_thread(tmp_path, *TOGETHER, "-m", "sdgm_edge", *arguments, "--out", tmp_path / "two")
    one, two = read_log(tmp_path / "one/log.csv"), read_log(tmp_path / "two/log.csv")
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "language", "cosine", "valid_token_perplexity"):
            if a[name]:
                assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-3), (name, a["step"])
    for name, tensor in final(tmp_path / "one").items():
        if name.startswith("model."):
            torch.testing.assert_close(tensor, final(tmp_path / "two")[name], atol=2e-4, rtol=1e-3, msg=name)


def test_two_processes_resume_as_if_they_had_not_been_stopped(text, tmp_path):
    settings = config(
        "paper", {**PAPER, "dropout": 0.2}, {"prior": 0.0}, early_stop=0, valid_steps=100
    ).to_dict()
    # No prior: its mixture would be fitted where the first part ends.
    given = {table: settings[table] for table in ("model", "loss", "training")}
    del given["model"]["vocab_size"], given["training"]["max_steps"]
    lines = [
        line
        for table, values in given.items()
        for line in (f"[{table}]", *(f"{name} = {json.dumps(value)}" for name, value in values.items()))
    ]
    (tmp_path / "run.toml").write_text("\n".join(lines))

    def together(*arguments):
        on_one_thread(tmp_path, *TOGETHER, "-m", "sdgm_edge", "train", *arguments)

    begun = (text, "--config", tmp_path / "run.toml", "--vocab-size", 280)
    together(*begun, "--max-steps", 8, "--out", tmp_path / "whole")
    together(*begun, "--max-steps", 4, "--out", tmp_path / "parts")
    path = tmp_path / "parts/config.json"
    path.write_text(path.read_text().replace('"max_steps": 4', '"max_steps": 8'))
    together("--resume", "--out", tmp_path / "parts")
    whole, parts = final(tmp_path / "whole"), final(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name


@pytest.mark.skipif(sys.platform != "linux", reason="names of threads are read from /proc")
def test_training_as_one_leaves_no_thread_of_the_group(text, tmp_path, toml):
    # A thread of gloo that is still there when the interpreter ends aborts the process, now and then.
    script = tmp_path / "train.py"
    script.write_text(
        "from pathlib import Path\n"
        "from sdgm_edge.__main__ import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    names = [name.read_text() for name in Path('/proc/self/task').glob('*/comm')]\n"
        "    print('left', sum('gloo' in name for name in names), flush=True)\n"
    )
    arguments = ("train", text, "--config", toml, "--vocab-size", 280, "--max-steps", 2)
    told = on_one_thread(tmp_path, *TOGETHER, script, *arguments, "--out", tmp_path / "run")
    assert told.splitlines().count("left 0") == 2, told


@pytest.mark.parametrize("layer", ["gpt2", "lstm", "pom"])
def test_a_baseline_trains_in_the_same_loop(corpus, tmp_path, layer):
    settings = config(model={"layer": layer}, max_steps=30, learning_rate=1e-2)
    summary = train(settings, corpus, tmp_path / "run")
    assert summary.valid_token_perplexity < 0.7 * corpus.tokenizer.vocab_size
    run = load_run(tmp_path / "run")
    assert (run.config.layer, run.prior) == (layer, None)
    rows = [row for row in read_log(tmp_path / "run/log.csv") if row["loss"]]
    assert rows
    assert all(row["language"] and not row["cosine"] for row in rows)
