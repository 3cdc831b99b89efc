"""What `torch.compile` is kept out of, and that nothing loads the compiler before it is asked for."""

import subprocess
import sys

import pytest
import torch

from sdgm_edge.models import uncompiled


@pytest.mark.parametrize("called_first", [False, True])
def test_a_function_is_run_and_not_compiled(called_first):
    traced = []

    @uncompiled
    def loop(x):
        traced.append(torch.compiler.is_compiling())
        for _ in range(3):
            x = 2 * x + 1
        return x

    def around(x):
        return loop(x.cos()).sin()

    if called_first:
        loop(torch.ones(1))
    compiled = torch.compile(around, backend="eager")
    shapes = [(2,) * num_dims for num_dims in range(1, 13)]  # more than are compiled before torch gives up
    for shape in shapes:
        x = torch.linspace(0, 1, 2 ** len(shape)).reshape(shape)
        assert torch.equal(compiled(x), around(x))
    assert traced == [False] * (2 * len(shapes) + called_first)


def test_what_surrounds_a_function_is_compiled():
    compiled = []

    def backend(module, inputs):
        compiled.append([node.target for node in module.graph.nodes if node.op.startswith("call")])
        return module.forward

    @uncompiled
    def loop(x):
        return x.exp()

    torch.compile(lambda x: loop(x.cos()).sin(), backend=backend)(torch.ones(3))
    assert compiled == [["cos"], ["sin"]]


def test_importing_does_not_load_the_compiler():
    code = "import sys, sdgm_edge.training, sdgm_edge.export; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
