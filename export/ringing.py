"""Ringing atoms as a graph.

    z_t = f_t e^{iω} z_{t−1} + b_t        b_t = (1 − f_t) v_t, a real number

A step turns, fades and adds. Turning by an angle is what a rotary embedding does to the two halves of a
vector, and fading with it, where its table holds f cos ω and f sin ω: one node, and one sum. CUDA's has a
thread for each number of a vector, and no more than 1024: where there are more than 512 atoms, fp16, the
variant for GPUs, turns them by products and sums. On a processor that takes longer, most of all for a prompt.

A `Scan` of these two walks any number of steps; a single one needs no Scan, and an `If` on the number of
steps takes the two nodes as they are. Since both compute the same, bit for bit, tokens may be fed in pieces
of any length: with products whose rows do not see each other (`matrices.py`), sixteen at once give exactly
what sixteen one by one give, which is what checking a draft lives on.

No sine is left in a step: amplitude and phase are folded into the synthesis matrix [A cos Φ | −A sin Φ].
cos ω, sin ω and λ are float32 in every variant.

In the frame that turns with the atoms the recurrence is real, and its Scan as long; a closed form over
blocks of 16 steps gained nothing in a whole graph: it passes over memory more often, and ONNX Runtime takes
logarithms slowly. Neither gives what single steps give. A profile shows the Scan larger than it is, as timing
its many small nodes costs more than they do; to see what it costs, leave it out and run
`benchmarks/graph.py`.

Shapes: B batch, T time, D width, K atoms; a mixing vector is [real parts | imaginary parts], 2K.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .builder import Builder, ints
from .layers import Trace, scan
from .strikes import strikes

MOST_ON_CUDA = 512
"""Atoms that its RotaryEmbedding can turn."""


def mix(t: Trace, layer: int, x: ir.Value) -> ir.Value:
    """Return the layer's mixing vectors (B, T, 2K) for its input x (B, T, D)."""
    g, weights = t.g, f"blocks.{layer}.atoms"
    b, f, gate = strikes(t, weights, x, f"layers.{layer}.conv")
    with g.at("ring"):
        piece = f"layers.{layer}.atoms"
        z = _ring(t, tables(t, layer), f, b, t.state[piece])
        t.state[piece] = g.op("Gather", z, np.int64(-1), axis=1)
    with g.at("listen"):
        return g.op("Mul", g.op("Concat", gate, gate, axis=-1), z)


def tables(t: Trace, layer: int) -> tuple[ir.Value, ...]:
    """Return cos ω and sin ω of a layer, (K,) each."""
    piece = f"layers.{layer}.atoms"
    if piece not in t.shared:
        omega = t.weights[f"blocks.{layer}.atoms.omega"].astype(np.float64)
        named = {"cosine": np.cos(omega), "sine": np.sin(omega)}
        t.shared[piece] = tuple(
            t.g.constant(table.astype(np.float32), f"{piece}.{name}", atoms=(0, 1, 1))
            for name, table in named.items()
        )
    return t.shared[piece]


def _ring(t: Trace, turns: tuple[ir.Value, ...], f: ir.Value, b: ir.Value, z: ir.Value) -> ir.Value:
    """z_t = f_t e^{iω} z_{t−1} + b_t for all steps, (B, T, 2K); `turns` are cos ω and sin ω."""
    g = t.g
    for_gpus = t.plan["embedding.weight"] == "fp16"
    turn = _turn_in_parts if for_gpus and t.config.num_atoms > MOST_ON_CUDA else _turn
    with g.at("turn"):
        cos, sin = (g.op("Mul", f, table) for table in turns)
    b_2K = g.op("Pad", b, g.op("Concat", ints(0, 0, 0, 0, 0), t.num_atoms, axis=0))
    z = g.op("Unsqueeze", z, ints(1))
    step = g.branch()
    with g.at("step"):
        turned = turn(step, z, cos, sin)
        step.output(turned.name or "", turned, ir.DataType.FLOAT, ("batch", "time", "parts"))
    walk = g.branch()
    with g.at("walk"):
        one, half = ("batch", 1, "parts"), ("batch", 1, "atoms")
        *tables, b_T12K = (walk.op("Unsqueeze", x, ints(2)) for x in (cos, sin, b_2K))
        pieces = scan(walk, z, tables, b_T12K, (one, half, half, one), turn)
        turned = walk.op("Squeeze", pieces, ints(2))
        walk.output(turned.name or "", turned, ir.DataType.FLOAT, ("batch", "time", "parts"))
    turned = g.op("If", t.single_step, then_branch=step.graph("step"), else_branch=walk.graph("walk"))
    return g.op("Add", turned, b_2K)


def _turn(g: Builder, z_2K: ir.Value, cos_K: ir.Value, sin_K: ir.Value) -> ir.Value:
    """Return z (B, 1, 2K) turned and faded by f cos ω and f sin ω (B, 1, K)."""
    return g.op("RotaryEmbedding", z_2K, cos_K, sin_K, num_heads=1)


def _turn_in_parts(g: Builder, z_2K: ir.Value, cos_K: ir.Value, sin_K: ir.Value) -> ir.Value:
    """Return the same as `_turn`, on any device for any number of atoms."""
    real, imag = g.ops(2, "Split", z_2K, axis=-1, num_outputs=2)
    turned_real = g.op("Sub", g.op("Mul", real, cos_K), g.op("Mul", imag, sin_K))
    turned_imag = g.op("Add", g.op("Mul", real, sin_K), g.op("Mul", imag, cos_K))
    return g.op("Concat", turned_real, turned_imag, axis=-1)
