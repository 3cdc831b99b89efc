"""Graphs of the baselines, one file for each mixer, so that inference is compared in one runtime."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch

from sdgm_edge.models import MixerModel, ModelConfig, block_sizes

from ..builder import Array
from ..graph import weights_of
from ..matrices import Plan, as_held
from . import fnet, gated_recurrence, gfnet, gpt2, linformer, lmwt, lstm, nplm, pom, transformer_xl
from .mixer import RING, MixerGraph
from .shell import CHUNK, build_graph, plan_of

GRAPHS: dict[str, MixerGraph] = {
    "gpt2": gpt2,
    "transformer-xl": transformer_xl,
    "linformer": linformer,
    "fnet": fnet,
    "gated-recurrence": gated_recurrence,
    "lstm": lstm,
    "nplm": nplm,
    "gfnet": gfnet,
    "lmwt": lmwt,
    "pom": pom,
}
"""By the name that is the value of `ModelConfig.layer`."""
CHUNKS = {"fnet": 16}
"""Of layers whose tokens take much memory in a call: each has tables as long as its context."""


def build(config: ModelConfig, weights: Mapping[str, Array], plan: Plan) -> bytes:
    """Return the bytes of a graph; the same model and plan give the same bytes."""
    model = build_graph(config, GRAPHS[config.layer], weights, plan)
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return data


def chunk_of(config: ModelConfig) -> int:
    """Return how many tokens one call takes: no more than a ring has places, so that each has its own."""
    sizes = (str(size) for shape in GRAPHS[config.layer].pieces(config).values() for size in shape)
    rings = [int(size.partition(":")[2]) for size in sizes if size.startswith(RING)]
    return min([CHUNKS.get(config.layer, CHUNK), *rings])


def block_of(config: ModelConfig) -> int:
    """Return of which number no call may cross a multiple; 0 where any may be crossed."""
    return block_sizes(config.window)[1] if config.layer == "linformer" else 0


def model_as_held(model: MixerModel, plan: Plan) -> MixerModel:
    """Return a copy of the model whose matrices are rounded as the plan's variant holds them."""
    held = MixerModel(model.config)
    weights = {name: as_held(w, plan.get(name, "fp32")) for name, w in weights_of(model).items()}
    held.load_state_dict({name: torch.from_numpy(weight.copy()) for name, weight in weights.items()})
    return held.eval()


__all__ = ["GRAPHS", "MixerGraph", "block_of", "build", "chunk_of", "model_as_held", "plan_of"]
