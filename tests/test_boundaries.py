"""The runtime stands alone: what it imports, asked of a fresh interpreter."""

import subprocess
import sys
from pathlib import Path

import pytest

import sdgm_edge.runtime

FORBIDDEN = ("torch", "onnx", "onnx_ir", "sklearn", "scipy", "pandas", "typer", "rich", "matplotlib")
ALLOWED = {"numpy", "onnxruntime", "tokenizers", "sdgm_edge"}


def modules(code):
    """Top-level modules beside the standard library's that are imported after `code` ran by itself."""
    code += "\nimport sys\nprint(*sorted(m for m in sys.modules if sys.modules[m] is not None))"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    names = result.stdout.split()
    top = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
    return top, names


def started():
    return modules("")[0]


def test_all_of_the_runtime_imports_what_is_allowed_and_no_more():
    code = "import sdgm_edge.runtime as r\nfor name in r.__all__: getattr(r, name)\n"
    code += "from sdgm_edge.runtime.providers import onnxruntime\nonnxruntime()"
    top, names = modules(code)
    assert not top & set(FORBIDDEN)
    unknown = {name for name in top - started() - ALLOWED if not name.startswith("_")}
    assert unknown <= {"cython_runtime"}, "of numpy's own extension modules"
    ours = {n for n in names if n.startswith("sdgm_edge")}
    assert {n for n in ours if not n.startswith("sdgm_edge.runtime")} == {"sdgm_edge"}


def test_onnxruntime_is_imported_with_the_first_graph_and_not_before():
    top, _ = modules("import sdgm_edge.runtime as r\nfor name in r.__all__: getattr(r, name)")
    assert "onnxruntime" not in top


def test_errors_alone_cost_nothing():
    top, _ = modules("from sdgm_edge.runtime import SdgmError, BundleError")
    assert not top & {"numpy", "onnxruntime", "tokenizers"}


def test_a_first_token_waits_for_nothing_that_it_does_not_need():
    golden = Path(__file__).parent / "data" / "golden.sdgm"
    code = "from sdgm_edge.runtime import Generator\n"
    code += f"Generator.load({str(golden)!r}, providers='cpu').generate('Once', max_new_tokens=1, seed=1)"
    _, names = modules(code)
    assert "tokenizers" in names
    assert not {"logging", "numpy.random", "sdgm_edge.runtime.footprint"} & set(names)


@pytest.mark.parametrize("name", sdgm_edge.runtime.__all__)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(sdgm_edge.runtime, name)
    assert value.__doc__, f"{name} has no docstring"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Generater'"):
        _ = sdgm_edge.runtime.Generater
