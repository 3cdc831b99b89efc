"""`benchmarks/atoms.py`: what it refuses; what it measures is tested with atoms."""

import subprocess
import sys
from pathlib import Path

import tiny

ATOMS = Path(__file__).resolve().parent.parent / "benchmarks/atoms.py"


def test_a_bundle_that_tells_no_atoms_is_refused_before_it_is_measured(tmp_path):
    bundle, text = tiny.write(tmp_path / "tiny"), tmp_path / "text.txt"
    text.write_text(tiny.TEXT, encoding="utf-8")
    done = subprocess.run([sys.executable, ATOMS, bundle, text], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {bundle}: expected ringing atoms")
    assert done.stderr.count("\n") == 1
