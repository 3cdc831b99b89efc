"""Files that are there whole or not at all."""

import os
from pathlib import Path

import pytest
from sdgm_edge.runtime.atomic import replacing

from sdgm_edge.runtime import StateError


@pytest.mark.parametrize("name", ["", ".", "/", "a\0b", "a\ud800b"])
def test_what_names_no_file_is_refused(name):
    told = r"cannot be written: .*; give a path that names a file"
    with pytest.raises(StateError, match=told), replacing(Path(name), StateError):
        pytest.fail("there is nothing to write to")


def test_an_error_of_the_writer_stays_what_it_is(tmp_path):
    with pytest.raises(ValueError, match="of the writer"), replacing(tmp_path / "a", StateError):
        raise ValueError("of the writer")
    assert os.listdir(tmp_path) == []
