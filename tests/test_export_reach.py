import copy

import torch
import trained
from sdgm_edge.export.gates import check_parity
from sdgm_edge.export.graph import weights_of
from sdgm_edge.export.reach import MOST_UNEVEN, find_reach
from sdgm_edge.export.screening import hidden_vectors, written
from sdgm_edge.export.variants import VARIANTS, build, bundle_config, model_as_held

from sdgm_edge.runtime import Engine


def met(model, linear):
    """What a product is given while the model reads what it writes."""
    seen = []
    hook = linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    with torch.no_grad():
        model(written(model).T)
    hook.remove()
    return seen[-1]


def test_it_is_the_largest_number_that_a_matrix_meets():
    model = trained.model("ringing with pointer")
    found = find_reach(model)
    assert found == find_reach(model)
    assert found["pointer.key.weight"] == float(met(model, model.pointer.key).abs().max())
    assert found["embedding.weight"] == float(hidden_vectors(model).abs().max())
    assert "pointer.gate.weight" not in found, "no matrix"
    assert not model.pointer.key._forward_pre_hooks, "nothing is left behind"


def test_a_matrix_that_meets_loud_tokens_and_quiet_ones_has_none():
    name = "blocks.0.atoms.strike.weight"
    assert name in find_reach(trained.model("ringing, bare"))
    model = copy.deepcopy(trained.model("ringing, bare"))
    with torch.no_grad():
        model.embedding.weight[0] *= 100  # the token that begins a text, and is not said again
        model.bias[0] = -1e5
    loud = met(model, model.blocks[0].atoms.strike).abs().amax(-1)
    assert loud.max() > MOST_UNEVEN * loud.median()
    assert name not in find_reach(model)


def test_fixed_steps_take_fewer_nodes_and_compute_what_torch_computes():
    model = trained.model("ringing with pointer")
    weights = weights_of(model)
    plan = VARIANTS[8].by_rows().plan(weights)
    by_rows, fixed = (build(model.config, weights, plan, reach=reach) for reach in (None, find_reach(model)))
    assert fixed.count(b"ReduceMax") < by_rows.count(b"ReduceMax")
    engine = Engine(fixed, bundle_config(model.config), "graph", providers="cpu")
    check_parity(VARIANTS[8], model_as_held(model, plan), engine, steps=96)
