"""The memory of a process as its system accounts for it; what a system does not tell is None, never a guess.

Linux      /proc: rss, anonymous, file-backed and private pages exactly, and the peak
macOS      psutil where it is installed, else `ps`: rss; private pages where psutil may see them
Windows    psutil where it is installed: rss, private pages and peak
CUDA       nvidia-smi, where it is there and tells the memory of each process
"""

import importlib
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The memory of a process, in bytes."""

    rss: int | None = None
    """Resident pages."""
    anonymous: int | None = None
    """Those of no file: heaps and stacks. They cannot be dropped, only swapped."""
    file_backed: int | None = None
    """Those of files (and shared memory): libraries, mapped weights. The system can drop them."""
    private: int | None = None
    """Those that no other process has: what would be free if this one ended."""
    peak: int | None = None
    """The most that rss has been."""


def read_memory(pid: int) -> Memory:
    """The memory of a process of ours, as this system tells it."""
    if sys.platform == "linux":
        return _of_proc(Path(f"/proc/{pid}"))
    try:
        psutil = importlib.import_module("psutil")
    except ModuleNotFoundError:
        return _of_ps(pid)
    return _of_psutil(psutil, pid)


def gpu_memory(pid: int) -> int | None:
    """The bytes that a process holds on NVIDIA GPUs, or None where the driver does not tell."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    rows = [line.split(",") for line in _output(query).splitlines()]
    used = [int(row[1]) << 20 for row in rows if row[0].strip() == str(pid) and row[1].strip().isdigit()]
    return sum(used) if used else None


def _of_proc(folder: Path) -> Memory:
    status = _kilobytes(folder / "status")
    rss, anonymous, private = status["VmRSS"], status.get("RssAnon"), None
    with suppress(FileNotFoundError):  # a kernel before 4.14, or built without
        pages = _kilobytes(folder / "smaps_rollup")  # exact, where `status` may lag some pages for each core
        rss, anonymous = pages["Rss"], pages["Anonymous"]
        private = pages["Private_Clean"] + pages["Private_Dirty"]
    return Memory(
        rss=rss,
        anonymous=anonymous,
        file_backed=None if anonymous is None else rss - anonymous,
        private=private,
        peak=max(rss, status["VmHWM"]),
    )


def _kilobytes(path: Path) -> dict[str, int]:
    """The lines of a file that read `name: 123 kB`, in bytes."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0][:-1]: int(words[1]) << 10 for words in lines if words[-1:] == ["kB"]}


def _of_psutil(psutil: Any, pid: int) -> Memory:
    process = psutil.Process(pid)
    info, private = process.memory_info(), None
    with suppress(psutil.AccessDenied):  # macOS shows them to root alone
        private = process.memory_full_info().uss
    return Memory(rss=info.rss, private=private, peak=getattr(info, "peak_wset", None))


def _of_ps(pid: int) -> Memory:
    rss = _output(["ps", "-o", "rss=", "-p", str(pid)]).strip()
    return Memory(rss=int(rss) << 10 if rss.isdigit() else None)


def _output(command: list[str]) -> str:
    """What a command of the system prints; nothing where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
