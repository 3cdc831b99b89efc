"""What all tests share."""

import logging
import os

# Before torch is imported. Tiny models gain nothing from threads, which beside other work wait for each other
# for minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

settings.register_profile("timeless", deadline=None)  # no test depends on timing
settings.load_profile("timeless")


@pytest.fixture(scope="session", autouse=True)
def folders_of_the_tests(tmp_path_factory):
    """No test reads the cache of whoever runs it or leaves anything there, nor do the processes it starts.

    What those leave that are killed lies where pytest tidies up.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDGM_EDGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("left")))
        yield


@pytest.fixture(autouse=True)
def logging_as_it_was():
    """A command run inside a test logs to that test's stderr, which is closed when the next one logs."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in [h for h in root.handlers if type(h) is logging.StreamHandler and h not in handlers]:
        root.removeHandler(handler)
    root.setLevel(level)
