"""`benchmarks/windows.py`: one row for each window, of a run whose head points and of no other."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import tiny

from sdgm_edge.config import load_config
from sdgm_edge.shards import prepare_corpus
from sdgm_edge.training import train

WINDOWS = Path(__file__).resolve().parent.parent / "benchmarks/windows.py"
TINY = {"num_layers": 1, "width": 16, "num_atoms": 8, "window": 16}


@pytest.mark.parametrize("window", [0, 4])
def test_each_window_has_its_row_and_a_plain_head_none(tmp_path: Path, window: int) -> None:
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(tiny.TEXT * 40, encoding="utf-8")
    corpus = prepare_corpus([text], cache=tmp_path / "cache", vocab_size=280)
    training = {"batch_size": 4, "max_steps": 8, "num_components": 3}
    train(
        load_config(preset="edge-nano", model=TINY | {"copy_window": window}, training=training), corpus, run
    )
    done = subprocess.run(
        [sys.executable, WINDOWS, run, text, "--tokens", "256", "--rounds", "1", "--json"],
        capture_output=True,
        text=True,
    )
    if not window:
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: copy_window: expected a run whose head points, got")
        assert done.stderr.count("\n") == 1
        return
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["windows"]
    assert [row["window"] for row in rows] == [2, 4, 8, 16]
    numbers = [row["state_bytes"] // 4 for row in rows]
    assert [more - less for less, more in pairwise(numbers)] == [130, 260, 520]
    assert all(row["decode_tokens_per_second"] > 0 and row["nats_per_token"] > 0 for row in rows)
