"""The file of a session. What a session makes of it is tried in test_session.py."""

from pathlib import Path

import numpy as np
import pytest
from sdgm_edge.runtime.parameters import RECENT
from sdgm_edge.runtime.state_file import MOST_HISTORY, Identity, Saved, read_state, write_state

from sdgm_edge.runtime import BundleConfig, StateError

CONFIG = BundleConfig(vocab_size=300, state_size=9, mixing_size=8, chunk=16, model={})
IDENTITY = Identity("ab" * 32, "int8")


def test_as_many_tokens_as_a_session_can_save_are_read(tmp_path):
    recent = [i % 300 for i in range(RECENT + MOST_HISTORY)]
    saved = Saved(5000, np.zeros(9, np.float32), [[1]] * (MOST_HISTORY + 1), recent, None)
    write_state(tmp_path / "a.state", IDENTITY, saved)
    read = read_state(tmp_path / "a.state", IDENTITY, CONFIG)
    assert (read.recent, read.runs) == (saved.recent, saved.runs)


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_what_no_path_can_hold_is_refused(name):
    with pytest.raises(StateError, match=r"cannot be read: .*; check the path"):
        read_state(Path(name), IDENTITY, CONFIG)
