"""What every token says to the atoms, as a graph: see `models/strikes.py`.

λ is folded into the bias of the strike. Shapes: B batch, T time, D width, K atoms.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from sdgm_edge.models import LOG_DECAY_FLOOR

from .builder import floats
from .layers import Trace, activate, depthwise, path


def strikes(t: Trace, weights: str, x: ir.Value, piece: str) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Return b = (1 − f) v, f and g, (B, T, K) each, for a layer's input x (B, T, D).

    `weights` is the layer's place in the model, `piece` that of its convolution in the state.
    """
    g, K = t.g, t.config.num_atoms
    with g.at("strike"):
        bias = t.weights[f"{weights}.strike.bias"].copy()
        bias[K : 2 * K] += t.weights[f"{weights}.damping"]
        named = g.constant(bias, path(f"{weights}.strike.bias"), atoms=(0, 3, 1))
        struck = t.matrix(f"{weights}.strike.weight", atoms=(0, 3)).product(x, named)
        v, f, gate = g.ops(3, "Split", struck, axis=-1, num_outputs=3)
    with g.at("encoder"):
        v = activate(g, t.config.activation, depthwise(t, f"{weights}.conv", v, piece))
    with g.at("damping"):
        f = g.op("Max", g.op("Sigmoid", f), floats(math.exp(LOG_DECAY_FLOOR)))
        b = g.op("Mul", g.op("Sub", floats(1), f), v)
    with g.at("listen"):
        gate = g.op("Sigmoid", gate)
    return b, f, gate
