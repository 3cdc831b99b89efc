"""Comparisons: what entries mean, trials as processes that go on and never take the others along, reports."""

import dataclasses
import importlib
import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sdgm_edge.models.config import LAYERS, OF_SOME
from test_training import StopAfter

from sdgm_edge import trial as trials
from sdgm_edge.compare import (
    ABLATIONS,
    Outcome,
    Terms,
    _process,
    at_rates,
    compare,
    entry_config,
    parse_budget,
    parse_contexts,
    parse_entries,
    summarize,
)
from sdgm_edge.config import CorpusConfig
from sdgm_edge.inference import Inference
from sdgm_edge.losses import LossWeights
from sdgm_edge.models import MIXERS, ModelConfig, build_model, count_parameters
from sdgm_edge.report import COLUMNS, make_report
from sdgm_edge.run import locked, write_json
from sdgm_edge.runtime import ConfigError, ContextCost, DivergedError, ParityError, RunError
from sdgm_edge.shards import prepare_corpus
from sdgm_edge.training import Interrupted
from sdgm_edge.trial import Result, Trial, run_trial

PAPER = Path(__file__).resolve().parent.parent / "benchmarks/paper.py"
LINE = "the cat sat on the mat and the dog lay on the rug by the fire.\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    (folder / "text.txt").write_text(LINE * 200)
    return folder


@pytest.fixture(scope="module")
def terms(place):
    return Terms(
        corpus=CorpusConfig(train=(str(place / "text.txt"),), vocab_size=270),
        vocab_size=270,
        num_parameters=20_000,
        training={"max_steps": 6, "batch_size": 4},
        window=8,
        device="cpu",
        precision="float32",
    )


@pytest.fixture(scope="module")
def corpus(place):
    return prepare_corpus([place / "text.txt"], vocab_size=270, cache=place / "cache")


@pytest.fixture
def here(monkeypatch):
    """What a comparison runs as processes is run in this one, which has PyTorch loaded already."""
    modules = []

    def process(module, *arguments):
        modules.append(module)
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        try:
            importlib.import_module(module).main()
        except SystemExit as end:
            sys.stderr.write(f"{end}\n")
            return "ended with code 1"
        return ""

    monkeypatch.setattr("sdgm_edge.compare._process", process)
    return modules


def begin(folder, terms, entry="gpt2", **changes):
    one = Trial(config=entry_config(entry, terms, seed=0), device="cpu", precision="float32", **changes)
    write_json(folder / "trial.json", one.to_dict())
    return one


@pytest.mark.parametrize("record", [Trial, Result, Inference])
def test_a_damaged_record_is_told(tmp_path, record):
    (tmp_path / f"{record.__name__.lower()}.json").write_text("{")
    with pytest.raises(RunError, match=r"\.json is damaged .* delete it"):
        record.read(tmp_path)


def test_budgets_are_read():
    assert [parse_budget(text) for text in ("4M", "250k", "22.8m", "17")] == [
        4_000_000,
        250_000,
        22_800_000,
        17,
    ]
    for text in ("", "M", "-4M", "0", "4 trees"):
        with pytest.raises(ConfigError, match="expected a number of parameters such as 4M or 250k, got"):
            parse_budget(text)


def test_contexts_are_read_once_each():
    assert parse_contexts("0, 128,4k,4096") == (0, 128, 4096)
    for text, got in (("", "none"), ("many", "'many'"), ("-1", "'-1'")):
        with pytest.raises(ConfigError, match=f"--contexts: expected numbers of tokens .* got {got}"):
            parse_contexts(text)


def test_entries_are_read_once_each():
    assert parse_entries("sdgm, gpt2,sdgm") == ("sdgm", "gpt2")
    assert parse_entries("ablations,sdgm,lstm", "paper") == (*ABLATIONS["paper"], "lstm")
    with pytest.raises(ConfigError, match="expected names with commas between them"):
        parse_entries(" ,")


@pytest.mark.parametrize("change", ["seed=1", "vocab_size=9"])
def test_what_is_the_same_for_all_models_is_no_change_of_one(change):
    with pytest.raises(
        ConfigError, match=f"{change[:4]}.* is the same for all models: leave it out, and give --"
    ):
        parse_entries(f"gpt2,sdgm:{change}")


