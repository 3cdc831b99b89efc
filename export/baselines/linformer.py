"""Linformer: a cache of slots, and the block under way beside it.

A block is projected anew with every call into the slots where it will stand, and they are read once it is
complete. No call goes beyond the end of a block, so a call has one block under way.

Shapes: T time, H heads, E numbers of a head, c tokens of a block, s slots of a block, J slots of the cache.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from torch import Tensor

from sdgm_edge.models import Mixer, ModelConfig, block_sizes, num_heads

from ..builder import CONTRIB, floats, ints
from ..layers import Trace
from .mixer import (
    CAPACITY,
    POSITION,
    Carried,
    Pieces,
    join_heads,
    linear,
    piece,
    place_in,
    split_heads,
    times,
    write,
)


def pieces(config: ModelConfig) -> Pieces:
    """Slots of the complete blocks, and the block under way."""
    heads, (_, block, slots) = num_heads(config.width), block_sizes(config.window)
    size = config.width // heads
    done, under_way = (1, heads, f"{CAPACITY}/{block // slots}", size), (1, heads, block, size)
    return {"slot_keys": done, "slot_values": done, "keys": under_way, "values": under_way}


def mix(t: Trace, layer: int, x: ir.Value) -> ir.Value:
    """Attend to the slots before the block, and to the block up to each token."""
    g, weights, heads = t.g, f"blocks.{layer}.mixer", num_heads(t.config.width)
    names = [piece(layer, name) for name in ("slot_keys", "slot_values", "keys", "values")]
    old_keys, old_values = t.state[names[0]], t.state[names[1]]
    index, in_block, in_slots, hidden_slots, hidden_block = _places(t, old_keys, heads)
    # The scale of the scores is in the weights of the queries: ONNX Runtime would put it into the product of
    # queries and keys, for whose single row it has no quick kernel that scales.
    name, width = f"{weights}.input.weight", t.config.width
    scaled = (
        t.weights[name] * np.repeat([(width // heads) ** -0.5, 1.0], [width, 2 * width]).astype("f4")[:, None]
    )
    query, key, value = (
        split_heads(t, part, heads)
        for part in g.ops(3, "Split", t.matrix(name, scaled).product(x), axis=-1, num_outputs=3)
    )
    keys, values = write(t, names[2], in_block, key), write(t, names[3], in_block, value)
    with g.at("slots"):
        for name, tokens, projection in zip(
            names[:2], (keys, values), t.weights[f"{weights}.projection"], strict=True
        ):
            write(t, name, in_slots, g.op("MatMul", g.op("Gather", projection, index, axis=0), tokens))
    with g.at("attention"):
        far, near = (
            g.op("Add", g.op("FusedMatMul", query, k, domain=CONTRIB, transB=1), hidden)
            for k, hidden in ((old_keys, hidden_slots), (keys, hidden_block))
        )
        shares = g.op("Softmax", g.op("Concat", far, near, axis=-1), axis=-1)
        block = block_sizes(t.config.window)[1]
        of_slots = g.op("Slice", shares, ints(0), ints(-block), ints(3))
        of_block = g.op("Slice", shares, ints(-block), ints(np.iinfo(np.int64).max), ints(3))
        read = g.op("Add", g.op("MatMul", of_slots, old_values), g.op("MatMul", of_block, values))
    return linear(t, f"{weights}.output", join_heads(t, read))


def carried(mixer: Mixer, state: tuple[Tensor, ...], inputs_TD: Tensor, position: int) -> Carried:
    """As torch has them, as far as they are used."""
    heads = num_heads(inputs_TD.shape[1])
    done, used = divmod(position, state[1].shape[2])
    slots = state[0].shape[2] // mixer.num_blocks * done  # type: ignore[operator]

    def split(x: Tensor) -> Tensor:
        parts: Tensor = x.unflatten(-1, (heads, -1))
        return parts.transpose(1, 2)

    slot_keys, slot_values = (split(x[:, :slots]) for x in state[0].unbind(1))
    keys, values = (split(x[:, :used]) for x in state[1].unbind(1))
    return {"slot_keys": slot_keys, "slot_values": slot_values, "keys": keys, "values": values}


def _places(t: Trace, cache: ir.Value, heads: int) -> tuple[ir.Value, ...]:
    """Return the block's number, where tokens and slots are written, and what hides places."""
    g, (num_blocks, block, slots) = t.g, block_sizes(t.config.window)
    if "places" not in t.shared:
        c, s, zero, one = np.int64(block), np.int64(slots), np.int64(0), np.int64(1)
        number = g.op("Squeeze", g.op("Div", t.state[POSITION], c), ints(0))
        first = g.op("Mul", number, s)  # slot of the block under way
        in_block = g.op("Mod", times(t), c)
        num_slots = g.op("Squeeze", g.op("Shape", cache, start=2, end=3), ints(0))
        # Of the last block a cache may hold, not all slots may have room.
        own = g.op("Min", g.op("Add", first, np.arange(slots)), g.op("Sub", num_slots, one))
        hidden = g.op("GreaterOrEqual", g.op("Range", zero, num_slots, one), first)
        later = g.op("Greater", np.arange(block), g.op("Unsqueeze", in_block, ints(1)))
        t.shared["places"] = (
            g.op("Mod", number, np.int64(num_blocks)),
            place_in(t, in_block, heads),
            place_in(t, own, heads),
            *(g.op("Where", which, floats(-np.inf), floats(0)) for which in (hidden, later)),
        )
    return t.shared["places"]
