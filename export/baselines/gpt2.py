"""GPT-2's attention: ONNX Runtime's fused one, which appends keys and values to its caches in place.

`GroupQueryAttention` with as many groups as heads is plain causal attention. It wants heads of a multiple of
8 numbers: where they are not, keys, queries and values get zeros to fill up, which changes nothing.

Shapes: T time, D width, H heads, E numbers of a head as the graph has them.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from torch import Tensor
from torch.nn import functional

from sdgm_edge.models import Mixer, ModelConfig, num_heads

from ..builder import CONTRIB, Array, ints
from ..layers import Trace
from .mixer import CAPACITY, POSITION, Carried, Pieces, piece


def pieces(config: ModelConfig) -> Pieces:
    """The keys and values so far."""
    heads = num_heads(config.width)
    shape = (1, heads, CAPACITY, _filled(config.width // heads))
    return {"keys": shape, "values": shape}


def mix(t: Trace, layer: int, x: ir.Value) -> ir.Value:
    """Attend to everything so far."""
    g, weights, heads = t.g, f"blocks.{layer}.mixer", num_heads(t.config.width)
    size = t.config.width // heads
    fill = _filled(size) - size

    def filled(weight: Array) -> Array:
        """Queries, keys and values, (3 H E, …), each head with zeros at its end."""
        split = weight.reshape(3 * heads, size, -1)
        return np.pad(split, ((0, 0), (0, fill), (0, 0))).reshape(-1, *weight.shape[1:])

    name = f"{weights}.input.weight"
    with g.at("input"):
        qkv = t.matrix(name, filled(t.weights[name])).product(x, filled(t.weights[f"{weights}.input.bias"]))
    with g.at("attention"):
        total = g.op("Cast", g.op("Add", t.state[POSITION], t.num_steps), to=ir.DataType.INT32)
        keys, values = piece(layer, "keys"), piece(layer, "values")
        read, t.state[keys], t.state[values] = g.ops(
            3,
            "GroupQueryAttention",
            qkv,
            None,
            None,
            t.state[keys],
            t.state[values],
            g.op("Sub", total, np.array([1], np.int32)),
            g.op("Squeeze", total, ints(0)),
            domain=CONTRIB,
            num_heads=heads,
            kv_num_heads=heads,
            scale=1 / math.sqrt(size),
        )
    name = f"{weights}.output.weight"
    with g.at("output"):
        weight = t.weights[name].reshape(-1, heads, size)
        filled_in = np.pad(weight, ((0, 0), (0, 0), (0, fill))).reshape(len(weight), -1)
        return t.matrix(name, filled_in).product(read, t.weights[f"{weights}.output.bias"])


def carried(mixer: Mixer, state: tuple[Tensor, ...], inputs_TD: Tensor, position: int) -> Carried:
    """Keys and values of the window so far."""
    heads = num_heads(inputs_TD.shape[1])

    def split(x: Tensor) -> Tensor:
        parts = x[:, :position].unflatten(-1, (heads, -1)).transpose(1, 2)
        return functional.pad(parts, (0, _filled(parts.shape[-1]) - parts.shape[-1]))

    return {"keys": split(state[0]), "values": split(state[1])}


def _filled(size: int) -> int:
    return -(-size // 8) * 8
