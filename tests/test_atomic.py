"""Files that are there whole or not at all, and what writers leave behind that were killed."""

import os
import stat
from pathlib import Path

import pytest
from sdgm_edge.runtime.atomic import check_place, replacing, replacing_folder, sweep

from sdgm_edge.runtime import StateError


def leftover(path):
    """A file of a writer that was killed long ago."""
    path.write_bytes(b"half")
    os.utime(path, (0, 0))
    return path


@pytest.mark.parametrize("name", ["", ".", "/", "a\0b", "a\ud800b"])
def test_what_names_no_file_is_refused(name):
    told = r"cannot be written: .*; give a path that names a file"
    with pytest.raises(StateError, match=told), replacing(Path(name), StateError):
        pytest.fail("there is nothing to write to")


def test_of_a_link_what_it_names_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "real").write_text("old")
    (tmp_path / "link").symlink_to("disk/real")
    with replacing(tmp_path / "link", StateError) as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "real").read_text() == "new"


def test_an_error_of_the_writer_stays_what_it_is(tmp_path):
    with pytest.raises(ValueError, match="of the writer"), replacing(tmp_path / "a", StateError):
        raise ValueError("of the writer")
    assert os.listdir(tmp_path) == []


def test_two_that_sweep_at_once_do_not_disturb_each_other(tmp_path, monkeypatch):
    leftover(tmp_path / ".a.1.partial")
    found = list(tmp_path.glob(".a.*.partial"))
    sweep(tmp_path, ".a.*.partial")
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: found)  # seen before the other removed it
    sweep(tmp_path, ".a.*.partial")


def test_a_link_that_was_left_is_removed_and_what_it_names_stays(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    link = tmp_path / ".a.1.partial"
    link.symlink_to("kept")
    os.utime(link, (0, 0), follow_symlinks=False)
    sweep(tmp_path, ".a.*.partial")
    assert os.listdir(tmp_path) == ["kept"]
    assert os.listdir(tmp_path / "kept") == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="devices and pipes are files on POSIX alone")
def test_a_device_or_a_pipe_is_left_alone(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/null")):
        told = "cannot be written: what is there is neither a file nor a folder"
        with pytest.raises(StateError, match=told):
            check_place(place, StateError)
        with pytest.raises(StateError, match=f"{told}; name a file"), replacing(place, StateError):
            pytest.fail("there is nothing to write to")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
def test_who_may_read_a_file_stays_as_it_was(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "a").chmod(0o600)
    with replacing(tmp_path / "a", StateError) as file:
        file.write(b"new")
    assert (tmp_path / "a").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


def test_a_folder_takes_the_place_of_another_whole_or_not_at_all(tmp_path):
    with replacing_folder(tmp_path / "made" / "a", StateError) as folder:
        (folder / "file").write_text("old")

    def fail() -> None:
        with replacing_folder(tmp_path / "made" / "a", StateError, remedy="do as this says") as folder:
            (folder / "other").write_text("half")
            raise OSError(28, "Is full")

    with pytest.raises(StateError, match="cannot be written: Is full; do as this says"):
        fail()
    assert [path.name for path in (tmp_path / "made").rglob("*")] == ["a", "file"]
    with replacing_folder(tmp_path / "made" / "a", StateError) as folder:
        (folder / "other").write_text("new")
    assert [path.name for path in (tmp_path / "made").rglob("*")] == ["a", "other"]
