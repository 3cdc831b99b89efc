"""`sdgm-edge plan`: what it prints and writes, and a real measurement in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sdgm_edge.export.calibration import Calibration

from sdgm_edge import cli
from sdgm_edge.config import load_config
from sdgm_edge.export import planning

MADE_UP = Calibration(
    seconds=[(0, 100e-6), (10_000_000, 400e-6)],
    screened=[],
    layer_seconds=20e-6,
    memory=[(0, 75e6), (10_000_000, 95e6)],
)
SMALL = ("--budget", "2MB", "--vocab", "512", "--bits", "8")


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Run the command here, with made-up costs: exit code, stdout, stderr."""
    monkeypatch.setattr(planning, "calibrate", lambda *_: MADE_UP)
    monkeypatch.setattr(planning, "DEPTHS", (2, 3))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sdgm-edge", "plan", *arguments])
        with pytest.raises(SystemExit) as e:
            cli.main()
        return (e.value.code or 0, *capsys.readouterr())

    return run


def test_a_table_and_commands_that_can_be_typed(plan, tmp_path: Path) -> None:
    code, out, err = plan(*SMALL)
    assert code == 0
    assert "a bundle of 2 MB at most" in out
    assert out.count("proposed") == 1
    script = out[out.index("cat > plan.toml") :]
    assert script.splitlines()[-2:] == [
        "sdgm-edge train my.txt --config plan.toml",
        "sdgm-edge export --bits 8",
    ]
    assert "looking for the widest of 2, 3 layers" in err
    if os.name == "posix":
        subprocess.run(["sh"], input=script.partition("sdgm-edge")[0], text=True, check=True, cwd=tmp_path)
        assert load_config(tmp_path / "plan.toml").corpus.vocab_size == 512


def test_a_config_that_train_reads(plan, tmp_path: Path) -> None:
    code, out, _ = plan(*SMALL, "--out", "new/plan.toml", "--json")
    assert code == 0
    told = json.loads(out)
    assert told["config"] == (tmp_path / "new/plan.toml").read_text()
    assert told["commands"] == [
        "sdgm-edge train my.txt --config new/plan.toml", "sdgm-edge export --bits 8",
    ]  # fmt: skip
    assert load_config(tmp_path / "new/plan.toml").model.width == told["proposed"]["config"]["width"]


def test_a_preset_is_named(plan) -> None:
    code, out, _ = plan("--budget", "0.7MB", "--vocab", "512", "--bits", "8", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["proposed"]["preset"] == "edge-nano"
    assert told["commands"][0] == "sdgm-edge train my.txt --preset edge-nano --vocab-size 512"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--budget", "0MB"), "bundle: expected a number above 0, got 0"),
        (("--budget", "16"), "--budget: expected a number with one of b, kb, mb"),
        (("--budget", "much"), "--budget: expected a number with one of b, kb, mb"),
        (("--budget", "-1MB"), "--budget: expected a number with one of b, kb, mb"),
        (
            ("--budget", "1kB", "--vocab", "512"),
            "no model keeps these wishes: the smallest (2 layers of width 32",
        ),
        ((*SMALL, "--speed", "1e9"), "no model keeps these wishes: the smallest (2 layers of width 32"),
        (("--speed", "-1"), "speed: expected a number from 0, got -1"),
        (("--max-rss", "1ms"), "--max-rss: expected a number with one of b, kb, mb"),
        (("--bits", "5"), "bits: expected one of 4, 8, 16, 32, got 5"),
        (("--vocab", "0"), "vocab_size: expected 257 to"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(plan, arguments: tuple[str, ...], told: str) -> None:
    code, out, err = plan(*arguments)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"error: {told}")
    assert err.count("error") == 1


def test_a_place_that_cannot_be_written_is_told(plan, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, out, err = plan(*SMALL, "--out", "file/plan.toml")
    assert (code, out) == (2, "")
    assert "file/plan.toml: cannot be written: " in err
    code, out, err = plan(*SMALL, "--out", ".")
    assert (code, out) == (2, "")
    assert "--out: expected a file to write, got the folder ." in err


def test_it_measures_this_machine(tmp_path: Path) -> None:
    """Takes some seconds: nothing is made up."""
    command = [sys.executable, "-m", "sdgm_edge", "plan", *SMALL, "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    proposed = json.loads(done.stdout)["proposed"]
    assert proposed["bundle"] <= 2e6
    assert proposed["tokens_per_second"] > 0
    assert proposed["peak"] is None or proposed["peak"] > 10e6
    assert list(tmp_path.iterdir()) == []