def test_entries_are_trained_at_several_rates(terms):
    assert at_rates(("sdgm", "gpt2:depth=2"), "1e-3, 4e-3") == (
        "sdgm:lr=1e-3", "sdgm:lr=4e-3", "gpt2:depth=2+lr=1e-3", "gpt2:depth=2+lr=4e-3"
    )  # fmt: skip
    assert at_rates(("sdgm",), "") == ("sdgm",)
    (entry,) = at_rates(("gpt2",), "2e-3")
    assert entry_config(entry, terms, 0).training.learning_rate == 2e-3


@pytest.mark.parametrize("protocol", ["paper", "best"])
@pytest.mark.parametrize("entry", ["sdgm", *MIXERS])
@pytest.mark.parametrize("copy_window", [None, 0, 9])
def test_all_share_their_terms_and_their_size(terms, protocol, entry, copy_window):
    terms = dataclasses.replace(terms, protocol=protocol, num_parameters=100_000, copy_window=copy_window)
    ours, config = entry_config("sdgm", terms, seed=3), entry_config(entry, terms, seed=3)
    assert config.training == ours.training
    assert config.corpus == ours.corpus
    assert (config.model.window, config.model.dropout) == (8, ours.model.dropout)
    assert ours.model.atom_dropout == {"paper": 0, "best": 0.1}[protocol]
    of_protocol = {"paper": 128, "best": 0}[protocol]
    assert config.model.copy_window == (of_protocol if copy_window is None else copy_window)
    assert count_parameters(config.model) == pytest.approx(100_000, rel=0.05)
    assert (config.training.seed, config.training.max_steps) == (3, 6)
    if entry != "sdgm":
        assert config.loss == LossWeights()


def test_the_papers_protocol_is_the_papers(terms):
    config = entry_config("sdgm", dataclasses.replace(terms, protocol="paper"), seed=0)
    assert (config.model.layer, config.model.residual, config.model.num_layers) == ("clock", False, 1)
    assert config.loss.spectrum > 0
    assert (config.training.optimizer, config.training.learning_rate) == ("adam", 1e-3)


def test_the_product_can_be_trained_under_the_papers_terms(terms):
    paper = dataclasses.replace(terms, protocol="paper")
    ours, theirs, baseline = (entry_config(entry, paper, 0) for entry in ("ringing", "sdgm", "lstm"))
    assert (ours.model.layer, theirs.model.layer) == ("ringing", "clock")
    assert ours.training == theirs.training == baseline.training
    assert ours.model.copy_window == baseline.model.copy_window > 0
    assert ours.loss == baseline.loss
    assert count_parameters(ours.model) == pytest.approx(terms.num_parameters, rel=0.05)
    assert entry_config("ringing", terms, 0) == entry_config("sdgm", terms, 0), "under best they are one"


@pytest.mark.parametrize("protocol", ["paper", "best"])
def test_ablations_change_what_they_say_and_nothing_else(terms, protocol):
    terms = dataclasses.replace(terms, protocol=protocol)
    base = entry_config("sdgm", terms, seed=0)
    for entry in ABLATIONS[protocol]:
        config = entry_config(entry, terms, seed=0)
        fields = {
            f"{table}.{f.name}"
            for table in ("model", "loss", "training")
            for f in dataclasses.fields(getattr(base, table))
            if getattr(getattr(config, table), f.name) != getattr(getattr(base, table), f.name)
        }
        assert len(fields) <= entry.count("="), entry
    assert entry_config("sdgm:beta=0", dataclasses.replace(terms, protocol="paper"), 0).loss.spectrum == 0
    assert entry_config("gpt2:lr=1e-3+depth=2+dropout=0.3", terms, 0).training.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("gpt3", "expected sdgm, ringing, ablations, gpt2, .*, got 'gpt3'"),
        ("sdgm:beta", r"expected KEY=VALUE, got 'beta'; write it as in sdgm:beta=0\+K=64"),
        ("sdgm:colour=1", "sdgm:colour=1: a key must be one of alpha, beta, .*, got 'colour'"),
        ("sdgm:K=many", "num_atoms must be a whole number, got 'many'"),
        ("sdgm:lr=high", "learning_rate must be a number, got 'high'"),
        ("sdgm:residual=1", "residual must be true or false, got '1'"),
        ("gpt2:alpha=1", "a model of layer 'gpt2' has no dictionary"),
        ("lstm:copy_window=-1", "model.copy_window must be a whole number of at least 0, got -1"),
        ("lstm:K=0", "model.num_atoms must be a whole number of at least 1"),
    ],
)
def test_an_entry_that_cannot_be_read_is_named(terms, entry, message):
    with pytest.raises(ConfigError, match=message):
        entry_config(entry, terms, seed=0)


