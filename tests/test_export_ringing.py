"""How ringing atoms turn in a graph; that they ring as the model's do is tested with whole graphs."""

import onnx
import pytest
import torch
import trained
from sdgm_edge.export.gates import check_parity
from sdgm_edge.export.graph import weights_of
from sdgm_edge.export.ringing import MOST_ON_CUDA
from sdgm_edge.export.variants import VARIANTS, build, bundle_config, model_as_held

from sdgm_edge.models import SDGM, ModelConfig
from sdgm_edge.runtime import Engine


@pytest.mark.parametrize("bits", VARIANTS)
@pytest.mark.parametrize("num_atoms", [MOST_ON_CUDA, MOST_ON_CUDA + 1])
def test_many_atoms_turn_by_what_gpus_can_do_in_the_variant_for_them(bits, num_atoms):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=trained.VOCAB, num_layers=1, width=8, num_atoms=num_atoms)
    model, variant = SDGM(config).eval(), VARIANTS[bits]
    weights = weights_of(model)
    plan = variant.plan(weights)
    graph = build(config, weights, plan)
    found = set(trained.operators(onnx.load_from_string(graph).graph))
    assert ("RotaryEmbedding" in found) == (num_atoms <= MOST_ON_CUDA or variant.name != "fp16")
    engine = Engine(graph, bundle_config(config), variant.file, providers="cpu")
    check_parity(variant, model_as_held(model, plan), engine, 64)
