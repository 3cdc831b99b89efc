import json
import os
import subprocess
import sys

import pytest
import torch

from sdgm_edge import checkpoint
from sdgm_edge.checkpoint import Checkpoint
from sdgm_edge.runtime import CheckpointError


@pytest.fixture
def saved(tmp_path):
    content = Checkpoint({"model.w": torch.arange(1000.0), "other": torch.ones(2)}, {"step": 7, "best": 1.5})
    return content, checkpoint.save(content, tmp_path, "last", 7)


def test_round_trip(saved):
    content, folder = saved
    back = checkpoint.load(folder)
    assert back.values == content.values
    assert back.tensors.keys() == content.tensors.keys()
    assert torch.equal(back.part("model")["w"], content.tensors["model.w"])


def test_the_newest_two_are_kept(saved, tmp_path):
    content, _ = saved
    for step in (8, 9, 9):
        checkpoint.save(content, tmp_path, "last", step)
    checkpoint.save(content, tmp_path, "best", 3, keep=1)
    assert [p.name for p in checkpoint.existing(tmp_path, "last")] == ["last-000000008", "last-000000009"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best-000000003",
        "last-000000008",
        "last-000000009",
    ]


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_truncated_file_is_told(saved, keep):
    _, folder = saved
    path = folder / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        CheckpointError, match=r"tensors.safetensors is truncated or damaged: expected sha256 .* delete"
    ):
        checkpoint.load(folder)


def test_a_flipped_bit_is_told(saved):
    _, folder = saved
    path = folder / "tensors.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        checkpoint.load(folder)


@pytest.mark.parametrize("meta", ["", "{", "[]", "{}", '"x"'])
def test_damaged_values_are_told(saved, meta):
    _, folder = saved
    (folder / "meta.json").write_text(meta)
    with pytest.raises(CheckpointError, match=r"meta.json is damaged"):
        checkpoint.load(folder)


def test_a_missing_file_is_told(saved):
    _, folder = saved
    (folder / "meta.json").unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        checkpoint.load(folder)


def test_another_version_is_told(saved):
    _, folder = saved
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "version": 2}))
    with pytest.raises(CheckpointError, match="has version 2, this sdgm-edge reads version 1"):
        checkpoint.load(folder)


def test_a_full_disk_leaves_the_checkpoint_before(saved, tmp_path):
    content, folder = saved
    resource = pytest.importorskip("resource", reason="no limit on a file's size here")
    code = f"""
import resource, signal, torch
from pathlib import Path
from sdgm_edge import checkpoint
from sdgm_edge.runtime import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # the system refuses more, as a full disk does
try:
    much = checkpoint.Checkpoint({{"w": torch.zeros(10_000)}}, {{}})
    checkpoint.save(much, Path({str(tmp_path)!r}), "last", 8)
except CheckpointError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert f"free some space and go on from {folder} with --resume" in out
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]
    assert torch.equal(checkpoint.load(folder).tensors["other"], content.tensors["other"])
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 2000  # ours is untouched


def test_what_a_killed_writer_left_is_removed(saved, tmp_path):
    content, _ = saved
    left = tmp_path / ".last-000000003.0a1b2c.partial"
    left.mkdir()
    (left / "tensors.safetensors").write_bytes(b"half")
    os.utime(left, (0, 0))
    checkpoint.save(content, tmp_path, "last", 8)
    assert not left.exists()
