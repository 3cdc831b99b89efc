"""The process that trains: its device, its memory, and the signals that end it."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sdgm_edge.runtime import ProviderError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's `mallopt`."""


def pick_device(name: str) -> torch.device:
    """Return the device of that name; `auto` is a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ProviderError(
            "no CUDA device is available to torch: use --device cpu, or install a CUDA build of torch"
        )
    if name == "cuda":
        torch.cuda.set_device(local := int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cuda", local)
    return torch.device(name)


def supports_bf16(device: torch.device) -> bool:
    """Tell whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def keep_memory() -> None:
    """Let this process keep the memory that it frees, for its next large tensor. Other libraries than glibc
    are left as they are.

    glibc gives a large block back to the system when it is freed, and the next of its size is taken, and
    zeroed, page by page: with a large vocabulary a third of a training step on a CPU.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def stopping() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets: the step under way is finished. A second SIGINT stops at once."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def stop(number: int, frame: object) -> None:
        if stopped.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopped.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
