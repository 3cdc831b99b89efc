import platform
import signal

import numpy as np
import pytest
import torch

from sdgm_edge.process import keep_memory, pick_device, stopping
from sdgm_edge.runtime import ProviderError


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there_is_told():
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(ProviderError, match="no CUDA device is available to torch: use --device cpu"):
        pick_device("cuda")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_that_was_freed_is_there_for_the_next_tensor():
    from resource import RUSAGE_SELF, getrusage

    def pages_taken():
        before = getrusage(RUSAGE_SELF).ru_minflt
        np.empty(100 << 20, np.uint8).fill(1)
        return getrusage(RUSAGE_SELF).ru_minflt - before

    keep_memory()
    pages_taken()
    assert pages_taken() < 1000  # of 25 600


def test_a_signal_raises_the_flag_and_a_second_interrupt_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with stopping() as stopped:
        assert not stopped.is_set()
        signal.raise_signal(signal.SIGTERM)
        assert stopped.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
