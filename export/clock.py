"""Clock atoms as a graph: literal sines, A_k sin(2π F_k t/L + Φ_k), in float32 in every variant.

A table of L steps would be quicker, but take L · K · D numbers of file or memory: 67 MB with K = 256, D = 512
and L = 128. The layer is there to reproduce a paper and not to be quick, and a bundle should not be twenty
times as large as its model: sines.

Shapes: B batch, T time, D width, K atoms, L period of the clock, W width of the convolution.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from .builder import floats, ints
from .layers import Trace, activate, taps, with_tail


def mix(t: Trace, layer: int, x: ir.Value) -> ir.Value:
    """Return the layer's mixing vectors (B, T, K) for its input x (B, T, D)."""
    g, weights = t.g, f"blocks.{layer}.atoms"
    with g.at("encoder"):
        seen = taps(t, x, with_tail(t, x, f"layers.{layer}.conv"))
        seen_WD = g.op("Concat", *seen, axis=-1) if len(seen) > 1 else x
        encoder = t.matrix(f"{weights}.encoder.weight")
        return activate(
            g, t.config.activation, encoder.product(seen_WD, t.weights[f"{weights}.encoder.bias"])
        )


def synthesize(t: Trace, layer: int, mixing: ir.Value, clock: ir.Value) -> ir.Value:
    """Return x̂ (B, T, D) = Σ_k c_k A_k sin(2π F_k t/L + Φ_k) at the clock times (B, T)."""
    g, weights = t.g, f"blocks.{layer}.atoms"
    amplitude, phase = t.weight(f"{weights}.amplitude"), t.weight(f"{weights}.phase")
    with g.at("synthesis"):  # in the order of the model's own step: large angles are rounded alike
        speed = np.float32(2 * math.pi) * t.weights[f"{weights}.frequency"]
        time = g.op("Unsqueeze", g.op("Div", clock, floats(t.config.window)), ints(2, 3))
        angle = g.op("Add", g.op("Mul", time, speed), phase)  # (B, T, K, D)
        atoms = g.op("Mul", g.op("Sin", angle), amplitude)
        return g.op("Squeeze", g.op("MatMul", g.op("Unsqueeze", mixing, ints(2)), atoms), ints(2))


def tick(t: Trace) -> ir.Value:
    """Return the clock time of every token (B, T), and move the clock on."""
    g, period = t.g, np.float32(t.config.window)
    with g.at("clock"):
        steps = g.op(
            "Cast", g.op("Range", np.int64(0), g.op("Squeeze", t.num_steps, ints(0)), np.int64(1)), to=1
        )
        now = g.op("Mod", g.op("Add", t.state["clock"], steps), period, fmod=1)
        after = g.op("Add", t.state["clock"], g.op("Cast", t.num_steps, to=1))
        t.state["clock"] = g.op("Mod", after, period, fmod=1)
        return now
