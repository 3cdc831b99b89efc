"""Measuring a bundle in real child processes, and the sources that it asks."""

import json
import os
import shutil
import subprocess
import sys

import psutil
import pytest
import tiny
from sdgm_edge.runtime.stages import STAGES

from sdgm_edge.runtime import (
    BundleError,
    MeasureError,
    Memory,
    ParameterError,
    encode_json,
    measure_footprint,
    measure_memory,
    memory,
    read_memory,
)
from sdgm_edge.runtime import footprint as module

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
POSIX = pytest.mark.skipif(os.name == "nt", reason="scripts stand in for programs")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("footprint") / "tiny")


@pytest.fixture(scope="module")
def measured(bundle):
    return measure_footprint(bundle, tokens=4, repeats=3)


def script(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


# The figures


def test_every_variant_is_there_with_its_sizes(bundle, measured):
    assert [v.variant for v in measured.variants] == ["fp32", "int8"]
    for v in measured.variants:
        assert (
            v.file == (bundle / ("model.onnx" if v.variant == "fp32" else "model_int8.onnx")).stat().st_size
        )
        assert (v.provider, v.weights, v.state, v.gpu) == ("cpu", v.file, 4 * tiny.STATE, None)
        assert tuple(v.stages) == STAGES
    assert (measured.name, measured.tokens, measured.repeats) == ("tiny", 4, 3)
    assert measured.prompt_tokens > 0
    assert measured.machine["cores"] == os.cpu_count()


@LINUX
def test_memory_adds_up_and_is_all_told(measured):
    for v in measured.variants:
        last = v.stages["after_tokens"]
        assert v.runtime + v.weights + v.state + v.unaccounted == last.rss
        assert v.runtime == v.stages["imports"].rss
        assert v.peak == last.peak
        assert v.not_told == ()
        for m in v.stages.values():
            assert m.anonymous + m.file_backed == m.rss <= m.peak
            assert 0 < m.private <= m.rss
        peaks = [m.peak for m in v.stages.values()]
        assert peaks == sorted(peaks)
        # Libraries are shared with the first process, heaps are not.
        assert 0.9 * last.anonymous < v.second_process < last.rss


@LINUX
def test_memory_alone_is_that_of_one_process(bundle):
    stages = measure_memory(bundle, "int8", tokens=2)
    assert tuple(stages) == STAGES
    sizes = [memory.rss for memory in stages.values()]
    assert sizes[0] < sizes[1] < sizes[-1]


def test_times_are_of_whole_processes(measured):
    for v in measured.variants:
        seconds = v.seconds
        assert 0 < seconds.fastest <= seconds.first_token <= seconds.slowest
        assert seconds.first_token_cpu > 0
        assert seconds.imports > 0
        assert seconds.load > 0


def test_a_text_does_not_end_before_the_tokens_that_are_asked_for(tmp_path):
    ends = {"begin_token": 0, "end_tokens": list(range(tiny.VOCAB - 1)), "sampling": {}}
    path = tiny.write(tmp_path / "ends", {"generation_config": encode_json(ends)})
    asked = {"path": str(path), "variant": "fp32", "providers": "cpu", "threads": None, "prompt": "Once"}
    command = [sys.executable, "-c", module._CODE, json.dumps({**asked, "tokens": 5, "pauses": False})]
    lines = subprocess.run(command, capture_output=True, check=True).stdout.splitlines()
    assert [json.loads(line).get("tokens") for line in lines] == [None, None, None, 1, 5]


# The kernel's own account


RUSAGE = """#!{python}
import os, resource, sys
pid = os.fork()
if pid == 0:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
code = os.waitpid(pid, 0)[1]
with open({log!r}, "a") as log:
    log.write(f"{{resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}}\\n")
sys.exit(os.waitstatus_to_exitcode(code))
"""
TIME = """#!/bin/sh
exec {time} -a -o {log} -f %M {python} "$@"
"""


@LINUX
@pytest.mark.parametrize("account", ["getrusage", "time"])
def test_the_peak_agrees_with_the_kernel(account, bundle, tmp_path, monkeypatch):
    log, python = tmp_path / "log", sys.executable
    if account == "time" and not shutil.which("time"):
        pytest.skip("there is no program `time` here")
    text = {"getrusage": RUSAGE, "time": TIME}[account]
    wrapper = script(tmp_path / "python", text.format(python=python, log=str(log), time=shutil.which("time")))
    monkeypatch.setattr(sys, "executable", wrapper)
    variant = measure_footprint(bundle, ["int8"], tokens=200, repeats=1).variants[0]
    peaks = [1024 * int(line) for line in log.read_text().split()]
    assert len(peaks) == 3  # the second process, the first one, a cold one
    assert variant.peak == pytest.approx(peaks[1], rel=0.05)


# What a system tells


def test_this_process():
    told, real = read_memory(os.getpid()), psutil.Process().memory_info()
    assert told.rss == pytest.approx(real.rss, rel=0.05)


@LINUX
def test_a_kernel_without_rollup_tells_no_private_memory(tmp_path):
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t  30 kB\nVmRSS:\t  20 kB\nRssAnon:\t  5 kB\n")
    told = memory._of_proc(tmp_path)
    assert told == Memory(rss=20480, anonymous=5120, file_backed=15360, private=None, peak=30720)


class Windows:
    AccessDenied = psutil.AccessDenied

    class Process:
        def __init__(self, pid):
            self.pid = pid

        def memory_info(self):
            return type("info", (), {"rss": 10, "peak_wset": 12})

        def memory_full_info(self):
            return type("info", (), {"uss": 7})


class Mac(Windows):
    class Process(Windows.Process):
        def memory_info(self):
            return type("info", (), {"rss": 10})

        def memory_full_info(self):
            raise psutil.AccessDenied(self.pid)


def test_other_systems_are_asked_through_psutil(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "psutil", Windows)
    assert read_memory(1) == Memory(rss=10, private=7, peak=12)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setitem(sys.modules, "psutil", Mac)
    assert read_memory(1) == Memory(rss=10)
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.setenv("PATH", "")
    assert read_memory(1) == Memory()


@POSIX
def test_ps_tells_the_rest(monkeypatch, tmp_path):
    script(tmp_path / "ps", '#!/bin/sh\n[ "$*" = "-o rss= -p 7" ] && echo "  12"\n')
    monkeypatch.setenv("PATH", f"{tmp_path}")
    assert memory._of_ps(7) == Memory(rss=12288)
    assert memory._of_ps(8) == Memory()


@POSIX
def test_nvidia_smi_tells_the_memory_of_a_process(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", f"{tmp_path}")
    assert memory.gpu_memory(7) is None
    script(tmp_path / "nvidia-smi", "#!/bin/sh\necho '7, 300'\necho '8, [N/A]'\necho '7, 12'\n")
    assert memory.gpu_memory(7) == 312 << 20
    assert memory.gpu_memory(8) is None
    assert memory.gpu_memory(9) is None


def test_what_is_not_told_is_said(bundle, monkeypatch):
    monkeypatch.setattr(module, "read_memory", lambda pid: Memory(rss=5_000_000))
    variant = measure_footprint(bundle, ["fp32"], tokens=1, repeats=1).variants[0]
    assert variant.not_told == ("anonymous", "file_backed", "private", "peak", "second_process")
    assert (variant.peak, variant.second_process) == (None, None)
    assert variant.unaccounted == -variant.file - variant.state


# What goes wrong


ONE_STAGE = """echo '{"stage": "interpreter", "pid": '$$', "seconds": 0, "peak": null}'; read go; exit 5"""


def test_what_a_child_is_refused_is_the_same_error_here(tmp_path):
    broken = tiny.write(tmp_path / "broken", {"model_int8": b"no graph"})
    with pytest.raises(BundleError, match=r"model_int8\.onnx: ONNX Runtime refuses the graph"):
        measure_footprint(broken, ["int8"])


@POSIX
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("echo one >&2; echo two >&2; exit 3", "after its stage start with code 3: two; free memory"),
        ("kill -9 $$", "after its stage start with code -9: it said nothing"),
        (ONE_STAGE, "after its stage interpreter with code 5: it said nothing"),
    ],
)
def test_a_child_that_dies_is_told_with_its_last_words(bundle, tmp_path, monkeypatch, text, told):
    monkeypatch.setattr(sys, "executable", script(tmp_path / "python", f"#!/bin/sh\n{text}\n"))
    with pytest.raises(MeasureError, match=told):
        measure_footprint(bundle, tokens=1, repeats=1)


