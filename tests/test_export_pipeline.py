import ast
import copy
import hashlib
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import trained
from sdgm_edge.export.gates import accuracy
from sdgm_edge.export.golden import golden_prompt
from sdgm_edge.export.variants import VARIANTS

from sdgm_edge.evaluation import score
from sdgm_edge.export import export_run, pipeline
from sdgm_edge.models import build_model
from sdgm_edge.run import with_copy_window
from sdgm_edge.runtime import (
    AccuracyError,
    BundleError,
    ExportError,
    Generator,
    ParameterError,
    ParityError,
    RunError,
    Score,
    UsageError,
    read_bundle,
    verify,
)
from sdgm_edge.tokenization import Tokenizer, train_words

TESTS = Path(__file__).parent


@pytest.fixture
def export(monkeypatch):
    """Export a tiny run; what a run is made of can be changed."""

    def call(out, bits=(32,), name="ringing", run=None, run_path="runs/tale", **options):
        made = run or trained.run(name)
        monkeypatch.setattr(pipeline, "load_run", lambda folder: made)
        monkeypatch.setattr(pipeline, "SPEED_SECONDS", 0.001)
        return export_run(run_path, out, bits, **options)

    return call


def contents(path):
    bundle = read_bundle(path)
    return {name: bundle.read(name) for name in bundle.manifest.files} | {
        "manifest.json": bundle.source.read("manifest.json")
    }


@pytest.mark.parametrize("name", trained.CONFIGS)
def test_an_export_runs_verifies_and_scores_like_torch(export, tmp_path, name):
    report = export(tmp_path / "b", (32, 16, 8, 4), name)
    found = verify(tmp_path / "b", providers="cpu")
    assert found.ok
    assert {v.variant for v in found.variants} == {"fp32", "fp16", "int8", "q4"}
    assert all(v.num_same == v.num_tokens == 16 for v in found.variants)
    run = trained.run(name)
    expected = score(run.model, Tokenizer.load(run.tokenizer_path), run.heldout)
    got = Generator.load(tmp_path / "b", "fp32", providers="cpu").score(run.heldout)
    assert got.nll == pytest.approx(expected.nll, rel=1e-5)
    assert got.bits_per_byte == pytest.approx(report.reference.bits_per_byte, rel=1e-9)
    int8 = Generator.load(tmp_path / "b", "int8", providers="cpu").score(run.heldout)
    recorded = next(v for v in report.variants if v.name == "int8").accuracy
    assert int8.nll / got.nll - 1 == pytest.approx(recorded.loss_increase, abs=1e-7)


def test_with_drafts_every_variant_for_devices_can_be_drafted(export, tmp_path):
    text = {"prompt": "Once upon a time. Once upon", "temperature": 0, "max_new_tokens": 60}
    export(tmp_path / "b", (32, 8, 4), drafts=True)
    assert verify(tmp_path / "b", providers="cpu").ok
    for variant in filter(trained.rows_are_alone, ("fp32", "int8", "q4")):
        gen = Generator.load(tmp_path / "b", variant, providers="cpu")
        assert gen.generate(draft=8, **text).tokens == gen.generate(**text).tokens
    export(tmp_path / "plain", (8,))
    with pytest.raises(ParameterError, match=r"draft: .* export the bundle again with --drafts"):
        Generator.load(tmp_path / "plain", providers="cpu").generate(draft=8, **text)


def test_a_screened_head_can_be_drafted_too(export, tmp_path):
    text = {"prompt": "Once upon a time. Once upon", "temperature": 0, "max_new_tokens": 60}
    export(tmp_path / "b", (8, 4), drafts=True, head="screened", force=True)
    for variant in filter(trained.rows_are_alone, ("int8", "q4")):
        gen = Generator.load(tmp_path / "b", variant, providers="cpu")
        assert gen.generate(draft=8, **text).tokens == gen.generate(**text).tokens


