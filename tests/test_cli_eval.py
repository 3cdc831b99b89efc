"""`sdgm-edge eval`: a run and the bundle made of it are scored alike."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdgm_edge.config import load_config
from sdgm_edge.export import export_run
from sdgm_edge.runtime import verify
from sdgm_edge.shards import prepare_corpus
from sdgm_edge.training import train

TINY = {"num_layers": 1, "width": 16, "num_atoms": 8, "glu_width": 16, "window": 16, "dropout": 0.0}
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.fixture(scope="module", params=["bpe", "word"])
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained run, the bundle that it was exported to, and a text that is new to both."""
    folder = tmp_path_factory.mktemp(request.param)
    rng = np.random.default_rng(0)
    lines = [" ".join(WORDS[i:] + WORDS[:i]) for i in rng.integers(0, 10, 400)]
    (folder / "train.txt").write_text("\n".join(lines) + "\n")
    (folder / "new.txt").write_text("\n".join([*lines[100:140], "Zwölf\tand more: eleven…"]) + "\n", "utf-8")
    kind: dict[str, Any] = {"tokenizer_kind": request.param}
    vocabulary = {"vocab_size": 280} if request.param == "bpe" else {}
    corpus = prepare_corpus([folder / "train.txt"], cache=folder / "cache", **kind, **vocabulary)
    training = {"batch_size": 4, "max_steps": 40, "num_components": 3}
    settings = load_config(
        preset="edge-nano", model=TINY, training=training, corpus={"tokenizer": request.param}
    )
    train(settings, corpus, folder / "run")
    export_run(folder / "run", folder / "bundle.sdgm", bits=(32, 8), force=True)
    return folder


def evaluate(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sdgm_edge", "eval", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"SDGM_EDGE_CACHE": str(folder / "cache")},
    )


def figures(folder: Path, *arguments: str) -> dict[str, Any]:
    done = evaluate(folder, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def numbers(result: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in result.items() if isinstance(value, int | float)}


def test_a_bundle_is_scored_as_its_run(home: Path) -> None:
    run = figures(home, "run", "new.txt")
    float32 = figures(home, "bundle.sdgm", "new.txt", "--variant", "fp32")
    int8 = figures(home, "bundle.sdgm", "new.txt")
    assert run["num_tokens"] > 400  # more than one call of the graph takes
    assert float32.keys() == run.keys()
    assert float32["sha256"] == run["sha256"]
    assert numbers(float32) == pytest.approx(numbers(run), rel=1e-4)
    assert numbers(int8) != pytest.approx(numbers(run), rel=1e-7)
    assert numbers(int8) == pytest.approx(numbers(run), rel=0.2)


def test_a_run_has_no_variants(home: Path) -> None:
    done = evaluate(home, "run", "new.txt", "--variant", "int8")
    assert done.returncode == 2
    assert done.stderr == "error: --variant int8 chooses in a bundle, and run is a run: export it first\n"
    done = evaluate(home, "run", "new.txt", "--atoms", "4")
    assert done.stderr == "error: --atoms 4 chooses in a bundle, and run is a run: export it first\n"


def test_a_bundle_has_its_window_and_a_plain_head_none(home: Path) -> None:
    done = evaluate(home, "bundle.sdgm", "new.txt", "--copy-window", "8")
    assert done.returncode == 2
    assert (
        "--copy-window chooses in a run, and bundle.sdgm is none: give it to sdgm-edge export" in done.stderr
    )
    done = evaluate(home, "run", "new.txt", "--copy-window", "8")
    assert done.returncode == 2
    assert "expected a run whose head points, got run with a plain one" in done.stderr


def test_a_text_without_white_space_is_trained_on_exported_verified_and_scored(tmp_path: Path) -> None:
    """Of one long word no float holds the perplexity: it is none, for machines and for people."""
    rng = np.random.default_rng(0)
    written = "".join(chr(0x4E00 + i) for i in rng.integers(0, 400, 24_000))
    (tmp_path / "train.txt").write_text(written, "utf-8")
    (tmp_path / "new.txt").write_text(written[:600], "utf-8")
    corpus = prepare_corpus([tmp_path / "train.txt"], cache=tmp_path / "cache", vocab_size=300)
    settings = load_config(
        preset="edge-nano", model=TINY, training={"batch_size": 4, "max_steps": 8, "num_components": 3}
    )
    train(settings, corpus, tmp_path / "run")
    report = export_run(tmp_path / "run", tmp_path / "bundle.sdgm", bits=(8,))
    assert report.reference.word_perplexity is None
    assert verify(tmp_path / "bundle.sdgm", providers="cpu").ok
    for model in ("run", "bundle.sdgm"):
        result = figures(tmp_path, model, "new.txt")
        assert result["word_perplexity"] is None
        assert 1 < result["token_perplexity"] < 1000
        assert re.search(r"word_perplexity +│ +– ", evaluate(tmp_path, model, "new.txt").stdout)