@pytest.mark.parametrize(
    "wrong", [{"tokens": 0}, {"repeats": 0}, {"tokens": 1.5}, {"threads": 0}, {"prompt": ""}]
)
def test_parameters_have_a_range(bundle, wrong):
    with pytest.raises(ParameterError, match=f"{next(iter(wrong))}: expected"):
        measure_footprint(bundle, ["fp32"], **wrong)


@pytest.mark.parametrize("tokens", [0, -1, 1.5, True])
def test_memory_is_measured_of_one_token_or_more(bundle, tokens):
    with pytest.raises(ParameterError, match=f"tokens: expected a whole number from 1, got {tokens}"):
        measure_memory(bundle, tokens=tokens)


def test_unknown_variants_are_named(bundle):
    with pytest.raises(BundleError, match="no such variant: expected fp32 or int8, got 'q4'"):
        measure_footprint(bundle, ["q4"])


def test_a_chattering_library_is_not_misunderstood(bundle, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("print('hello', flush=True)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert measure_footprint(bundle, ["fp32"], tokens=1, repeats=1).variants[0].provider == "cpu"


def test_the_folder_that_it_is_run_in_is_no_place_for_modules(bundle, tmp_path):
    (tmp_path / "numpy.py").write_text("raise SystemExit('the wrong numpy')\n")
    code = "from sdgm_edge.runtime import measure_footprint as m; m({!r}, ['fp32'], tokens=1, repeats=1)"
    subprocess.run([sys.executable, "-P", "-c", code.format(str(bundle))], cwd=tmp_path, check=True)


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({"model name": "AMD EPYC", "flags": "fma avx2 avx512f avx512_vnni"}, "AMD EPYC with avx512_vnni"),
        ({"model name": "AMD EPYC", "flags": "fma avx2"}, "AMD EPYC with avx2"),
        ({"model name": "ARMv8", "Features": "fp asimd asimddp"}, "ARMv8 with asimddp"),
        ({"model name": "of another kind"}, "of another kind"),
    ],
)
def test_a_machine_is_told_with_what_its_kernels_are_chosen_by(monkeypatch, found, told):
    monkeypatch.setattr(module, "cpu_identity", lambda: found)
    assert module.machine()["cpu"] == told