def test_terms_that_cannot_be_met_are_named(terms):
    with pytest.raises(ConfigError, match="--protocol: expected paper or best, got 'worst'"):
        entry_config("sdgm", dataclasses.replace(terms, protocol="worst"), 0)
    with pytest.raises(ConfigError, match="no ringing model of 2 layers has 9 parameters within 5%"):
        entry_config("sdgm", dataclasses.replace(terms, num_parameters=9), 0)


def test_a_process_is_told_by_how_it_ended():
    assert _process("json.tool", "--help") == ""
    assert _process("json.tool", "--nothing") == "ended with code 2"
    if os.name != "nt":
        killed = _process("timeit", "-n1", "-r1", "import os; os.kill(os.getpid(), 9)")
        assert killed == "was killed by signal 9 (out of memory?)"
    with pytest.raises(KeyboardInterrupt):
        _process("timeit", "-n1", "-r1", "import os; os._exit(130)")


def test_a_comparison_trains_and_is_not_done_twice(place, terms, corpus, here):
    told = []
    out = place / "out"
    outcomes = compare(["sdgm", "lstm"], terms, out, place / "cache", progress=told.append)
    assert [o.result.status for o in outcomes] == ["finished", "finished"]
    ours, lstm = (o.result for o in outcomes)
    assert ours.steps == lstm.steps == 6
    assert -1 <= ours.cosine <= 1
    assert lstm.cosine is None
    assert ours.word_perplexity > ours.token_perplexity > 1
    assert ours.peak_memory_bytes > 50e6
    assert ours.curve[-1][0] == 6
    results = [o.folder / "result.json" for o in outcomes]
    before = [path.stat().st_mtime_ns for path in results]
    again = compare(["sdgm", "lstm", "lstm:seed=0"], terms, out, place / "cache", progress=told.append)
    assert [o.result for o in again] == [ours, lstm, lstm], "entries that come to the same are one trial"
    assert [path.stat().st_mtime_ns for path in results] == before
    assert told[0] == "1/2 sdgm, seed 0: ringing"
    assert told[2] == "1/3 sdgm, seed 0: finished already"
    assert here == ["sdgm_edge.trial"] * 2
    with pytest.raises(RunError, match=r"lstm-seed0 holds a trial with other settings: choose another --out"):
        compare(["lstm"], dataclasses.replace(terms, window=4), out, place / "cache")
    report = make_report(again, terms, corpus)
    report.write(out)
    assert json.loads((out / "report.json").read_text())["rows"][1]["entry"] == "lstm"


def test_what_was_trained_is_measured_and_not_done_twice(place, terms, corpus, here, monkeypatch):
    measured = []

    def cost(graph, tokenizer, context, **how):
        assert graph.stat().st_size > 1000
        assert how == {"chunk": 128, "block": 0, "tokens": 64}
        measured.append((graph.parent.name, context))
        return ContextCost(
            tokens_per_second=100.0, tokens_per_second_by_clock=90.0, peak=10**8, first_token=0.5
        )

    monkeypatch.setattr("sdgm_edge.export.inference.measure_context", cost)
    out = place / "out"
    compare(["sdgm", "gpt2"], terms, out, place / "cache", contexts=(0, 16))
    outcomes = compare(["sdgm", "gpt2"], terms, out, place / "cache", contexts=(16, 7))
    first = [("sdgm-seed0", 0), ("sdgm-seed0", 16), ("gpt2-seed0", 0), ("gpt2-seed0", 16)]
    assert measured == [*first, ("sdgm-seed0", 7), ("gpt2-seed0", 7)]
    ours, gpt2 = (o.inference for o in outcomes)
    assert list(ours.costs) == [16, 7]
    assert (ours.window, gpt2.window) == (0, 8)
    assert gpt2.graph_bytes > 1000
    report = make_report(outcomes, terms, corpus)
    assert "| gpt2 |" in report.markdown()
    assert "100 †" in report.markdown()
    assert report.html().count("data:image/png;base64,") == 3
    report = make_report(compare(["sdgm"], terms, out, place / "cache"), terms, corpus)
    assert len(report.tables) == 1, "nothing is measured unless asked for"


