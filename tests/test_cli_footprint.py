"""`sdgm-edge footprint` as a person or a CI job on a device meets it: real processes on a tiny bundle."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from sdgm_edge.runtime.stages import STAGES

from sdgm_edge import commands_measure
from sdgm_edge.runtime import UsageError

QUICK = ("--variant", "int8", "-n", "2", "-r", "1")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle, and with modules that no device has or that are not to be imported."""
    folder = tmp_path_factory.mktemp("home")
    tiny.write(folder / "tiny.sdgm")
    (folder / "absent").mkdir()
    for name in ("torch", "matplotlib"):
        (folder / "absent" / f"{name}.py").write_text(f"raise ModuleNotFoundError('no', name={name!r})\n")
    return folder


def footprint(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sdgm_edge", "footprint", "tiny.sdgm", *arguments],
        cwd=home, env=os.environ | environment, capture_output=True, encoding="utf-8",
    )  # fmt: skip


def test_json_on_a_machine_without_torch(home: Path) -> None:
    done = footprint(home, *QUICK, "--json", "--max-rss", "2GB", PYTHONPATH=str(home / "absent"))
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert [v["variant"] for v in told["variants"]] == ["int8"]
    assert list(told["variants"][0]["stages"]) == list(STAGES)
    assert told["limits"] == {"--max-rss": 2e9, "--max-first-token": None}
    assert told["above_limits"] == []


def test_limits_name_the_figure_after_the_report(home: Path) -> None:
    done = footprint(home, *QUICK, "--max-rss", "1MB", "--max-first-token", "1 us")
    assert done.returncode == 1
    rss, first = done.stderr.splitlines()
    assert rss.startswith("tiny.sdgm: int8: peak RSS: expected at most 1 MB (--max-rss), got ")
    assert first.startswith(
        "tiny.sdgm: int8: cold first token: expected at most 0.001 ms (--max-first-token)"
    )
    assert "after tokens" in done.stdout


def test_markdown(home: Path) -> None:
    done = footprint(home, *QUICK, "--markdown")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert "| variant | stage | RSS MB | anonymous MB | file-backed MB | private MB | peak MB |" in lines
    assert "|" not in {line[0] for line in lines if line and line[-1] != "|"}
    widths = [len(line.split(" | ")) for line in lines if line.startswith("|")]
    assert widths == [7] * 7 + [8] * 3 + [6] * 3


def test_a_chart(home: Path, tmp_path: Path) -> None:
    done = footprint(home, *QUICK, "--chart", str(tmp_path / "c.png"))
    assert done.returncode == 0
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_a_chart_without_matplotlib_is_refused_before_measuring(home: Path) -> None:
    done = footprint(home, "--chart", "c.png", PYTHONPATH=str(home / "absent"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: --chart draws with matplotlib, which is not installed; type: pip install matplotlib\n"
    )


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--max-rss", "64"), "--max-rss: expected a number with one of b, kb, mb"),
        (("--max-rss", "64ms"), "--max-rss: expected a number with one of b, kb, mb"),
        (("--max-first-token", "fast"), "--max-first-token: expected a number with one of us, ms, s"),
        (("--json", "--markdown"), "--markdown and --json both say how to print"),
        (("--chart", "none/c.png"), "--chart: there is no folder none; make it first"),
        (("--chart", "c.xyz"), "--chart: expected a file *.png or *.svg, got 'c.xyz'"),
        (("-n", "0"), "tokens: expected a whole number from 1, got 0"),
    ],
)
def test_misuse_is_told_in_one_line(home: Path, flags: tuple[str, ...], told: str) -> None:
    done = footprint(home, *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {told}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "value"), [("64MB", 64e6), ("64 MiB", 64 << 20), ("1.5gb", 1.5e9), ("3kB", 3e3), ("7B", 7)]
)
def test_quantities(text: str, value: float) -> None:
    assert commands_measure.quantity("-", text, commands_measure.BYTES, "") == value


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "1e3MB", "64 M B", "nanMB", "1..5s"])
def test_other_quantities_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--max-rss: expected a number with one of"):
        commands_measure.quantity("--max-rss", text, commands_measure.BYTES, "64MB")


def test_a_limit_that_cannot_be_checked_is_not_kept() -> None:
    class Untold:
        variant, peak = "int8", None

        class seconds:
            first_token = 0.1

    (line,) = commands_measure._above(Untold, {"--max-rss": 64e6, "--max-first-token": 0.2})  # type: ignore[arg-type]
    assert line == "int8: peak RSS: expected at most 64 MB (--max-rss), got not told here"