def test_a_head_looks_back_over_as_many_tokens_as_are_asked_for(export, tmp_path):
    run = trained.run("ringing with pointer")
    report = export(tmp_path / "tale", (32, 8), run=run, copy_window=16)
    assert verify(report.path, providers="cpu").ok
    bundle = read_bundle(report.path)
    assert bundle.config.model["copy_window"] == 16
    assert "The head can copy from the last 16 tokens; it was trained with 7." in (
        report.path / "README.md"
    ).read_text("utf-8")
    wide = with_copy_window(run, 16)
    text, tokenizer = run.heldout[:200], Tokenizer.load(run.tokenizer_path)
    trained_with, expected = (score(model, tokenizer, text).nll for model in (run.model, wide.model))
    scored = Generator.load(report.path, "fp32", "cpu").score(text)
    assert scored.nll == pytest.approx(expected, rel=1e-5)
    assert scored.nll != pytest.approx(trained_with, rel=1e-4)


def test_only_what_is_asked_for_is_in_the_bundle(export, tmp_path):
    report = export(tmp_path / "b", (8,))
    bundle = read_bundle(tmp_path / "b")
    assert [v.name for v in report.variants] == list(bundle.manifest.variants) == ["int8"]
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        "README.md", "config.json", "generation_config.json", "gmm.npz", "manifest.json", "model_int8.onnx",
        "tokenizer.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("bits", "default"), [((32, 16, 8, 4), "int8"), ((32, 4), "q4"), ((16, 32), "fp32"), ((16,), "fp16")]
)
def test_the_default_is_the_best_for_a_device(export, tmp_path, bits, default):
    assert export(tmp_path / "b", bits).default == default
    assert read_bundle(tmp_path / "b").manifest.default == default


def test_figures_stand_in_the_manifest_and_on_the_card(export, tmp_path):
    report = export(tmp_path / "b", (8, 4))
    variants = read_bundle(tmp_path / "b").manifest.variants
    card = (tmp_path / "b" / "README.md").read_text("utf-8")
    for v in report.variants:
        assert variants[v.name].parity["steps"] == 512
        assert variants[v.name].parity["tolerance"] == VARIANTS[{"int8": 8, "q4": 4}[v.name]].tolerance
        assert variants[v.name].accuracy["sha256"] == hashlib.sha256((tiny.TEXT * 3).encode()).hexdigest()
        assert f"| {v.name} | `{v.file}` |" in card
        assert f"{v.accuracy.loss_increase:+.2%}" in card
        assert v.decode_speed > 0
        assert v.prompt_speed > 0
    assert report.to_dict()["variants"]["q4"]["bytes"] == (tmp_path / "b" / "model_q4.onnx").stat().st_size


@pytest.mark.parametrize("said", ["C:\\new says \\", 'He said "no"', "it's 你好 {braces}"])
def test_the_code_on_the_card_says_what_the_text_says(export, tmp_path, monkeypatch, said):
    monkeypatch.setattr(pipeline, "newest_run", lambda: Path(f"runs/{said}"))
    report = export(tmp_path / "b", run=replace(trained.run(), heldout=said), run_path=None)
    card = (report.path / "README.md").read_text("utf-8")
    code = ast.parse(card.partition("```python\n")[2].partition("```")[0])
    literals = [node.value for node in ast.walk(code) if isinstance(node, ast.Constant)]
    assert report.name in literals
    assert said in literals
    assert shlex.split(re.findall(r"`(sdgm-edge verify .*?)`", card)[0])[2] == report.name


def test_the_same_run_gives_the_same_bytes_in_a_folder_and_in_a_file(export, tmp_path):
    folder = export(tmp_path / "one", (32, 16, 8, 4)).path
    file = export(tmp_path / "other", (4, 8, 16, 32, 8), single_file=True).path
    assert file == tmp_path / "other.sdgm"
    assert contents(folder) == contents(file)


def test_other_weights_are_another_model(export, tmp_path):
    first = export(tmp_path / "b")
    run = trained.run()
    other = export(tmp_path / "b", run=replace(run, model=trained.model(seed=1)))
    assert first.model_id != other.model_id


def test_a_run_without_a_prior_gives_a_bundle_without_a_mixture(export, tmp_path):
    export(tmp_path / "b", run=trained.run(prior=False))
    assert read_bundle(tmp_path / "b").mixture is None


