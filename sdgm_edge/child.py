"""Another process of this Python, which ends when this one is ended."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sdgm_edge.runtime import SdgmError

INTERRUPTED = 130
"""What a process ends with that took a signal for Ctrl-C."""


def run(arguments: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` to its end; `options` are those of `subprocess.Popen`.

    Raises:
        KeyboardInterrupt: a signal came, here or there; the process has ended.
    """
    with (
        _terminable(),
        subprocess.Popen([sys.executable, *arguments], text=True, **options) as process,
    ):
        try:
            output, errors = process.communicate()
        except BaseException:
            process.terminate()  # a training finishes its step and saves
            process.communicate()
            raise
    if process.returncode == INTERRUPTED:
        raise KeyboardInterrupt
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def told(code: int) -> str:
    """Return what a process that failed ended with, from its exit code."""
    if code < 0:
        return f"was killed by signal {-code} (out of memory?)"
    return f"ended with code {code}"


@contextmanager
def ending() -> Iterator[None]:
    """End this process as `run` is told of: with one line where something a user can meet went wrong."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except (SdgmError, OSError) as error:
        sys.exit(f"error: {error}")


@contextmanager
def _terminable() -> Iterator[None]:
    """Take SIGTERM for Ctrl-C, which alone would leave what runs beneath behind; in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
