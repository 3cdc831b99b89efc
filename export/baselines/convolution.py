"""Long convolutions, a response of its own for each feature: y_t = Σ_{0≤τ<L} h_τ · x_{t−τ}.

A single token is a product with the ring of the last inputs, in whose places the response turns with the
time; several are ONNX's convolution, which is slow for one.

Shapes: T time, D width, L taps.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..builder import Builder, ints
from ..layers import Trace
from .mixer import POSITION, RING, Pieces, either, piece, remember


def inputs(size: int, width: int) -> Pieces:
    """The last inputs."""
    return {"inputs": (1, f"{RING}:{size}", width)}


def convolve(t: Trace, layer: int, x: ir.Value, response_LD: ir.Value, size: int) -> ir.Value:
    """Convolve x (1, T, D) with responses of `size` taps, the oldest first."""
    g = t.g
    with g.at("convolution"):
        ring, seen = remember(t, piece(layer, "inputs"), x, size)
        if "turn" not in t.shared:
            begin = g.op("Mod", g.op("Sub", ints(-1), t.state[POSITION]), np.int64(size))
            t.shared["turn"] = (begin, g.op("Add", begin, np.int64(size)))
        twice = g.op("Concat", response_LD, response_LD, axis=0)  # while the graph is loaded
        turned = g.op("Slice", twice, *t.shared["turn"], ints(0))

        def one(b: Builder) -> ir.Value:
            return b.op("ReduceSum", b.op("Mul", ring, turned), ints(1), keepdims=1)

        def many(b: Builder) -> ir.Value:
            kernel = b.op("Unsqueeze", b.op("Transpose", response_LD, perm=(1, 0)), ints(1))
            out = b.op("Conv", b.op("Transpose", seen, perm=(0, 2, 1)), kernel, group=t.config.width)
            return b.op("Transpose", out, perm=(0, 2, 1))

        return either(t, one, many, 3)
