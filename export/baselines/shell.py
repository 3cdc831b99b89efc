"""A baseline as one ONNX graph: one sequence, tokens in, logits out, and every piece of its state by name.

    ids (1, T), position (1), layers.0.keys (…), …, start ()
        → logits (1, T − start, V), next_position (1), next_layers.0.keys (…), …

A piece X comes back as `next_X`, of the same shape: whoever runs the graph may keep two buffers and swap
them. One that has the dimension `capacity` is a *cache*: as long as the caller likes, used up to `position`,
and written only beyond that; `ring:128` is that of a *ring* of so many places, read before it is written. One
buffer may be bound as X and as `next_X` of these, and nothing is copied. All zeros is the start of a text.

`position` counts the tokens so far. A model that reads in windows is fed from zeros again where a window
ends, all but `copy.…`, the pointer's; fed further, it goes on with its positions from the first, so that what
a longer window would cost can be measured. A call takes up to a chunk of tokens, and does not cross a
multiple of the mixer's block.

Shapes: T time, D width, V vocabulary, L window.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from sdgm_edge.models import MIXERS, ModelConfig

from ..builder import IR_VERSION, Array, Builder
from ..head import logits
from ..layers import NORM_EPSILON, Trace, asked, gated_unit, norm
from ..matrices import Plan, Precision
from ..variants import Variant
from .mixer import POSITION, MixerGraph, Pieces, piece, times

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
CHUNK = 128
"""Most tokens that any call takes."""
MATRICES = {"distance", "input", "key_value", "output", "query", "rise", "select", "strike"} | {
    "expand", "contract", "key", "merge"
}  # fmt: skip
"""Besides the embedding, what has one of these names is a matrix whose precision a plan decides."""


def plan_of(variant: Variant, weights: Mapping[str, Array]) -> dict[str, Precision]:
    """Return the precision of every matrix in a variant."""
    matrices = (name for name in weights if name.split(".")[-2:-1] == ["lstm"] and weights[name].ndim == 2)
    named = (name for name in weights if name.endswith(".weight") and name.split(".")[-2] in MATRICES)
    return variant.plan(weights, [*matrices, *named])


def pieces_of(config: ModelConfig, mixer: MixerGraph) -> Pieces:
    """Return names and shapes of all that the graph of a model remembers, but the position."""
    own = {piece(i, name): shape for i in range(config.num_layers)
           for name, shape in mixer.pieces(config).items()}  # fmt: skip
    return own | {name: (1, *shape) for name, shape in config.state_layout if name.startswith("copy.")}


def build_graph(config: ModelConfig, mixer: MixerGraph, weights: Mapping[str, Array], plan: Plan) -> ir.Model:
    """Return the graph of a baseline whose matrices have the precisions of the plan."""
    g = Builder()
    ids = g.input("ids", INT64, (1, "time"))
    start = g.input("start", INT64, (), np.array(0, np.int64))
    pieces = pieces_of(config, mixer)
    state = {POSITION: g.input(POSITION, INT64, (1,))}
    state |= {name: g.input(name, FLOAT, shape) for name, shape in pieces.items()}
    t = Trace(
        g=g,
        config=config,
        weights=weights,
        plan=plan,
        chunk=CHUNK,
        ids=ids,
        start=start,
        state=state,
    )
    with g.at("embedding"):
        embedding = t.matrix("embedding.weight", rows=True)
        x = embedding.rows(ids)
        if MIXERS[config.layer].windowed:
            row = g.op("Mod", times(t), np.int64(config.window))
            x = g.op("Add", x, g.op("Gather", t.weight("positions.weight"), row, axis=0))
    for i in range(config.num_layers):
        with g.at(f"layers.{i}"):
            x = _block(t, mixer, i, x)
    with g.at("head"):
        said = logits(t, embedding, _norm(t, "norm", x))
    g.output("logits", said, FLOAT, (1, "asked", config.vocab_size))
    with g.at("state"):
        after = g.op("Add", state[POSITION], t.num_steps)
    g.output(f"next_{POSITION}", after, INT64, (1,))
    for name, shape in pieces.items():
        g.output(f"next_{name}", t.state[name], FLOAT, shape)
    return ir.Model(g.graph(config.layer), ir_version=IR_VERSION, producer_name="sdgm-edge")


def _block(t: Trace, mixer: MixerGraph, i: int, x: ir.Value) -> ir.Value:
    """Return the stream after a block.

    The last one's unit runs where logits are asked for, or everywhere for a pointer, as in an SDGM.
    """
    g, weights = t.g, f"blocks.{i}"
    with g.at("mixer"):
        mixed = mixer.mix(t, i, _norm(t, f"{weights}.norm", x))
    x = g.op("Add", x, mixed)
    if i == t.config.num_layers - 1 and not t.config.copy_window:
        with g.at("asked"):
            x = asked(t, x)
    if not t.config.glu_width:
        return x
    with g.at("unit"):
        source = _norm(t, f"{weights}.unit_norm", x)
        hidden = _perceptron(t, i, source) if t.config.layer == "gpt2" else gated_unit(t, i, source)
        return g.op("Add", x, hidden)


def _norm(t: Trace, name: str, x: ir.Value) -> ir.Value:
    if f"{name}.bias" not in t.weights:
        return norm(t, name, x)
    scale, bias = t.weight(f"{name}.weight"), t.weight(f"{name}.bias")
    return t.g.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=NORM_EPSILON)


def _perceptron(t: Trace, i: int, x: ir.Value) -> ir.Value:
    """W_2 gelu(W_1 x)."""
    g, weights = t.g, f"blocks.{i}.unit"
    with g.at("expand"):
        x = t.matrix(f"{weights}.expand.weight").product(x, t.weights[f"{weights}.expand.bias"])
    x = g.op("Gelu", x, approximate="tanh")
    with g.at("contract"):
        return t.matrix(f"{weights}.contract.weight").product(x, t.weights[f"{weights}.contract.bias"])
