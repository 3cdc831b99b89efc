"""Run folders: which may be used, and by whom."""

import json
from pathlib import Path

import pytest
import torch
import trained

from sdgm_edge.config import load_config
from sdgm_edge.run import check_unused, is_run, locked, name_of, read_run_config, with_copy_window
from sdgm_edge.runtime import RunError, UsageError


def test_a_folder_that_holds_something_is_not_written_over(tmp_path: Path) -> None:
    check_unused(tmp_path)
    (tmp_path / "trial.json").touch()
    check_unused(tmp_path)  # of a comparison, which says there what to train
    for name in ("config.json", "log.csv"):  # of a run that ended before its first checkpoint
        (tmp_path / name).write_text(json.dumps(load_config().to_dict()))
        check_unused(tmp_path)
    (tmp_path / "checkpoints/last-000000001").mkdir(parents=True)
    with pytest.raises(RunError, match="holds a run already: go on with it by --resume"):
        check_unused(tmp_path)
    (tmp_path / "manifest.json").touch()
    with pytest.raises(RunError, match="holds a bundle: expected a folder for a run; choose another --out"):
        check_unused(tmp_path)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (("config.json",), "holds config.json: expected a new folder"),
        (("log.csv",), "holds log.csv: expected a new folder"),
        (("thesis.txt",), "holds thesis.txt: expected a new folder"),
    ],
)
def test_files_of_others_are_not_written_over(tmp_path: Path, files: tuple[str, ...], told: str) -> None:
    for name in files:
        (tmp_path / name).write_text('{"hidden_size": 768}')
    with pytest.raises(RunError, match=told):
        check_unused(tmp_path)


def test_a_place_that_can_be_no_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file is no folder"):
        check_unused(tmp_path / "file")


@pytest.mark.parametrize(
    ("sources", "name"),
    [
        ((), "pydoc"),
        (("a/my.text.txt",), "my"),
        (("notes/*.md",), "text"),
        (("k1*.txt", "b.txt"), "k1"),
        (("b.txt", "-"), "text"),
        (("a b;c.txt",), "a-b-c"),
        (("日本.txt",), "日本"),
    ],
)
def test_names_of_folders_mean_nothing_to_a_shell(sources: tuple[str, ...], name: str) -> None:
    assert name_of(sources) == name


def test_a_bundle_is_no_run_and_a_run_without_checkpoints_is_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert is_run(tmp_path)
    (tmp_path / "manifest.json").touch()
    assert not is_run(tmp_path)
    with pytest.raises(RunError, match="is a bundle: expected a run folder"):
        read_run_config(tmp_path)


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


@pytest.mark.parametrize("window", [1, 3, 20])
def test_a_head_can_look_further_back_or_less_far(window: int) -> None:
    """As long as a text fits into both windows nothing changes; then the wider one sees more."""
    run = trained.run("ringing with pointer")
    other = with_copy_window(run, window)
    assert other.config.copy_window == window
    assert run.config.copy_window == run.model.config.copy_window == 7
    both = min(window, 7)
    ids_BT = torch.randint(trained.VOCAB, (2, both + 1), generator=torch.Generator().manual_seed(1))
    said, expected = other.model(ids_BT).logits_BTV, run.model(ids_BT).logits_BTV
    torch.testing.assert_close(said[:, :both], expected[:, :both], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(said[:, both], expected[:, both], rtol=1e-3, atol=1e-3)


def test_only_a_head_that_points_has_a_window() -> None:
    with pytest.raises(UsageError, match="expected a run whose head points, got runs/tale with a plain one"):
        with_copy_window(trained.run("ringing"), 8)
    with pytest.raises(UsageError, match="expected a number of tokens from 1, got 0"):
        with_copy_window(trained.run("ringing with pointer"), 0)
