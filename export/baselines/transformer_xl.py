"""Transformer-XL: keys and values of the last tokens, and what each distance is worth.

Torch remembers a layer's inputs, and projects them anew with every call; here what they were projected to is
kept. The projection of the distances never changes, and is made when the graph is.

Shapes: T time, D width, H heads, E = D / H, L window, J = L − 1 + T places.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from torch import Tensor

from sdgm_edge.models import Mixer, ModelConfig, num_heads

from ..builder import CONTRIB, Builder, floats, ints
from ..layers import Trace
from ..matrices import as_held
from .mixer import (
    POSITION,
    RING,
    Carried,
    Pieces,
    as_ring,
    either,
    join_heads,
    linear,
    piece,
    remember,
    split_heads,
)


def pieces(config: ModelConfig) -> Pieces:
    """The last keys and values."""
    heads = num_heads(config.width)
    shape = (1, heads, f"{RING}:{config.window}", config.width // heads)
    return {"keys": shape, "values": shape}


def mix(t: Trace, layer: int, x: ir.Value) -> ir.Value:
    """Attend to the last L tokens, by content and by distance."""
    g, weights, heads = t.g, f"blocks.{layer}.mixer", num_heads(t.config.width)
    scale, distances = floats(1 / math.sqrt(t.config.width // heads)), _distances(t, layer, heads)
    both = g.ops(2, "Split", linear(t, f"{weights}.key_value", x), axis=-1, num_outputs=2)
    (keys, keys_seen), (values, values_seen) = (
        remember(t, piece(layer, name), split_heads(t, new, heads), t.config.window, heads)
        for name, new in zip(("keys", "values"), both, strict=True)
    )
    query = g.op("Mul", linear(t, f"{weights}.query", x), scale)
    by_content, by_distance = (
        split_heads(t, g.op("Add", query, scale * t.weights[f"{weights}.{kind}_bias"]), heads)
        for kind in ("content", "distance")
    )
    distance_at, empty = _ages(t)

    def scores(
        b: Builder, q: ir.Value, k: ir.Value
    ) -> ir.Value:  # a single row has no kernel that scales too
        return b.op("FusedMatMul", q, k, domain=CONTRIB, transB=1)

    def one(b: Builder) -> ir.Value:
        far = b.op("Gather", scores(b, by_distance, distances), distance_at, axis=3)
        total = b.op("Add", b.op("Add", scores(b, by_content, keys), far), empty)
        return b.op("MatMul", b.op("Softmax", total, axis=-1), values)

    def many(b: Builder) -> ir.Value:
        far = _moved(b, scores(b, by_distance, distances), heads, t)
        total = b.op("Add", b.op("Add", scores(b, by_content, keys_seen), far), _before_the_text(b, t))
        return b.op("MatMul", b.op("Softmax", total, axis=-1), values_seen)

    with g.at("attention"):
        read = either(t, one, many, 4)
    return linear(t, f"{weights}.output", join_heads(t, read))


def carried(mixer: Mixer, state: tuple[Tensor, ...], inputs_TD: Tensor, position: int) -> Carried:
    """Rings of what the last inputs are projected to."""
    heads, L = num_heads(inputs_TD.shape[1]), state[0].shape[1] + 1
    parts = mixer.key_value(inputs_TD).chunk(2, dim=-1)  # type: ignore[operator]
    keys, values = (as_ring(x.unflatten(-1, (heads, -1)), L).transpose(0, 1)[None] for x in parts)
    return {"keys": keys, "values": values}


def _distances(t: Trace, layer: int, heads: int) -> ir.Value:
    """Return what distances are projected to, the largest first: (1, H, L, E)."""
    L, D, name = t.config.window, t.config.width, f"blocks.{layer}.mixer.distance.weight"
    rate = np.exp(np.arange(0, D, 2, dtype=np.float32) * np.float32(-math.log(10_000) / D))
    angle = np.arange(L, dtype=np.float32)[:, None] * rate
    waves = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)[:, :D]
    projected = (waves @ as_held(t.weights[name], t.plan[name]).T)[::-1]
    by_head = projected.reshape(L, heads, -1).transpose(1, 0, 2)[None]
    if t.plan[name] == "fp32":
        return t.g.constant(by_head, f"layers.{layer}.distances")
    half = t.g.constant(by_head.astype(np.float16), f"layers.{layer}.distances")
    return t.g.op("Cast", half, to=ir.DataType.FLOAT)  # while the graph is loaded


def _ages(t: Trace) -> tuple[ir.Value, ...]:
    """Return where the places of a ring lie among a token's distances, and −∞ where they are empty."""
    g, L = t.g, t.config.window
    if "ages" not in t.shared:
        age = g.op("Mod", g.op("Sub", t.state[POSITION], np.arange(L)), np.int64(L))
        empty = g.op("Where", g.op("Greater", age, t.state[POSITION]), floats(-np.inf), floats(0))
        t.shared["ages"] = (g.op("Sub", np.int64(L - 1), age), empty)
    return t.shared["ages"]


def _moved(b: Builder, by_distance: ir.Value, heads: int, t: Trace) -> ir.Value:
    """Return scores by distance (1, H, T, L) by place, (1, H, T, J), −∞ outside the last L.

    Each row is filled up with T places, and all are read as rows shorter by one, which moves each by one more
    than that before it.
    """
    ends = b.op("Concat", ints(0, 0, 0, 0, 0, 0, 0), t.num_steps, axis=0)
    rows = b.op("Pad", by_distance, ends, np.float32(-np.inf))
    places = b.op("Add", t.num_steps, ints(t.config.window - 1))
    flat = b.op("Reshape", rows, ints(1, heads, -1))
    cut = b.op("Slice", flat, ints(0), b.op("Mul", t.num_steps, places), ints(2))
    return b.op("Reshape", cut, b.op("Concat", ints(1, heads, -1), places, axis=0))


def _before_the_text(b: Builder, t: Trace) -> ir.Value:
    """Return −∞ for the places before the text began, (J,)."""
    before = ints(t.config.window - 1)
    end = b.op("Squeeze", b.op("Add", t.num_steps, before), ints(0))
    place = b.op("Range", np.int64(0), end, np.int64(1))
    empty = b.op("Less", place, b.op("Sub", before, t.state[POSITION]))
    return b.op("Where", empty, floats(-np.inf), floats(0))
