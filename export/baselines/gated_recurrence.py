"""The gated recurrence: the graph of ringing atoms, less their turning.

Shapes: T time, D width, K integrators.
"""

from __future__ import annotations

import onnx_ir as ir
from torch import Tensor

from sdgm_edge.models import Mixer, ModelConfig

from ..builder import ints
from ..layers import Trace, scan
from ..strikes import strikes
from .mixer import Carried, Pieces, linear, piece


def pieces(config: ModelConfig) -> Pieces:
    """Tail of the convolution, and the integrators."""
    tail = {"conv": (1, config.conv_width - 1, config.num_atoms)} if config.conv_width > 1 else {}
    return {**tail, "levels": (1, config.num_atoms)}


def mix(t: Trace, layer: int, x: ir.Value) -> ir.Value:
    """h_t = f_t h_{t−1} + (1 − f_t) v_t, then y = W_o (g · h)."""
    g, K, weights = t.g, t.config.num_atoms, f"blocks.{layer}.mixer"
    b, f, gate = strikes(t, weights, x, piece(layer, "conv"))
    with g.at("recurrence"):
        levels = piece(layer, "levels")
        before, step, walk = t.state[levels], g.branch(), g.branch()
        shapes = (("batch", "atoms"),) * 3
        faded_step = step.op("Mul", f, step.op("Unsqueeze", before, ints(1)))
        faded_walk = scan(walk, before, (f,), b, shapes, lambda body, h, f_now: body.op("Mul", f_now, h))
        for branch, faded in ((step, faded_step), (walk, faded_walk)):
            branch.output(faded.name or "", faded, ir.DataType.FLOAT, (1, "time", K))
        faded = g.op("If", t.single_step, then_branch=step.graph("step"), else_branch=walk.graph("walk"))
        h = g.op("Add", faded, b)
        t.state[levels] = g.op("Gather", h, ints(-1)[0], axis=1)
    return linear(t, f"{weights}.output", g.op("Mul", gate, h))


def carried(mixer: Mixer, state: tuple[Tensor, ...], inputs_TD: Tensor, position: int) -> Carried:
    """As torch has them."""
    return {"conv": state[0], "levels": state[1]}
