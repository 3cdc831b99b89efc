"""`sdgm-edge probe` as a person meets it: real processes, on a tiny run and on a tiny bundle."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from sdgm_edge import cli
from sdgm_edge.config import load_config
from sdgm_edge.shards import prepare_corpus
from sdgm_edge.training import train

TINY = {"num_layers": 1, "width": 16, "num_atoms": 8, "glu_width": 16, "window": 16, "dropout": 0.0}
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, a bundle, and texts for both."""
    folder = tmp_path_factory.mktemp("home")
    rng = np.random.default_rng(0)
    lines = [" ".join(WORDS[i:] + WORDS[:i]) for i in rng.integers(0, 10, 400)]
    (folder / "train.txt").write_text("\n".join(lines) + "\n")
    (folder / "tale.txt").write_text(tiny.TEXT * 20, "utf-8")
    tiny.write(folder / "tiny.sdgm")
    corpus = prepare_corpus([folder / "train.txt"], cache=folder / "cache", vocab_size=280)
    training = {"batch_size": 4, "max_steps": 150, "num_components": 3}
    train(load_config(preset="edge-nano", model=TINY, training=training), corpus, folder / "run")
    return folder


def probe(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sdgm_edge", "probe", *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"SDGM_EDGE_CACHE": str(folder / "cache")},
    )


def told(folder: Path, *arguments: object) -> Any:
    done = probe(folder, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


SMALL = ("--number", 3, "-n", 12, "--prompt-words", 4, "--strengths", "0.5")


def test_a_run_is_exported_and_judged_by_a_run(home: Path) -> None:
    result = told(home, "generation", "run", "train.txt", "--judge", "run", *SMALL)
    assert [row["mode"] for row in result["rows"]] == ["human", "plain", "posterior", "prior"]
    assert (result["variant"], result["num_tokens"], result["strengths"]) == ("fp32", 12, [0.5])
    assert all(len(row["texts"]) == 3 and row["word_perplexity"] > 1 for row in result["rows"])


def test_a_bundle_is_told_as_a_table_and_as_markdown(home: Path) -> None:
    done = probe(home, "generation", "tiny.sdgm", "tale.txt", *SMALL, "--variant", "int8")
    assert done.returncode == 0, done.stderr
    assert "tiny.sdgm (int8): 3 texts of 12 tokens, temperature 1, top-p 1, seed 0\n" in done.stdout.replace(
        " \n", "\n"
    ).replace("  ", "")
    markdown = probe(home, "generation", "tiny.sdgm", "tale.txt", *SMALL, "--markdown").stdout
    assert "| mode | η | distinct-1 |" in markdown
    assert "| posterior | 0.5 |" in markdown


def test_misuse_is_named(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    for arguments, message in (
        (("generation", "run", "train.txt", "--variant", "int8"), "run is a run: export it first"),
        (("generation", "tiny.sdgm", "tale.txt", "--json", "--markdown"), "both say how to print"),
        (
            ("generation", "tiny.sdgm", "tale.txt", "--strengths", "a"),
            "expected numbers with commas, got 'a'",
        ),
        (("generation", "tiny.sdgm", "tale.txt"), "give more text"),
        (("memory", "--distances", "far"), "--distances: expected numbers with commas, got 'far'"),
    ):
        monkeypatch.setattr(sys, "argv", ["sdgm-edge", "probe", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr().err
        assert ended.value.code == 2
        assert said.startswith("error: ")
        assert message in said
        assert said.count("\n") == 1


def test_what_models_keep_in_mind(home: Path) -> None:
    small = ("--models", "lstm", "--tasks", "needle", "--params", "20k", "--steps", 2, "--distances", "3,9")
    (finding,) = told(home, "memory", *small, "--trained-distance", 4)
    assert (finding["entry"], finding["task"], list(finding["accuracy"])) == ("lstm", "needle", ["3", "9"])


def test_what_size_costs(home: Path) -> None:
    small = (
        "--models",
        "lstm",
        "--windows",
        16,
        "--vocab-sizes",
        "270,60000",
        "--params",
        "20k",
        "--max-steps",
        2,
    )
    rows = told(home, "scale", "train.txt", *small, "--no-inference", "--out", "scale", "--device", "cpu")
    assert [(row["vocab_size"], row["status"]) for row in rows] == [(270, "finished"), (60000, "impossible")]
    assert rows[0]["bits_per_byte"] > 0
    assert "the text is too small for a vocabulary of 60000" in rows[1]["reason"]
