"""`make bench`: that it measures, and says on what; not what it measures."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdgm_edge.runtime import Generator, pretrained

BENCH = Path(__file__).resolve().parent.parent / "benchmarks/bench.py"


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(BENCH), *arguments], capture_output=True, text=True)


def test_a_section_measures_and_names_the_machine() -> None:
    done = bench("--only", "sessions", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["machine"]["cores"] == os.cpu_count()
    assert {"cpu", "onnxruntime", "load average"} <= report["machine"].keys()
    figures = report["figures"]
    assert {figure["section"] for figure in figures} == {"sessions"}
    sizes = {figure["name"]: figure for figure in figures if figure["unit"] == "KB"}
    assert len(sizes) == 4
    for figure in sizes.values():  # the one promise here that no machine can break
        assert figure["kept"] is True
        assert figure["measured"] <= 64


def test_what_a_token_costs_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH.parent))
    measuring = importlib.import_module("measuring")
    cost = measuring.decoding(Generator.load(pretrained(), providers="cpu"), tokens=8, texts=2)
    assert 0 < cost.own_wall < cost.wall, "a part of a token's time is not the graph's"


def test_an_unknown_section_is_told() -> None:
    done = bench("--only", "speed,quality")
    assert done.returncode == 2
    assert "--only: no section 'quality'; known: accuracy, speed" in done.stderr