def test_words_are_scored_without_bits_per_byte_where_one_is_unknown(export, tmp_path):
    tokenizer = train_words([tiny.TEXT])
    tokenizer.save(tmp_path / "tokenizer.json")
    torch.manual_seed(0)
    model = type(trained.model())(replace(trained.model().config, vocab_size=tokenizer.vocab_size)).eval()
    run = replace(
        trained.run(), config=model.config, model=model, tokenizer_path=tmp_path / "tokenizer.json",
        heldout=tiny.TEXT + "zyzzyva",
    )  # fmt: skip
    report = export(tmp_path / "b", (8,), run=run)
    assert report.reference.bits_per_byte is None
    assert report.reference.word_perplexity > 1
    scored = Generator.load(tmp_path / "b", providers="cpu").score(run.heldout)  # its last line is unfinished
    assert report.variants[0].accuracy.num_tokens == scored.num_tokens
    assert report.variants[0].accuracy.word_perplexity == pytest.approx(scored.word_perplexity)
    bundle = read_bundle(tmp_path / "b")
    assert bundle.generation.end_tokens == []
    assert "| int8 | `model_int8.onnx` | 0.0" in (tmp_path / "b" / "README.md").read_text()
    assert verify(tmp_path / "b", providers="cpu").ok


CHINESE = "你好世界我们今天去河边看钟声响起来" * 40


def test_a_text_without_white_space_has_no_word_perplexity_and_is_exported(export, tmp_path):
    report = export(tmp_path / "b", (8, 4), run=replace(trained.run(), heldout=CHINESE))
    bundle = read_bundle(tmp_path / "b")
    figures = bundle.variant("int8").accuracy
    assert figures["word_perplexity"] is None
    assert report.variants[0].accuracy.word_perplexity is report.reference.word_perplexity is None
    assert 0 < figures["bits_per_byte"] < math.inf
    assert abs(figures["loss_increase"]) < 0.01
    card = bundle.read("README.md").decode()
    assert re.search(r"\| int8 .* \| \d+\.\d{4} \| – \| [+-]0\.\d\d% \|", card)
    assert bundle.manifest.golden.prompt == CHINESE[:64]
    assert verify(tmp_path / "b", providers="cpu").ok


def test_perplexities_that_no_float_holds_still_tell_how_they_increase():
    text = "你" * 400
    reference = Score.of(text, 1600.0, 400)
    assert accuracy(Score.of(text, 1600.5, 400), reference, 0.01).perplexity_increase == pytest.approx(
        math.expm1(0.25)
    )
    assert accuracy(Score.of(text, 4000.0, 400), reference, 0.01).perplexity_increase is None
    assert not accuracy(Score.of(text, 4000.0, 400), reference, 0.01).within


def test_the_golden_prompt_is_a_few_words_and_no_whole_text():
    assert golden_prompt("Once upon\n a time there was a small river") == "Once upon a time there was"
    assert golden_prompt("河" * 9000) == "河" * 64
    assert golden_prompt(f"a {'b' * 61} c d") == f"a {'b' * 61}"
    assert golden_prompt(" \n") == ""


def lossy(monkeypatch, **increase):
    """Let variants lose what is said here, whatever they lose."""
    accuracy = pipeline.accuracy
    answers = iter(increase.values())

    def measured(score, reference, limit):
        return replace(accuracy(score, reference, limit), loss_increase=next(answers))

    monkeypatch.setattr(pipeline, "accuracy", measured)


def test_a_variant_that_loses_too_much_is_refused_and_nothing_is_left(export, tmp_path, monkeypatch):
    lossy(monkeypatch, fp32=0.0, int8=0.02, fp16=0.03)
    with pytest.raises(AccuracyError) as raised:
        export(tmp_path / "b", (16, 8))
    for part in ("int8: loses too much", "got 2.00%", "fp16: loses too much", "got 3.00%", "at most 1.00%"):
        assert part in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_score_that_is_no_number_is_told_beside_the_other_failures(export, tmp_path, monkeypatch):
    lossy(monkeypatch, fp32=0.0, fp16=0.03)
    score_graph, variants = pipeline.score_graph, iter(["fp32", "int8", "fp16"])

    def scored(engine, text, *rest):
        return Score.of(text, math.nan, 1) if next(variants) == "int8" else score_graph(engine, text, *rest)

    monkeypatch.setattr(pipeline, "score_graph", scored)
    with pytest.raises(AccuracyError) as raised:
        export(tmp_path / "b", (8, 16))
    for part in ("int8: expected a score on the held-out text, got NaN", "; and fp16: loses too much"):
        assert part in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def changed(weight, value):
    """A run one of whose weights is another."""
    model = copy.deepcopy(trained.model())
    with torch.no_grad():
        model.get_parameter(weight)[3] = value
    return replace(trained.run(), model=model)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize(
    ("weight", "value"),
    [("bias", math.nan), ("bias", -math.inf), ("blocks.1.atoms.synthesis.weight", math.inf)],
)
def test_weights_that_are_no_numbers_are_refused_by_name(export, tmp_path, weight, value, bits):
    told = []
    message = rf"runs/tale: {re.escape(weight)}: expected finite weights, got {value}; .* train anew"
    with pytest.raises(ExportError, match=message):
        export(tmp_path / "b", (bits,), run=changed(weight, value), progress=told.append)
    assert told == list(tmp_path.iterdir()) == []


