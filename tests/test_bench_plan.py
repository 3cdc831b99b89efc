"""`benchmarks/plan.py`: that sizes are told before as they are after; not how fast anything is."""

import json
import subprocess
import sys
from pathlib import Path

PLAN = Path(__file__).resolve().parent.parent / "benchmarks/plan.py"
QUICK = (
    "import sys, pathlib; sys.path.insert(0, str(pathlib.Path(sys.argv[1]).parent)); import plan;"
    "plan.EDGE = ('edge-nano',); sys.argv = sys.argv[1:]; plan.main()"
)


def test_what_is_told_before_is_held_against_what_is_measured() -> None:
    """Takes some seconds: a model is planned, made and measured."""
    command = [sys.executable, "-c", QUICK, str(PLAN), "--bits", "8", "--repeats", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    rows = {row["figure"]: row for row in report["figures"]}
    assert {row["model"] for row in rows.values()} == {"edge-nano int8"}
    assert rows["bundle, MB"]["kept"]
    assert rows["bundle, MB"]["told"] != rows["bundle, MB"]["measured"]
    assert rows["generating, tokens/s"]["measured"] > 0
    if "peak RSS, MB" in rows:  # where the system tells
        assert rows["peak RSS, MB"]["kept"]
