"""Run folders: which may be used, and by whom."""

from pathlib import Path

import pytest

from sdgm_edge.run import check_unused, locked
from sdgm_edge.runtime import RunError


def test_a_folder_that_holds_something_is_not_written_over(tmp_path: Path) -> None:
    check_unused(tmp_path)
    (tmp_path / "config.json").touch()
    check_unused(tmp_path)  # of a run that ended before its first checkpoint
    (tmp_path / "checkpoints/last-000000001").mkdir(parents=True)
    with pytest.raises(RunError, match="holds a run already: go on with it by --resume"):
        check_unused(tmp_path)
    (tmp_path / "manifest.json").touch()
    with pytest.raises(RunError, match="holds a bundle: expected a folder for a run; choose another --out"):
        check_unused(tmp_path)


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(RunError, match="file cannot be a run folder: File exists; choose an --out"),
        locked(tmp_path / "file"),
    ):
        pass


def test_a_folder_made_in_vain_is_taken_away(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name, kept in (("vain", False), ("used", True), ("there", True)):
        with locked(tmp_path / name):
            if name == "used":
                (tmp_path / name / "config.json").touch()
        assert (tmp_path / name).exists() is kept