def test_a_graph_that_computes_something_else_is_told_and_not_measured(
    place, terms, corpus, here, monkeypatch
):
    reason = "lstm in int8: the graph does not compute what the model computes"

    def differ(run):
        raise ParityError(reason)

    monkeypatch.setattr("sdgm_edge.export.inference.measurable", differ)
    (outcome,) = compare(["lstm"], terms, place / "out", place / "cache", contexts=(0,))
    assert outcome.inference == Inference(
        reason="lstm in int8: the graph does not compute what the model computes"
    )
    assert "lstm in int8: the graph does not compute" in make_report([outcome], terms, corpus).markdown()


def test_a_mixer_without_a_graph_is_told(place, terms, corpus, here, monkeypatch):
    from sdgm_edge.export.baselines import GRAPHS

    monkeypatch.delitem(GRAPHS, "gpt2")
    (outcome,) = compare(["gpt2"], terms, place / "no graph", place / "cache", contexts=(0,))
    assert outcome.result.status == "finished"
    assert outcome.inference.reason.startswith("gpt2: expected a layer with a graph (transformer-xl, ")


def test_a_trial_that_cannot_run_does_not_end_the_comparison(place, terms, tmp_path, here, capfd):
    nowhere = dataclasses.replace(terms, corpus=CorpusConfig(train=(str(place / "gone.txt"),)))
    (outcome,) = compare(["lstm"], nowhere, tmp_path, place / "cache")
    assert outcome.result.status == "failed"
    assert "ended with code 1" in outcome.result.reason
    assert capfd.readouterr().err.startswith("error: ")
    assert Result.read(outcome.folder) is None, "so that it is tried again"


def test_an_interrupted_trial_goes_on(terms, corpus, tmp_path):
    begin(tmp_path / "whole", terms)
    begin(tmp_path / "parts", terms)
    with pytest.raises(Interrupted):
        run_trial(tmp_path / "parts", corpus, StopAfter(4))
    assert Result.read(tmp_path / "parts") is None
    run_trial(tmp_path / "whole", corpus)
    run_trial(tmp_path / "parts", corpus)
    whole, parts = (Result.read(tmp_path / name) for name in ("whole", "parts"))
    assert parts.steps == 6
    assert parts.word_perplexity == whole.word_perplexity


def test_the_speed_is_that_of_steps_alone(terms, corpus, tmp_path, monkeypatch):
    for steps, speed in ((2, None), (6, 4 * 8.0)):
        begin(
            tmp_path / str(steps), dataclasses.replace(terms, training={"max_steps": steps, "batch_size": 4})
        )
        monkeypatch.setattr(trials, "time", Ticking())
        assert run_trial(tmp_path / str(steps), corpus).tokens_per_second == speed


class Ticking:
    """A clock that goes on by a second whenever it is looked at."""

    def __init__(self):
        self.perf_counter = itertools.count().__next__


