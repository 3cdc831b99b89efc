import json
from pathlib import Path

import pytest
import trained
from typer.testing import CliRunner

from sdgm_edge import cli
from sdgm_edge.export import pipeline
from sdgm_edge.runtime import BundleError, UsageError, read_bundle

GOLDEN = Path(__file__).parent / "data" / "golden.sdgm"


@pytest.fixture
def command(monkeypatch):
    monkeypatch.setattr(pipeline, "load_run", lambda folder: trained.run())
    monkeypatch.setattr(pipeline, "SPEED_SECONDS", 0.001)

    def call(*arguments):
        result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


def test_export_prints_a_table_and_says_on_stderr_what_it_does(command, tmp_path):
    result = command("export", "runs/tale", "--out", tmp_path / "b", "--quantize", "--bits", "4")
    assert result.exit_code == 0
    assert "int8" in result.stdout
    assert "q4" in result.stdout
    assert "comparing with torch" in result.stderr
    assert "comparing" not in result.stdout
    assert list(read_bundle(tmp_path / "b").manifest.variants) == ["int8", "q4"]


def test_export_tells_machines_in_json(command, tmp_path):
    result = command("export", "runs/tale", "--out", tmp_path / "b", "--single-file", "--json")
    report = json.loads(result.stdout)
    assert report["path"] == str(tmp_path / "b.sdgm")
    assert list(report["variants"]) == ["fp32"]
    assert report["variants"]["fp32"]["parity"]["logits"] <= 1e-4


@pytest.mark.parametrize(("given", "limit"), [("2%", 0.02), ("0.5", 0.5), (" 0.1 % ", 0.001)])
def test_export_reads_shares(command, monkeypatch, tmp_path, given, limit):
    command("export", "runs/tale", "--out", tmp_path / "b", "--max-loss-increase", given, "--force")
    assert read_bundle(tmp_path / "b").manifest.variants["fp32"].accuracy["limit"] == pytest.approx(limit)


def test_export_refuses_what_is_no_share(command, tmp_path):
    with pytest.raises(UsageError, match=r"expected a share such as 1% or 0\.01, got 'much'"):
        command("export", "runs/tale", "--out", tmp_path / "b", "--max-loss-increase", "much")


def test_verify_agrees_with_the_golden_bundle(command):
    result = command("verify", GOLDEN)
    assert result.exit_code == 0
    assert "fp32" in result.stdout
    report = json.loads(command("verify", GOLDEN, "--json").stdout)
    assert report["ok"]
    assert report["variants"][0]["num_same"] == 16


@pytest.mark.parametrize("name", ["verify", "inspect"])
def test_without_a_bundle_the_newest_is_taken(command, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "mine.sdgm").write_bytes(GOLDEN.read_bytes())
    result = command(name)
    assert result.exit_code == 0
    assert "bundles/mine.sdgm" in result.stdout


def test_verify_fails_where_the_golden_prompt_says_other_things(command, tmp_path):
    bundle = read_bundle(GOLDEN).save(tmp_path / "b")
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    manifest["golden"]["variants"]["fp32"]["logits"][3][0] += 1
    (bundle / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    result = command("verify", bundle)
    assert result.exit_code == 1
    assert "the golden prompt gives other results here" in result.stderr
    assert not json.loads(command("verify", bundle, "--json").stdout)["ok"]


def test_inspect_shows_what_is_in_a_bundle(command):
    table = command("inspect", GOLDEN).stdout
    for part in (
        "model.num_atoms",
        "files.model_q4.onnx",
        "int8.accuracy.loss_increase",
        "made_with.onnxruntime",
    ):
        assert part in table
    record = json.loads(command("inspect", GOLDEN, "--json").stdout)
    assert record["state_bytes"] == 4 * read_bundle(GOLDEN).config.state_size
    assert record["variants"]["q4"]["file"] == "model_q4.onnx"
    assert record["num_parameters"] == 6636
    assert record["atoms"] == {"num_atoms": 8, "state": 5, "steps": {"fp32": 1, "int8": 2}}


def test_inspect_tells_the_number_of_parameters_and_how_atoms_are_left_out(command, tmp_path):
    command("export", "runs/tale", "--out", tmp_path / "b")
    record = json.loads(command("inspect", tmp_path / "b", "--json").stdout)
    assert record["num_parameters"] == trained.model().num_parameters
    assert record["atoms"] == {"num_atoms": 10, "state": 10, "steps": {"fp32": 1}}
    assert "atoms.steps" in command("inspect", tmp_path / "b").stdout


def test_inspect_tells_what_the_components_stand_for(command, tmp_path):
    (tmp_path / "text.txt").write_text("Once upon a time there was a small river. " * 8)
    report = json.loads(
        command("inspect", GOLDEN, "--mixture", "--text", tmp_path / "text.txt", "--json").stdout
    )
    assert len(report["components"]) == 2
    assert sum(c["share"] for c in report["components"]) == pytest.approx(1)
    for component in report["components"]:
        assert component["tokens"][0]["lift"] > 1
        assert component["tokens"][0]["text"] in "Once upon a time there was a small river. "
    assert "that the model made up" in command("inspect", GOLDEN, "--mixture").stdout


def test_inspect_needs_a_mixture_for_text_and_one_in_the_bundle(command, monkeypatch, tmp_path):
    with pytest.raises(UsageError, match="add --mixture"):
        command("inspect", GOLDEN, "--text", "a.txt")
    monkeypatch.setattr(pipeline, "load_run", lambda folder: trained.run(prior=False))
    command("export", "runs/tale", "--out", tmp_path / "b")
    with pytest.raises(BundleError, match=r"expected a mixture, got a bundle without gmm\.npz"):
        command("inspect", tmp_path / "b", "--mixture")
