import importlib
import logging
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tiny
from sdgm_edge.runtime.providers import CPU, CUDA, onnxruntime, open_graph

from sdgm_edge.runtime import BundleError, Generator, ParameterError, ProviderError
from sdgm_edge.runtime import providers as module

GRAPH = tiny.graph().SerializeToString()


class FakeSession:
    """A session that has the providers that this machine is said to have, whatever it is asked for."""

    def __init__(self, has):
        self.has = has

    def get_providers(self):
        return self.has

    def disable_fallback(self):
        pass


@pytest.fixture
def machine(monkeypatch):
    """Pretend that ONNX Runtime lists `available`, and that sessions get `has` (or fail with it)."""

    def pretend(available, has):
        def make(graph, options, providers, provider_options, **kwargs):
            if isinstance(has, Exception) and CUDA in providers:
                raise has
            told = dict(zip(providers, provider_options, strict=True))
            assert told.get(CUDA, {"use_tf32": "0"}) == {"use_tf32": "0"}, "float32 is to be float32"
            return FakeSession(
                [p for p in providers if p in (CPU, *([] if isinstance(has, Exception) else has))]
            )

        real = onnxruntime()
        fake = types.SimpleNamespace(
            InferenceSession=make,
            SessionOptions=real.SessionOptions,
            get_available_providers=lambda: available,
            get_all_providers=real.get_all_providers,
        )
        monkeypatch.setattr(module, "onnxruntime", lambda: fake)

    return pretend


def test_telemetry_is_off_before_the_import_in_a_fresh_process():
    code = """
import builtins, os, sys
os.environ.pop("ORT_DISABLE_TELEMETRY", None)
seen = []
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            seen.append(os.environ.get("ORT_DISABLE_TELEMETRY"))
sys.meta_path.insert(0, Finder())
import sdgm_edge.runtime
from sdgm_edge.runtime import read_bundle, Generator
assert "onnxruntime" not in sys.modules and not seen, "imported too early"
from sdgm_edge.runtime.providers import onnxruntime
onnxruntime()
assert seen == ["1"], seen
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_it_is_imported_in_one_place_alone():
    sources = {path.name: path.read_text() for path in Path(module.__file__).parent.glob("*.py")}
    direct = re.compile(
        r"^\s*(import onnxruntime|from onnxruntime)|import_module\(.onnxruntime", re.MULTILINE
    )
    assert [name for name, source in sources.items() if direct.search(source)] == ["providers.py"]


def test_a_missing_onnxruntime_gives_the_line_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    onnxruntime.cache_clear()
    try:
        with pytest.raises(
            ProviderError, match=r"^onnxruntime is not installed; type: pip install 'sdgm-edge\[cpu\]'$"
        ):
            open_graph(GRAPH, "m")
    finally:
        onnxruntime.cache_clear()


def test_ctrl_c_while_it_is_imported_is_ctrl_c(monkeypatch):
    def interrupted(name):
        raise ImportError("initialization failed") from KeyboardInterrupt()

    monkeypatch.setattr(importlib, "import_module", interrupted)
    onnxruntime.cache_clear()
    try:
        with pytest.raises(KeyboardInterrupt):
            onnxruntime()
    finally:
        onnxruntime.cache_clear()


def test_a_broken_onnxruntime_says_why(monkeypatch):
    def broken(name):
        raise ImportError("libfoo.so: cannot open\nshared object")

    monkeypatch.setattr(importlib, "import_module", broken)
    onnxruntime.cache_clear()
    try:
        with pytest.raises(
            ProviderError, match=r"cannot be loaded: libfoo\.so: cannot open shared object; type: pip"
        ):
            onnxruntime()
    finally:
        onnxruntime.cache_clear()


def test_the_cpu_runs_with_one_thread_and_planned_memory():
    opened = open_graph(GRAPH, "m", providers="cpu")
    assert (opened.provider, opened.reason) == ("cpu", "asked for")
    options = opened.session.get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.enable_cpu_mem_arena
    assert options.enable_mem_pattern
    assert open_graph(GRAPH, "m", threads=2).session.get_session_options().intra_op_num_threads == 2


@pytest.mark.parametrize("spelling", ["cpu", ["cpu"], CPU, [CPU], "CPU", ("cpu",)])
def test_providers_have_short_names_and_long_ones(spelling):
    assert open_graph(GRAPH, "m", providers=spelling).provider == "cpu"


@pytest.mark.parametrize("wrong", ["gpu", [], ["cpu", 3], "", "auto "])
def test_unknown_providers_are_named(wrong):
    with pytest.raises(ParameterError, match="providers: expected"):
        open_graph(GRAPH, "m", providers=wrong)


@pytest.mark.parametrize("wrong", [0, -1, 1.0, "2", True, 5000])
def test_threads_have_a_range(wrong):
    with pytest.raises(ParameterError, match="threads: expected 1 to 1024"):
        open_graph(GRAPH, "m", threads=wrong)


def test_auto_takes_cuda_where_it_starts(machine, caplog):
    machine([CUDA, CPU], [CUDA])
    with caplog.at_level(logging.INFO):
        assert open_graph(GRAPH, "m").provider == "cuda"
    assert "running on cuda: CUDA starts here" in caplog.text


@pytest.mark.parametrize(
    ("has", "why"),
    [
        ([], "CUDA could not be started"),
        (RuntimeError("no\n driver"), "CUDA could not be started: no driver"),
    ],
)
def test_auto_takes_the_cpu_where_cuda_is_listed_and_not_there_and_says_why(machine, caplog, capfd, has, why):
    machine([CUDA, CPU], has)
    with caplog.at_level(logging.INFO):
        opened = open_graph(GRAPH, "m")
    assert (opened.provider, opened.reason) == ("cpu", why)
    assert f"running on cpu: {why}" in caplog.text
    assert capfd.readouterr() == ("", "")


def test_auto_without_the_gpu_package_says_so(machine):
    machine([CPU], [])
    assert open_graph(GRAPH, "m").reason == "onnxruntime without GPU support is installed"


@pytest.mark.parametrize(
    ("available", "remedy"),
    [
        ([CPU], r"got cpu; type: .*sdgm-edge\[gpu\]"),
        ([CUDA, CPU], "got one that does not start; check the NVIDIA"),
    ],
)
def test_cuda_that_was_asked_for_and_is_not_there_is_an_error(machine, available, remedy):
    machine(available, [])
    for providers in ("cuda", ["cuda", "cpu"]):
        with pytest.raises(ProviderError, match=rf"provider cuda is not there: .*{remedy}.*providers='cpu'"):
            open_graph(GRAPH, "m", providers=providers)


def test_a_graph_that_is_refused_names_the_bundle_and_says_nothing_on_stderr(capfd):
    with pytest.raises(BundleError, match=r"^m: ONNX Runtime refuses the graph: .*export the bundle again$"):
        open_graph(b"no graph", "m")
    assert capfd.readouterr() == ("", "")


def test_the_generator_tells_its_provider(tmp_path):
    gen = Generator.load(tiny.write(tmp_path / "tiny"), providers="auto", threads=1)
    assert gen.provider in ("cpu", "cuda")
