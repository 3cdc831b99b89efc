import io
import json
import sys
from typing import Any

import pytest

from sdgm_edge import console
from sdgm_edge.runtime import UsageError
from sdgm_edge.training import Progress


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "yes"),
        (False, "no"),
        (1234567, "1,234,567"),
        (12.345, "12.35"),
        (-1234.5, "-1,234.50"),
        (0.00123456, "0.001235"),
        (0.0, "0"),
        (None, "–"),
        ("as it is", "as it is"),
    ],
)
def test_format_value(value: object, text: str) -> None:
    assert console.format_value(value) == text


def test_table_is_not_folded_where_stdout_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table(("name", "count"), [("x" * 120, 12345), ("[b]", 6)], title="figures")
    printed = capsys.readouterr()
    assert "x" * 120 in printed.out
    assert "[b]" in printed.out
    assert " 12,345 " in printed.out
    assert printed.err == ""


def test_record(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_record({"tokens": 5, "note": None})
    lines = capsys.readouterr().out.splitlines()
    assert any("tokens" in line and "5" in line for line in lines)


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"naïve": [1.5, None]})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"naïve": [1.5, None]}
    assert printed.isascii()


def test_json_refuses_what_is_no_number() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        console.print_json(float("nan"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "shown"), [(Terminal, True), (io.StringIO, False)])
def test_text_progress_is_for_terminals(monkeypatch: pytest.MonkeyPatch, stream: Any, shown: bool) -> None:
    errors = stream()
    monkeypatch.setattr(sys, "stderr", errors)
    monkeypatch.setenv("TERM", "xterm")
    with console.text_progress() as progress:
        progress("tokenising", 500, 1000)
    assert ("tokenising" in errors.getvalue()) is shown


@pytest.mark.parametrize(
    ("stream", "patience", "shown"),
    [(Terminal, 0.0, True), (Terminal, 60.0, False), (io.StringIO, 0.0, False)],
    ids=["a long text", "a short text", "no terminal"],
)
def test_reading_is_shown_to_a_terminal_when_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, stream: Any, patience: float, shown: bool
) -> None:
    errors, output = stream(), sys.stdout
    monkeypatch.setattr(sys, "stderr", errors)
    monkeypatch.setattr(console, "_PATIENCE", patience)
    monkeypatch.setenv("TERM", "xterm")
    with console.reading_progress() as progress:
        progress(10, 3000)
        progress(1024, 3000)
        progress(3000, 3000)
        told = errors.getvalue()
        assert ("reading" in told and "1024/3000" in told) is shown
        assert (told == "") is not shown
        assert sys.stdout is output, "what is generated is written as it comes"
        progress(3000, 3000)
    assert errors.getvalue() == told, "nothing is left, nor said again"


def test_speed_is_told_once_it_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    with console.training_progress("runs/a") as show:
        show(Progress(1, 2, 3.0, 0.0, None))
        show(Progress(2, 2, 3.0, 1234.0, None))
    assert capsys.readouterr().err.splitlines() == [
        "runs/a: step 1/2 · loss 3.000",
        "runs/a: step 2/2 · loss 3.000 · 1,234 tokens/s",
    ]


def test_a_choice_of_several() -> None:
    console.check_choice("--device", "cpu", ("auto", "cpu"))
    with pytest.raises(
        UsageError, match="--device: expected one of auto, cpu, got 'tpu'; write one of these"
    ):
        console.check_choice("--device", "tpu", ("auto", "cpu"))


def test_a_path_with_colons_stays_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table(("name",), [("c:a:d" + 20 * "-",)], title="a:b:c.sdgm")
    out = capsys.readouterr().out
    assert "a:b:c.sdgm" in out
    assert "c:a:d" in out
