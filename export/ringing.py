"""Ringing atoms as a graph.

In the frame that turns with the atoms, h_t = e^{−iωt} z_t, the recurrence is real: h_t = f_t h_{t−1} + b_t,
with b_t = (1 − f_t) v_t e^{−iωt}. A `Scan` of one product and one sum walks it. Turning by e^{±iωt} is what
a rotary embedding does to the two halves of a vector, so ONNX Runtime's does it, for all steps at once,
with tables that are computed in float64 while the graph is loaded (nothing in them varies; a bundle holds ω
alone). A single step needs neither frame nor Scan: an `If` on the number of steps takes its few nodes
instead.

No sine is left in a step: amplitude and phase are folded into the synthesis matrix [A cos Φ | −A sin Φ]. ω
and λ, which is folded into the bias of the strike, stay in float32 in every variant.

Closed forms over blocks of 16 steps, whose range the floor of f bounds, gained nothing over the Scan in a
whole graph: they pass over memory more often, and ONNX Runtime takes logarithms slowly. A profile shows the
Scan larger than it is, as timing its many small nodes costs more than they do; to see what it costs, leave
it out and run `benchmarks/graph.py`.

Shapes: B batch, T time, D width, K atoms; a mixing vector is [real parts | imaginary parts], 2K.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from .builder import CONTRIB, Builder, floats, ints
from .layers import Trace, activate, depthwise, silu

DECAY_FLOOR = math.exp(-5)


def mix(t: Trace, layer: int, x: ir.Value) -> ir.Value:
    """Return the layer's mixing vectors (B, T, 2K) for its input x (B, T, D)."""
    g, K = t.g, t.config.num_atoms
    weights = f"blocks.{layer}.atoms"
    with g.at("encoder"):
        u = activate(g, t.config.activation, depthwise(t, f"{weights}.conv", x, f"layers.{layer}.conv"))
    with g.at("strike"):
        bias = t.weights[f"{weights}.strike.bias"].copy()
        bias[K : 2 * K] += t.weights[f"{weights}.damping"]
        struck = t.matrix(f"{weights}.strike.weight").product(u, bias)
        v, f, gate = g.ops(3, "Split", struck, axis=-1, num_outputs=3)
    with g.at("damping"):
        f = g.op("Max", g.op("Sigmoid", f), floats(DECAY_FLOOR))
        b = g.op("Mul", g.op("Sub", floats(1), f), v)
    with g.at("ring"):
        piece = f"layers.{layer}.atoms"
        z = _ring(t, t.weight(f"{weights}.omega"), f, b, t.state[piece])
        t.state[piece] = g.op("Gather", z, np.int64(-1), axis=1)
    with g.at("listen"):
        gate = silu(g, gate)
        return g.op("Mul", g.op("Concat", gate, gate, axis=-1), z)


def _ring(t: Trace, omega: ir.Value, f: ir.Value, b: ir.Value, z: ir.Value) -> ir.Value:
    """z_t = f_t e^{iω} z_{t−1} + b_t for all steps, (B, T, 2K)."""
    g, K = t.g, t.config.num_atoms
    with g.at("turn"):
        omega_double = g.op("Cast", omega, to=ir.DataType.DOUBLE)
        angle = g.op("Mul", np.arange(1.0, t.chunk + 1)[:, None], omega_double)
        quarter = g.op("Add", angle, np.array(math.pi / 2))  # older releases know no cosine of float64
        cos, sin = (g.op("Cast", g.op("Sin", x), to=ir.DataType.FLOAT) for x in (quarter, angle))
        back = g.op("Neg", sin)
    f_2K = g.op("Concat", f, f, axis=-1)
    b_2K = g.op("Pad", b, ints(0, 0, 0, 0, 0, K))
    step = g.branch()
    with g.at("step"):
        turned = _turn(step, step.op("Unsqueeze", z, ints(1)), cos, sin)
        z_step = step.op("Add", step.op("Mul", f_2K, turned), b_2K)
        step.output(z_step.name or "", z_step, ir.DataType.FLOAT, ("batch", "time", 2 * K))
    walk = g.branch()
    with g.at("walk"):
        h_2K = scan(walk, z, f_2K, _turn(walk, b_2K, cos, back))
        z_walk = _turn(walk, h_2K, cos, sin)
        walk.output(z_walk.name or "", z_walk, ir.DataType.FLOAT, ("batch", "time", 2 * K))
    return g.op("If", t.single_step, then_branch=step.graph("step"), else_branch=walk.graph("walk"))


def _turn(g: Builder, z_2K: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
    """Return z_t e^{iωt}, t from 1: a rotary embedding turns the halves of a vector so."""
    return g.op("RotaryEmbedding", z_2K, ints(0), cos, sin, domain=CONTRIB, num_heads=1)


def scan(g: Builder, h: ir.Value, f_2K: ir.Value, b_2K: ir.Value) -> ir.Value:
    """h_t = f_t h_{t−1} + b_t for all steps; the body hands out f_t h_{t−1}, and so need not copy h_t."""
    body = g.branch()
    names = (f"{name}:{h.name}" for name in ("h", "f", "b"))
    h_before, f, b = (body.input(name, ir.DataType.FLOAT, ("batch", "atoms")) for name in names)
    faded = body.op("Mul", f, h_before)
    for value in (body.op("Add", faded, b), faded):
        body.output(value.name or "", value, ir.DataType.FLOAT, ("batch", "atoms"))
    _, faded_T = g.ops(
        2,
        "Scan",
        h,
        f_2K,
        b_2K,
        body=body.graph("body"),
        num_scan_inputs=2,
        scan_input_axes=(1, 1),
        scan_output_axes=(1,),
    )
    return g.op("Add", faded_T, b_2K)
