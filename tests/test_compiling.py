"""What `torch.compile` is kept out of, and that nothing loads the compiler before it is asked for."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from sdgm_edge.config import load_config
from sdgm_edge.losses import Objective
from sdgm_edge.models import build_model, uncompiled


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


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch itself
@pytest.mark.parametrize(
    ("preset", "model"),
    [("edge-nano", {}), ("edge-nano", {"copy_window": 8, "copy_context": 2}), ("paper", {"copy_window": 8})],
)
def test_a_step_of_training_is_the_same_compiled(preset, model):
    sizes = {"width": 16, "num_atoms": 8, "window": 16}
    run = load_config(preset=preset, model={**sizes, **model}, training={"num_components": 3})
    torch.manual_seed(0)
    objective = Objective(build_model(dataclasses.replace(run.model, vocab_size=40)), run.loss, 3).train()
    ids, state = torch.randint(40, (4, 17)), objective.model.initial_state(4)

    def step():
        torch.manual_seed(1)
        objective.zero_grad()
        terms, _ = objective(ids[:, :-1], ids[:, 1:], state)
        terms.loss.backward()
        return [terms.loss.detach(), *(p.grad.clone() for p in objective.parameters() if p.grad is not None)]

    plain = step()
    objective.compile(backend="aot_eager")
    torch.testing.assert_close(step(), plain, atol=1e-5, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"], "something was compiled"


def test_importing_does_not_load_the_compiler():
    code = "import sys, sdgm_edge.training, sdgm_edge.export; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