def test_weights_so_large_that_logits_are_no_numbers_are_refused(export, tmp_path):
    with pytest.raises(ExportError, match=r"expected finite logits, got nan at token 1 of a text"):
        export(tmp_path / "b", (8,), run=changed("blocks.0.atoms.strike.weight", 3e38))


def test_weights_too_large_for_float16_are_refused_in_float16_alone(export, tmp_path):
    run = changed("embedding.weight", 1e5)
    with pytest.raises(
        ExportError, match=r"fp16: embedding.weight: expected weights up to 65504, .* got 100000"
    ):
        export(tmp_path / "b", (16,), run=run)
    export(tmp_path / "b", (32,), run=run)


def test_force_writes_it_all_the_same(export, tmp_path, monkeypatch):
    lossy(monkeypatch, fp32=0.0, int8=0.02)
    report = export(tmp_path / "b", (8,), force=True)
    assert report.variants[0].accuracy.loss_increase == 0.02
    assert read_bundle(tmp_path / "b").manifest.variants["int8"].accuracy["loss_increase"] == 0.02


def test_a_larger_limit_lets_it_pass(export, tmp_path, monkeypatch):
    lossy(monkeypatch, fp32=0.0, int8=0.02)
    export(tmp_path / "b", (8,), max_loss_increase=0.02)


def test_4_bits_are_mixed_with_8_before_they_are_refused(export, tmp_path, monkeypatch):
    # float32, all in 4 bits, then 9, 4, 2 and 1 of 9 matrices in 8 bits
    lossy(monkeypatch, fp32=0, q4=0.02, all=0, four=0, two=0.005, one=0.011)
    told = []
    report = export(tmp_path / "b", (4,), progress=told.append)
    assert len(report.variants[0].at_8_bits) == 2
    assert sum("matrices at 8 bits" in message for message in told) == 4
    card = (tmp_path / "b" / "README.md").read_text("utf-8")
    assert f"In q4, `{report.variants[0].at_8_bits[0]}`, " in card
    assert verify(tmp_path / "b", providers="cpu").ok


def test_a_failed_parity_gate_leaves_nothing(export, tmp_path, monkeypatch):
    run = trained.run()
    monkeypatch.setattr(pipeline, "weights_of", lambda model: weights_with_a_slip(run))
    with pytest.raises(ParityError, match="fp32: the graph does not compute what the model computes"):
        export(tmp_path / "b", (8,), run=run)
    assert list(tmp_path.iterdir()) == []


def weights_with_a_slip(run):
    weights = {name: value.numpy().copy() for name, value in run.model.state_dict().items()}
    weights["blocks.0.atoms.omega"] += np.float32(1e-3)
    return weights


def test_a_bundle_that_is_there_is_replaced_only_by_a_whole_one(export, tmp_path, monkeypatch):
    export(tmp_path / "b")
    before = contents(tmp_path / "b")
    lossy(monkeypatch, fp32=0.0, int8=0.5)
    with pytest.raises(AccuracyError):
        export(tmp_path / "b", (8,))
    assert contents(tmp_path / "b") == before


def test_a_folder_of_another_kind_is_left_alone(export, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "build", None)  # told before anything is built
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="will not be replaced"):
        export(tmp_path / "b")
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["thesis.txt"]


