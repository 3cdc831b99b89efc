"""Graphs of the baselines, one file for each mixer, so that inference is compared in one runtime."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch

from sdgm_edge.models import MixerModel, ModelConfig

from ..builder import Array
from ..graph import weights_of
from ..matrices import Plan, as_held
from . import gated_recurrence, gpt2, lstm
from .mixer import MixerGraph
from .shell import CHUNK, block_of, build_graph, plan_of

GRAPHS: dict[str, MixerGraph] = {
    "gpt2": gpt2,
    "gated-recurrence": gated_recurrence,
    "lstm": lstm,
}
"""By the name that is the value of `ModelConfig.layer`."""


def build(config: ModelConfig, weights: Mapping[str, Array], plan: Plan) -> bytes:
    """Return the bytes of a graph; the same model and plan give the same bytes."""
    model = build_graph(config, GRAPHS[config.layer], weights, plan)
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return data


def model_as_held(model: MixerModel, plan: Plan) -> MixerModel:
    """Return a copy of the model whose matrices are rounded as the plan's variant holds them."""
    held = MixerModel(model.config)
    weights = {name: as_held(w, plan.get(name, "fp32")) for name, w in weights_of(model).items()}
    held.load_state_dict({name: torch.from_numpy(weight.copy()) for name, weight in weights.items()})
    return held.eval()


__all__ = ["CHUNK", "GRAPHS", "MixerGraph", "block_of", "build", "model_as_held", "plan_of"]
