"""The polynomial mixer: a ring of the last polynomials, whose sum is taken anew for every token.

The sums of several tokens are differences of a running one, as in torch.

Shapes: T time, K numbers of a degree, L window.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from sdgm_edge.models import Mixer, ModelConfig

from ..builder import Builder, ints
from ..layers import TO_THE_END, Trace
from .mixer import RING, Carried, Pieces, as_ring, either, linear, piece, remember, times


def pieces(config: ModelConfig) -> Pieces:
    """The last polynomials."""
    return {"polynomials": (1, f"{RING}:{config.window}", 2 * config.num_atoms)}


def mix(t: Trace, layer: int, x: ir.Value) -> ir.Value:
    """Gate the mean of the last L polynomials."""
    g, L, weights = t.g, t.config.window, f"blocks.{layer}.mixer"
    h_1, h_2 = g.ops(2, "Split", g.op("Gelu", linear(t, f"{weights}.rise", x)), axis=-1, num_outputs=2)
    polynomials = g.op("Concat", h_1, g.op("Mul", h_1, h_2), axis=-1)
    ring, seen = remember(t, piece(layer, "polynomials"), polynomials, L)

    def one(b: Builder) -> ir.Value:
        return b.op("MatMul", np.ones((1, 1, L), np.float32), ring)  # several times as quick as ReduceSum

    def many(b: Builder) -> ir.Value:
        running = b.op("Pad", b.op("CumSum", seen, np.int64(1)), ints(0, 1, 0, 0, 0, 0))
        until = b.op("Slice", running, ints(L), ints(TO_THE_END), ints(1))
        return b.op("Sub", until, b.op("Slice", running, ints(0), ints(-L), ints(1)))

    with g.at("mean"):
        if "counts" not in t.shared:
            count = g.op("Min", g.op("Add", times(t), np.int64(1)), np.int64(L))
            t.shared["counts"] = (g.op("Unsqueeze", g.op("Cast", count, to=ir.DataType.FLOAT), ints(1)),)
        mean = g.op("Div", either(t, one, many, 3), t.shared["counts"][0])
    gate = g.op("Sigmoid", linear(t, f"{weights}.select", x))
    return linear(t, f"{weights}.output", g.op("Mul", gate, mean))


def carried(mixer: Mixer, state: tuple[Tensor, ...], inputs_TD: Tensor, position: int) -> Carried:
    """The ring of them."""
    h_1, h_2 = functional.gelu(mixer.rise(inputs_TD)).chunk(2, dim=-1)  # type: ignore[operator]
    polynomials = torch.cat([h_1, h_1 * h_2], dim=-1)
    return {"polynomials": as_ring(polynomials, state[0].shape[1] + 1)[None]}
