"""`make paper`: which parts it does, on which terms, and that one report has them all. None trains here."""

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from sdgm_edge.compare import Outcome, Terms
from sdgm_edge.config import CorpusConfig
from sdgm_edge.probe import Finding
from sdgm_edge.runtime import RunError
from sdgm_edge.shards import prepare_corpus
from sdgm_edge.trial import Result

LINE = "the cat sat on the mat and the dog lay on the rug by the fire.\n"
ROW = {
    "mode": "plain", "strength": 0.0, "distinct_1": 0.5, "distinct_2": 0.6, "distinct_3": 0.7,
    "self_bleu_4": 0.2, "repetition_4": 0.1, "loops": 0.0, "word_perplexity": 77.0, "bits_per_byte": 1.5,
    "typicality": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def module():
    path = Path(__file__).resolve().parent.parent / "benchmarks/paper.py"
    spec = importlib.util.spec_from_file_location("paper", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["paper"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def paper(module, tmp_path, monkeypatch):
    """A comparison of two baselines, whose trainings all finish but that of γ = 0."""
    asked = {}

    def compare(entries, terms, folder, cache, seeds=1, contexts=(), progress=None):
        asked[folder.name] = (entries, terms, contexts)
        fine = Result(
            status="finished",
            num_parameters=9,
            word_perplexity=50.0,
            tokens_per_second=7.0,
            curve=((1, 60.0),),
        )
        gone = Result(status="diverged", reason="the loss is nan")
        return [Outcome(e, 0, folder / e, gone if "gamma" in e else fine) for e in entries]

    def probe(entries, tasks, settings, folder, progress=None):
        asked["memory"] = (entries, tasks, settings)
        return [Finding(e, task, {16: 1.0, 64: 0.5}, 0.1, 3, 1.0) for task in tasks for e in entries]

    def generated(path, run, judging):
        asked[path.stem + " texts"] = (run, judging)
        return {"rows": [ROW]}

    for name, stub in (("compare", compare), ("probe", probe), ("generated", generated)):
        monkeypatch.setattr(module, name, stub)
    (tmp_path / "text.txt").write_text(LINE * 100)
    corpus = prepare_corpus([tmp_path / "text.txt"], vocab_size=260, cache=tmp_path / "cache")
    terms = Terms(
        corpus=CorpusConfig(train=("text.txt",)),
        vocab_size=260,
        num_parameters=1000,
        window=16,
        training={"batch_size": 4},
    )
    made = module.Paper(
        folder=tmp_path / "out",
        cache=tmp_path / "cache",
        corpus=corpus,
        terms=terms,
        minutes=19.0,
        contexts=(0, 8),
        baselines=("gpt2", "lstm"),
        ablations=("sdgm", "sdgm:beta=0", "sdgm:gamma=0"),
        tasks=("copy", "needle"),
    )
    return made, asked


def test_every_part_is_done_on_its_terms(paper, module):
    made, asked = paper
    made.run()
    assert asked["paper"][0] == ("sdgm", "ringing", "gpt2", "sdgm:beta=0", "sdgm:gamma=0")
    assert asked["best"][0] == ("sdgm", "gpt2", "lstm")
    assert (asked["paper"][1].protocol, asked["best"][1].protocol) == ("paper", "best")
    assert [asked[name][2] for name in ("paper", "best", "judge")] == [(), (0, 8), ()]
    each = module.TRAINED * 19 / 10.5  # nine trainings, the judge's once more, and half a one for the pace
    times = {"pace": each / 2, "paper": 0, "best": each, "judge": 2 * each}
    assert {name: asked[name][1].minutes for name in times} == pytest.approx(times)
    assert asked["judge"][1].num_parameters == 3000
    models, tasks, settings = asked["memory"]
    assert models == ("sdgm", "sdgm:layer=clock", "gpt2", "lstm")
    assert settings.minutes * len(models) * len(tasks) == pytest.approx(module.REMEMBERED * 19)
    judging = ["--judge", str(made.folder / "judge/sdgm")]
    assert asked["best texts"] == (made.folder / "best/sdgm", judging)
    assert asked["paper texts"] == (made.folder / "paper/sdgm", judging)


def test_the_papers_terms_give_all_the_same_text(paper):
    made, asked = paper
    made.run()
    terms = asked["paper"][1]
    step = 4 * 16
    seconds = 60 * asked["best"][1].minutes
    assert terms.training == {"batch_size": 4, "max_steps": round(seconds * 7.0 / step)}
    epochs = 10 * (len(made.corpus.train) // step)
    long = dataclasses.replace(made, minutes=1e6)
    long.run()
    assert asked["paper"][1].training["max_steps"] == epochs, "the paper's ten epochs at most"


def test_one_report_holds_all(paper):
    made, _ = paper
    report = made.run()
    assert [part.title for part in report.tables] == [
        "The paper's terms, on the same text: training",
        "Ablations of the paper's model, on the same text: training",
        "This project's model and all baselines, for the same time: training",
        "Answers that are right, by distance (trained up to 64; 3 % by chance)",
        "Texts generated by this project's model",
        "Texts generated by the paper's model",
    ]
    ablations = {cells[0]: cells for cells in report.tables[1].cells}
    assert list(ablations) == ["sdgm", "sdgm:beta=0", "sdgm:gamma=0"]
    assert ablations["sdgm:gamma=0"][-1] == "**diverged**"
    assert "sdgm:gamma=0: the loss is nan" in report.notes
    report.write(made.folder)
    markdown = (made.folder / "report.md").read_text("utf-8")
    page = (made.folder / "report.html").read_text("utf-8")
    figures = json.loads((made.folder / "report.json").read_text("utf-8"))
    for part in report.tables:
        assert f"## {part.title}\n" in markdown
    assert page.count("<table>") == len(report.tables)
    assert page.count("data:image/png") == len(report.plots) == 8
    for i in range(1, 9):
        assert f"(plot-{i}.png)" in markdown
        assert (made.folder / f"plot-{i}.png").read_bytes().startswith(b"\x89PNG")
    assert {"about", "paper", "best", "memory", "generation_best", "generation_paper"} == set(figures)
    assert (made.folder / "best/report.html").exists()


def test_what_no_float_holds_loses_no_report(module, tmp_path):
    endless = {"rows": [{**ROW, "word_perplexity": math.inf}], "curve": ((1, math.nan), (2, 60.0))}
    module.Report({"minutes": 1}, figures={"generation_best": endless}).write(tmp_path)
    told = json.loads((tmp_path / "report.json").read_text("utf-8"))["generation_best"]
    assert told == {"rows": [{**ROW, "word_perplexity": None}], "curve": [[1, None], [2, 60.0]]}


def test_without_a_model_or_a_judge_the_rest_is_told(paper, module, monkeypatch):
    made, asked = paper
    failed = Result(status="failed", reason="out of memory")
    fine = Result(status="finished", tokens_per_second=7.0)

    def compare(entries, terms, folder, cache, seeds=1, contexts=(), progress=None):
        return [Outcome(e, 0, folder / e, fine if folder.name == "pace" else failed) for e in entries]

    monkeypatch.setattr(module, "compare", compare)
    report = made.run()
    assert "generated texts have no judge: out of memory" in report.notes
    assert "nothing is generated by the paper's model: out of memory" in report.notes
    assert "best texts" not in asked
    report.write(made.folder)
    fine = failed
    with pytest.raises(RunError, match=r"pace/sdgm: the paper's model has no speed: out of memory"):
        made.run()


def test_a_text_is_cut_at_a_line_end_where_it_is_long(module, tmp_path):
    (tmp_path / "valid.txt").write_text("one\ntwo\nthree\n")
    whole = module.beginning(tmp_path / "valid.txt", tmp_path / "out/valid.txt", 14)
    assert whole == tmp_path / "valid.txt"
    cut = module.beginning(tmp_path / "valid.txt", tmp_path / "out/valid.txt", 10)
    assert cut.read_text() == "one\ntwo\n"


def test_texts_are_generated_once(module, tmp_path, monkeypatch):
    asked, ends = [], []

    def run(arguments, **options):
        asked.append(arguments)
        return subprocess.CompletedProcess(arguments, *ends.pop())

    monkeypatch.setattr(module.child, "run", run)
    place, of_run = tmp_path / "generation/best.json", tmp_path / "run"
    ends.append((1, "", "much\nerror: no such run\n"))
    assert module.generated(place, of_run, []) == "error: no such run"
    for code, errors, told in (
        (-9, "32 texts …\n", "was killed by signal 9 (out of memory?)"),
        (-9, "", "was killed by signal 9 (out of memory?)"),
        (3, "", "ended with code 3"),
    ):
        ends.append((code, "", errors))
        assert module.generated(place, of_run, []) == told
    asked.clear()
    ends.append((0, json.dumps({"rows": [ROW]}), ""))
    for _ in range(2):
        assert module.generated(place, of_run, ["--judge", "judge"]) == {"rows": [ROW]}
    assert len(asked) == 1
    told = ["-m", "sdgm_edge", "probe", "generation", str(of_run), str(of_run / "heldout.txt"), "--judge"]
    assert asked[0][: len(told)] == told


def test_an_error_is_one_line(module, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["paper.py", "--data", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert str(ended.value).startswith("error: ")