@pytest.mark.skipif(os.name == "nt", reason="signals of another kind")
@pytest.mark.parametrize("command", ["compare", "paper"])
def test_a_comparison_that_is_terminated_leaves_a_checkpoint_and_no_process(place, tmp_path, command):
    """Takes long: a comparison, fed its text, and its training are real processes, as a signal finds them."""
    out, text = tmp_path / "out", place / "text.txt"
    if command == "compare":
        program, run = ["-m", "sdgm_edge", "compare", "-", "--models", "lstm"], out / "lstm-seed0"
        size = ["--vocab-size", 270, "--max-steps", 100_000, "--no-inference"]
    else:
        (tmp_path / "data").mkdir()
        for name in ("train", "valid"):
            (tmp_path / f"data/{name}.txt").write_text(LINE * 2000)
        program, run = [PAPER, "--data", tmp_path / "data"], out / "pace/sdgm-seed0"
        size = ["--vocab-size", 270, "--minutes", 1000, "--batch-size", 4]
    shape = ["--params", "20k", "--window", 8, "--copy-window", 4, "--device", "cpu"]
    with text.open("rb") as typed:
        process = subprocess.Popen(
            [sys.executable, *map(str, [*program, *size, *shape, "--out", out])],
            stdin=typed,
            stderr=subprocess.PIPE,
            env={**os.environ, "SDGM_EDGE_CACHE": str(place / "cache")},
        )
    log = run / "log.csv"
    while not log.exists() or log.read_text().count("\n") < 3:
        time.sleep(0.05)
        assert process.poll() is None, process.stderr.read().decode()
    process.terminate()
    process.communicate()
    assert process.returncode == 130
    assert list((run / "checkpoints").glob("last-*"))
    assert Trial.read(run).config.model.copy_window == 4
    with locked(run):  # which the training held
        assert Result.read(run) is None, "so that it goes on"


def test_every_model_can_have_a_pointer(place, terms, corpus, here, monkeypatch):
    cost = ContextCost(tokens_per_second=9.0, tokens_per_second_by_clock=9.0, peak=10**8, first_token=0.5)
    monkeypatch.setattr("sdgm_edge.export.inference.measure_context", lambda *what, **how: cost)
    pointing = dataclasses.replace(terms, copy_window=6)
    entries = ["sdgm", "gpt2", "lstm", "lstm:copy_window=0"]
    outcomes = compare(entries, pointing, place / "pointing", place / "cache", contexts=(0,))
    assert [o.result.status for o in outcomes] == ["finished"] * 4
    assert all(o.inference.graph_bytes > 1000 for o in outcomes)
    assert outcomes[1].result.overlapping_word_perplexity > 1
    *sized, changed = (o.result.num_parameters for o in outcomes)
    assert sized == [pytest.approx(20_000, rel=0.05)] * 3
    report = make_report(outcomes, pointing, corpus)
    assert report.about["pointer"] == "over 6 tokens, unless an entry says otherwise"
    note = f"by their own settings: lstm:copy_window=0 ({changed / 20_000 - 1:+.0%})."
    assert note in report.markdown()
    assert "by their own settings" not in make_report(outcomes[:3], pointing, corpus).markdown()


@pytest.mark.parametrize("field", sorted(OF_SOME))
@pytest.mark.parametrize("layer", LAYERS)
def test_a_field_is_heeded_by_a_layer_or_refused(layer, field):
    base = ModelConfig(
        vocab_size=50, layer=layer, num_layers=2, width=16, num_atoms=8, window=8, conv_width=3
    )
    value = {"activation": "tanh", "turning": 0.0, "atom_dropout": 0.5, "quickest": 1.0}.get(field, 5)
    ids = torch.arange(12).view(6, 2)

    def made(config):
        torch.manual_seed(0)
        model = build_model(config).train()
        return model(ids).logits_BTV, [parameter.shape for parameter in model.parameters()]

    logits, shapes = made(replace(base, **{field: value}))
    plain, plain_shapes = made(base)
    same = shapes == plain_shapes and torch.equal(logits, plain)
    assert same == (field in base.unheeded)


def test_a_comparison_of_no_seed_is_refused(terms, tmp_path):
    with pytest.raises(ConfigError, match="--seeds: expected a whole number from 1, got 0"):
        compare(["lstm"], terms, tmp_path / "out", tmp_path / "cache", seeds=0)
    assert not (tmp_path / "out").exists()


def test_settings_that_change_nothing_are_refused(terms):
    for entry, told in (
        ("lstm:K=7", "num_atoms changes nothing in a model of layer 'lstm': leave it out"),
        ("gpt2:turning=0", "turning changes nothing in a model of layer 'gpt2'"),
        ("sdgm:copy_width=8", "copy_width changes nothing"),
    ):
        with pytest.raises(ConfigError, match=f"{entry}: {told}"):
            entry_config(entry, replace(terms, copy_window=0), 0)