def test_a_place_under_a_file_is_refused_before_any_work(export, tmp_path):
    (tmp_path / "afile").write_text("x")
    told = []
    for out in (tmp_path / "afile" / "b", tmp_path / "afile" / "deeper" / "b.sdgm"):
        with pytest.raises(BundleError, match=r"b(.sdgm)?: cannot be written: .*afile is no folder; choose"):
            export(out, progress=told.append)
    assert told == []
    assert (tmp_path / "afile").read_text() == "x"
    assert export(tmp_path / "made" / "on the way" / "b").path.is_dir()


@pytest.mark.parametrize("out", ["/", "."])
@pytest.mark.parametrize("single_file", [False, True])
def test_a_place_without_a_name_is_refused_before_any_work(export, out, single_file):
    told = []
    with pytest.raises(BundleError, match=r"cannot be written: it names no file or folder; choose"):
        export(out, single_file=single_file, progress=told.append)
    assert told == []


@pytest.mark.parametrize("name", ["n" * 201, "a\tb"])
def test_a_name_that_no_bundle_has_is_refused_before_any_work(monkeypatch, tmp_path, name):
    monkeypatch.setattr(pipeline, "load_run", lambda folder: trained.run())
    told = []
    with pytest.raises(
        ExportError, match=r"expected a folder whose name, .* at most 200 characters .*; rename"
    ):
        export_run(f"runs/{name}", tmp_path / "b", progress=told.append)
    assert told == []


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs folders that are closed to us")
def test_a_folder_that_is_not_ours_is_refused_before_any_work(export, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    told = []
    with pytest.raises(BundleError, match=r"b: cannot be written: .*closed may not be written to; choose"):
        export(tmp_path / "closed" / "new" / "b", progress=told.append)
    assert told == []


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import trained
from sdgm_edge.export import export_run, pipeline

pipeline.load_run = lambda folder: trained.run()
pipeline.SPEED_SECONDS = 0.001
call, calls = os.{function}, iter(range({calls}))

def last(*arguments):
    if next(calls, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return call(*arguments)

def progress(message):
    if message.startswith("writing"):
        os.{function} = last

export_run("runs/tale", {out!r}, progress=progress)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
@pytest.mark.parametrize(
    ("name", "function", "calls", "there"),
    [
        ("b", "fsync", 3, True),  # some files are written
        ("b", "rename", 1, False),  # the old bundle is out of the way, the new one not in its place
        ("b.sdgm", "replace", 0, True),
    ],
)
def test_killed_while_it_writes_it_leaves_a_whole_bundle_or_none(
    export, tmp_path, name, function, calls, there
):
    target = export(tmp_path / name, run=replace(trained.run(), model=trained.model(seed=1))).path
    before = contents(target)
    program = KILLED.format(tests=str(TESTS), out=str(target), function=function, calls=calls)
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    assert target.exists() == there
    if there:
        assert contents(target) == before
    left = [path.name for path in tmp_path.iterdir() if path != target]
    assert left
    assert all(name.startswith(".") and name.endswith(".partial") for name in left)
    export(target)
    assert contents(target) != before


def test_a_baseline_is_not_exported(export, tmp_path):
    baseline = build_model(replace(trained.model().config, layer="linformer"))
    with pytest.raises(
        ExportError, match="expected a model of ringing or clock atoms, got the layer 'linformer'"
    ):
        export(tmp_path / "b", run=replace(trained.run(), config=baseline.config, model=baseline))
    assert list(tmp_path.iterdir()) == []


def test_without_a_run_the_newest_is_exported(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="no trained run under runs/"):
        export_run()
    monkeypatch.setattr(pipeline, "newest_run", lambda: Path("runs/newest"))
    monkeypatch.setattr(pipeline, "load_run", lambda folder: trained.run())
    report = export_run()
    assert report.path == Path("bundles/newest")
    assert report.name == "newest"
    assert read_bundle("bundles/newest").manifest.default == "fp32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": (5,)}, "bits: expected one of 4, 8, 16, 32, got 5"),
        ({"bits": (32,), "drafts": True}, r"drafts: expected 8 or 4 among the bits, got \[32\]; floats can"),
        ({"bits": ()}, "bits: expected at least one of 4, 8, 16, 32, got none"),
        ({"max_loss_increase": -0.1}, "max_loss_increase: expected a share from 0, got -0.1"),
        ({"max_loss_increase": float("nan")}, "max_loss_increase: expected a share from 0, got nan"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_any_work(options, message):
    with pytest.raises(UsageError, match=message):
        export_run("no/such/run", **options)
