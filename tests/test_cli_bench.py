"""`sdgm-edge bench` as a person or a machine meets it: real processes on tiny bundles."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from sdgm_edge import commands_bench
from sdgm_edge.console import format_value
from sdgm_edge.runtime import UsageError

QUICK = ("-p", "20", "-n", "4", "-d", "0,30", "-r", "1")
TESTS = ["pp20", "tg4", "tg4 @ d30", "encode", "sample", "decode"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two bundles, and with modules that no device has or that are not to be imported."""
    folder = tmp_path_factory.mktemp("home")
    tiny.write(folder / "one.sdgm", num_parameters=2_500_000)
    tiny.write(folder / "bundles/two", name="two")
    (folder / "absent").mkdir()
    for name in ("torch", "onnx"):
        (folder / "absent" / f"{name}.py").write_text(f"raise ModuleNotFoundError('no', name={name!r})\n")
    return folder


def bench(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sdgm_edge", "bench", *arguments],
        cwd=home, env=os.environ | environment, capture_output=True, encoding="utf-8",
    )  # fmt: skip


def test_markdown_of_two_bundles_side_by_side_on_a_machine_without_torch(home: Path) -> None:
    done = bench(
        home,
        "one.sdgm",
        "bundles/two",
        "--variant",
        "int8",
        *QUICK,
        "-o",
        "md",
        PYTHONPATH=str(home / "absent"),
    )
    assert done.returncode == 0, done.stderr
    machine, *lines = done.stdout.splitlines()
    assert f"{os.cpu_count()} cores" in machine
    assert "1 thread " in machine
    header = (
        "| model | size MB | params M | backend | threads | test | t/s | ± | t/s by CPU time | µs/token |"
    )
    assert header in lines
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| t")]
    tests = [row for row in rows if len(row) == 10]
    assert [row[5] for row in tests] == 2 * TESTS
    size = format_value((home / "bundles/two/model_int8.onnx").stat().st_size / 1e6)
    assert {tuple(row[:5]) for row in tests} == {
        ("tiny int8", size, "2.50", "cpu", "1"),
        ("two int8", size, "–", "cpu", "1"),
    }
    fresh = [row for row in rows if len(row) == 12]
    assert [(row[0], row[-1]) for row in fresh] == [
        ("tiny int8", str(4 * tiny.STATE)),
        ("two int8", str(4 * tiny.STATE)),
    ]
    assert "one.sdgm: int8, 1 thread: round 1 of 1" in done.stderr


def test_the_newest_bundle_is_taken_and_json_tells_all(home: Path) -> None:
    done = bench(home, *QUICK, "--json")
    assert done.returncode == 0, done.stderr
    (told,) = json.loads(done.stdout)
    assert (told["path"], told["variant"], told["threads"]) == ("bundles/two", "fp32", 1)
    assert [test["name"] for test in told["tests"]] == TESTS
    assert all(len(test["cpu_seconds"]) == 1 for test in told["tests"])
    assert told["footprint"]["state"] == 4 * tiny.STATE
    assert told["machine"]["cores"] == os.cpu_count()


def test_csv_of_two_numbers_of_threads(home: Path) -> None:
    done = bench(home, "one.sdgm", *QUICK, "-d", "0", "-t", "1,2", "-o", "csv")
    assert done.returncode == 0, done.stderr
    lines = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [line["threads"] for line in lines] == 5 * ["1"] + 5 * ["2"]
    assert [line["test"] for line in lines[:2]] == ["pp20", "tg4"]
    assert float(lines[0]["tokens_per_second"]) > 0
    assert lines[0]["num_parameters"] == "2500000"
    assert float(lines[0]["first_token"]) > float(lines[0]["load"]) > 0
    assert None not in lines[0]


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("none.sdgm",), 1, "none.sdgm: "),
        (("one.sdgm", "none.sdgm"), 1, "none.sdgm: "),
        (("one.sdgm", "--variant", "q4"), 1, "one.sdgm: no such variant: expected fp32 or int8, got 'q4'"),
        (("one.sdgm", "-o", "xml"), 2, "--output: expected one of table, md, json, csv, got 'xml'"),
        (("one.sdgm", "-t", "1,0"), 2, "threads: expected 1 to 1024, got 0"),
        (("one.sdgm", "-t", "1,2000"), 2, "threads: expected 1 to 1024, got 2000"),
        (("one.sdgm", "-o", "md", "--json"), 2, "--json is -o json: expected it alone, got --output md too"),
        (("one.sdgm", "-t", "two"), 2, "--threads: expected numbers such as 1,2k, got 'two'"),
        (("one.sdgm", "-t", ""), 2, "--threads: expected numbers such as 1,2k, got ''"),
        (("one.sdgm", "-d", "0,-5"), 2, "depths: expected a whole number from 0, got -5"),
        (("one.sdgm", "-d", "1m"), 2, "--depths: expected numbers such as 1,2k, got '1m'"),
        (("one.sdgm", "-n", "0"), 2, "tokens: expected a whole number from 1, got 0"),
        (("one.sdgm", "-r", "0"), 2, "repeats: expected a whole number from 1, got 0"),
        (("one.sdgm", "--providers", "warp"), 2, "providers: expected some of "),
    ],
)
def test_what_is_wrong_is_told_in_one_line(
    home: Path, arguments: tuple[str, ...], code: int, told: str
) -> None:
    done = bench(home, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(f"error: {told}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "numbers"), [("0,1k,16K", [0, 1000, 16000]), ("1, 2,1", [1, 2]), ("100k", [100_000])]
)
def test_numbers(text: str, numbers: list[int]) -> None:
    assert commands_bench._numbers("-", text) == numbers


@pytest.mark.parametrize("text", ["1,,2", "1.5k", "k", "1kk", "one"])
def test_other_numbers_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--depths: expected numbers such as"):
        commands_bench._numbers("--depths", text)
