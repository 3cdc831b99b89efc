"""`benchmarks/drafts.py`: drafts are measured where they are exact, and refused elsewhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import trained

from sdgm_edge.export import export_run, pipeline

DRAFTS = Path(__file__).resolve().parent.parent / "benchmarks/drafts.py"


@pytest.mark.parametrize("drafts", [False, True])
def test_what_drafts_bring(monkeypatch, tmp_path, drafts):
    monkeypatch.setattr(pipeline, "load_run", lambda folder: trained.run())
    monkeypatch.setattr(pipeline, "SPEED_SECONDS", 0.001)
    export_run("runs/tale", tmp_path / "tale", (8,), drafts=drafts, force=True)
    done = subprocess.run(
        [sys.executable, DRAFTS, tmp_path / "tale", "--rounds", "1", "--json"], capture_output=True, text=True
    )
    if drafts:
        assert done.returncode == 0, done.stderr
        assert len(json.loads(done.stdout)["texts"]) == 4
    else:
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: draft: expected a graph that gives for 17 tokens at once")
        assert done.stderr.count("\n") == 1