def test_recurrences_of_atoms_are_regularised_alike(terms):
    for name in ("sdgm", "gated-recurrence"):
        assert entry_config(name, replace(terms, protocol="best"), 0).model.atom_dropout == 0.1
    assert entry_config("lstm", replace(terms, protocol="best"), 0).model.atom_dropout == 0


def test_a_text_without_white_space_has_no_word_perplexity(terms, tmp_path):
    (tmp_path / "t.txt").write_text("".join(f"{number}," for number in range(5000)))
    source = replace(terms.corpus, train=(str(tmp_path / "t.txt"),), valid=())
    corpus = prepare_corpus(list(source.train), vocab_size=terms.vocab_size, cache=tmp_path / "cache")
    begin(tmp_path / "run", replace(terms, corpus=source))
    result = run_trial(tmp_path / "run", corpus)
    assert (result.status, result.word_perplexity, result.overlapping_word_perplexity) == (
        "finished",
        None,
        None,
    )
    assert result.token_perplexity > 1
    assert result.bits_per_byte > 0
    report = make_report([Outcome("gpt2", 0, tmp_path / "run", result)], terms, corpus)
    assert json.loads(report.json())["rows"][0]["word_perplexity"] is None
    assert "gpt2" in report.markdown()


def test_a_model_that_diverges_is_reported_as_diverged(terms, corpus, tmp_path, monkeypatch):
    begin(tmp_path, terms)

    def diverge(*arguments, **settings):
        raise DivergedError("the loss is nan at step 3")

    monkeypatch.setattr(trials.training, "train", diverge)
    assert run_trial(tmp_path, corpus).status == "diverged"
    result = Result.read(tmp_path)
    report = make_report([Outcome("gpt2", 0, tmp_path, result)], terms, corpus)
    assert "**diverged**" in report.markdown()
    assert "**gpt2**: the loss is nan at step 3" in report.markdown()
    assert "the loss is nan at step 3" in report.html()


def test_trials_can_be_matched_in_time(terms, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "TIMED_SECONDS", 0.1)
    begin(tmp_path, terms, minutes=1e-9)  # less than a step, on any machine
    result = run_trial(tmp_path, corpus)
    assert result.steps == 1, "not the steps of the config"
    assert result.steps == json.loads((tmp_path / "config.json").read_text())["training"]["max_steps"]


def test_rows_have_means_and_spreads(tmp_path):
    good = [Result(status="finished", word_perplexity=p, num_parameters=10) for p in (90.0, 100.0, 110.0)]
    bad = Result(status="diverged", reason="nan")
    outcomes = [Outcome("a", i, tmp_path, result) for i, result in enumerate(good)]
    outcomes += [Outcome("b", 0, tmp_path, good[0]), Outcome("b", 1, tmp_path, bad)]
    a, b = summarize(outcomes)
    assert (a["word_perplexity"], a["word_perplexity_spread"], a["status"]) == (100.0, 10.0, "finished")
    assert (b["status"], b["finished"], b["seeds"], b["word_perplexity"]) == ("diverged", 1, 2, 90.0)
    assert b["cosine"] is None


def test_report_says_the_same_in_three_forms_and_needs_nothing_else(terms, corpus, tmp_path):
    result = Result(
        status="finished",
        word_perplexity=1234.5,
        num_parameters=4_000_000,
        tokens_per_second=9.0,
        curve=((1, 5.0),),
    )
    outcomes = [Outcome("sdgm:beta=0", seed, tmp_path, result) for seed in (0, 1)]
    outcomes.append(Outcome("<gpt2>", 0, tmp_path, dataclasses.replace(result, word_perplexity=2.0)))
    report = make_report(outcomes, terms, corpus)
    report.write(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page
    assert "&lt;gpt2&gt;" in page
    table = (tmp_path / "report.md").read_text()
    assert "| sdgm:beta=0 | 4.00 | 1,234.5 |" in table
    assert all(column.title in table and column.title in page for column in COLUMNS)
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["word_perplexity"] for row in rows] == [1234.5, 2.0]
