"""What runs in another process: how it ended, and that no signal leaves it behind."""

import os
import signal
import subprocess
import sys
import time

import pytest

from sdgm_edge import child

POSIX = pytest.mark.skipif(os.name == "nt", reason="signals of another kind")


def test_what_it_wrote_and_ended_with():
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    done = child.run(["-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_one_that_was_interrupted_interrupts():
    with pytest.raises(KeyboardInterrupt):
        child.run(["-c", "import os; os._exit(130)"])


@POSIX
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_no_signal_leaves_it_behind(tmp_path, number):
    """The process below runs another, and that one a third; only the first is ended."""
    pid = tmp_path / "pid"
    inner = f"import os, time; open({str(pid)!r}, 'w').write(f'{{os.getpid()}} '); time.sleep(600)"
    run = "from sdgm_edge import child; child.run(['-c', {!r}], stdout=-1)"
    outer = subprocess.Popen(
        [sys.executable, "-c", run.format(run.format(inner))],
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a shell's background
    )
    while not pid.exists() or not pid.read_text().endswith(" "):
        time.sleep(0.02)
        assert outer.poll() is None, outer.stderr.read().decode()
    outer.send_signal(number)
    errors = outer.communicate()[1].decode()
    assert errors.rstrip().endswith("KeyboardInterrupt")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_what_a_signal_does_is_as_before():
    before = signal.getsignal(signal.SIGTERM)
    child.run(["-c", ""])
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_process_ends_as_its_parent_is_told():
    code = """
from sdgm_edge import child
from sdgm_edge.runtime import RunError
with child.ending():
    raise {}
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    for reason, line in (("RunError('no run')", "no run"), ("OSError(28, 'No room')", "[Errno 28] No room")):
        done = child.run(["-c", code.format(reason)], **pipes)
        assert (done.returncode, done.stderr) == (1, f"error: {line}\n")
    with pytest.raises(KeyboardInterrupt):
        child.run(["-c", code.format("KeyboardInterrupt")], **pipes)
