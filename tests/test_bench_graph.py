"""`benchmarks/graph.py`: that it measures every variant; not what it measures."""

import json
import subprocess
import sys
from pathlib import Path

GRAPH = Path(__file__).resolve().parent.parent / "benchmarks/graph.py"
QUICK = (
    "import sys, pathlib; sys.path.insert(0, str(pathlib.Path(sys.argv[1]).parent)); import graph;"
    "graph.ROUNDS, graph.SECONDS = 1, 0; sys.argv = sys.argv[1:]; graph.main()"
)


def measured(*options: str) -> dict[str, dict[str, float]]:
    command = [sys.executable, "-c", QUICK, str(GRAPH), *options, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, float]] = json.loads(done.stdout)["microseconds"]
    return found


def test_a_pointer_and_drafts_stand_beside_what_they_add_to() -> None:
    found = measured("--preset", "edge-nano", "--pointer", "16", "--drafts")
    variants = ["int8", "q4", "fp32", "fp16", "int8 for drafts", "q4 for drafts"]
    assert list(found) == [*variants, *(f"{variant}, pointer 16" for variant in variants)]


def test_every_variant_is_measured_at_every_length_a_call_takes() -> None:
    for preset, lengths in (("edge-nano", ["1", "16", "128"]), ("paper", ["1", "16"])):
        found = measured("--preset", preset)
        assert {variant: list(times) for variant, times in found.items()} == dict.fromkeys(
            ("int8", "q4", "fp32", "fp16"), lengths
        )
        assert all(us > 0 for times in found.values() for us in times.values())
