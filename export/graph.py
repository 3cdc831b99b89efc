"""An SDGM as one ONNX graph: any number of sequences, up to a chunk of tokens, state in and state out.

    ids (B, T), state (B, S), start (), blend (), drawn (B or 1, 1, M)
        → logits (B, T − start, V), next_state (B, S), mixing (B, T, M)

The nodes are laid out by hand from the model's weights, with everything constant folded on the way; they bear
the paths of the model's parts. A plan says in which precision each matrix is held.

Shapes: B batch, T time, D width, S state, M mixing vector, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from sdgm_edge.models import LanguageModel, ModelConfig

from . import clock, ringing
from .builder import IR_VERSION, Array, Builder, ints
from .head import logits
from .layers import Trace, asked, blend, gated_unit, norm
from .matrices import Plan
from .screening import Screen

MATRICES = {"embedding", "strike", "synthesis", "encoder", "expand", "contract", "query", "key", "merge"}
FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def weights_of(model: LanguageModel) -> dict[str, Array]:
    """Return the model's weights by name, in float32."""
    return {name: value.detach().float().cpu().numpy() for name, value in model.state_dict().items()}


def matrix_names(weights: Mapping[str, Array]) -> list[str]:
    """Return the names of the weights whose precision a plan decides."""
    return [name for name in weights if name.endswith(".weight") and name.split(".")[-2] in MATRICES]


def build_graph(
    config: ModelConfig,
    weights: Mapping[str, Array],
    plan: Plan,
    chunk: int,
    screen: Screen | None = None,
    reach: Mapping[str, float] | None = None,
) -> ir.Model:
    """Return the graph of a model whose matrices are held as planned, its head screened or whole.

    `reach` tells, of some matrices, the largest number that is expected in what they are multiplied with.
    """
    g = Builder()
    S, M, V = config.state_size, config.mixing_size, config.vocab_size
    ids = g.input("ids", INT64, ("batch", "time"))
    state = g.input("state", FLOAT, ("batch", S))
    start = g.input("start", INT64, (), np.array(0, np.int64))
    eta = g.input("blend", FLOAT, (), np.array(0, np.float32))
    rings = config.layer == "ringing"
    drawn = g.input(
        "drawn",
        FLOAT,
        ("drawn_batch", 1, M),
        np.zeros((1, 1, M), np.float32),
        atoms=(2, 2, 1) if rings else (),
    )

    t = Trace(
        g=g,
        config=config,
        weights=weights,
        plan=plan,
        chunk=chunk,
        ids=ids,
        start=start,
        reach=reach or {},
    )
    if rings:  # taken from a weight, and folded on loading: fewer atoms are shorter weights, and no more
        t.num_atoms = g.op("Shape", ringing.tables(t, 0)[0])
    with g.at("state"):
        _unpack(t, state)
    with g.at("embedding"):
        embedding = t.matrix("embedding.weight", rows=True)
        x = embedding.rows(ids)
    now = clock.tick(t) if config.layer == "clock" else None
    mixing = x
    for i in range(config.num_layers):
        with g.at(f"layers.{i}"):
            x, mixing = _block(t, i, x, now, (eta, drawn) if i == config.num_layers - 1 else None)
    with g.at("head"):
        if config.residual:
            x = norm(t, "norm", x)
        out = logits(t, embedding, x, screen)
    with g.at("state"):
        next_state = _pack(t)
    g.output("logits", out, FLOAT, ("batch", "asked", V))
    g.output("next_state", next_state, FLOAT, ("batch", S))
    g.output("mixing", mixing, FLOAT, ("batch", "time", M))
    return ir.Model(g.graph("sdgm"), ir_version=IR_VERSION, producer_name="sdgm-edge")


def _block(
    t: Trace, i: int, x: ir.Value, now: ir.Value | None, blending: tuple[ir.Value, ir.Value] | None
) -> tuple[ir.Value, ir.Value]:
    """Return the stream after a block, and the mixing vectors of its spectral layer.

    What the last block does with its mixing vectors, it does only where logits are asked for: of a prompt,
    once a call. A pointer needs all of it, as its keys are made of it.
    """
    g, weights = t.g, f"blocks.{i}"
    source = norm(t, f"{weights}.norm", x) if t.config.residual else x
    with g.at("atoms"):
        mixing = (clock if now is not None else ringing).mix(t, i, source)
        blended = mixing
        if blending is not None:
            if not t.config.copy_window:
                with g.at("asked"):
                    blended, x = asked(t, mixing), asked(t, x) if t.config.residual else x
                    now = None if now is None else asked(t, now)
            with g.at("blend"):
                blended = blend(t, blended, *blending)
        if now is not None:
            rebuilt = clock.synthesize(t, i, blended, now)
        else:
            with g.at("synthesis"):
                rebuilt = t.matrix(f"{weights}.atoms.synthesis.weight", atoms=(1, 2)).product(blended)
    x = g.op("Add", x, rebuilt) if t.config.residual else rebuilt
    if t.config.glu_width:
        with g.at("unit"):
            x = g.op("Add", x, gated_unit(t, i, norm(t, f"{weights}.unit_norm", x)))
    return x, mixing


def _unpack(t: Trace, state: ir.Value) -> None:
    """Split the state into its pieces, (B, *shape) each; atoms stay flat."""
    g, layout = t.g, t.config.state_layout
    times = t.config.atoms_in
    sizes = [
        g.op("Mul", t.num_atoms, ints(times[name])) if times.get(name) else ints(math.prod(shape))
        for name, shape in layout
    ]
    parts = [state]
    if len(sizes) > 1:
        parts = list(g.ops(len(sizes), "Split", state, g.op("Concat", *sizes, axis=0), axis=1))
    for (name, shape), part in zip(layout, parts, strict=True):
        last = -1 if times.get(name) else shape[-1]
        flat = len(shape) == 1 or name.endswith(".atoms")
        t.state[name] = part if flat else g.op("Reshape", part, ints(0, *shape[:-1], last))


def _pack(t: Trace) -> ir.Value:
    """Return the next state, (B, S)."""
    pieces = []
    for name, shape in t.config.state_layout:
        flat = len(shape) == 1 or name.endswith(".atoms")
        size = -1 if t.config.atoms_in.get(name) else math.prod(shape)
        pieces.append(t.state[name] if flat else t.g.op("Reshape", t.state[name], ints(0, size)))
    return t.g.op("Concat", *pieces, axis=1)
