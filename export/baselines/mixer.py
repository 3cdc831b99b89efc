"""What the graph of a mixer is made of, and what several of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from sdgm_edge.models import Mixer, ModelConfig

from ..builder import Array, Builder, ints
from ..layers import TO_THE_END, Trace

POSITION = "position"
CAPACITY = "capacity"
"""The dimension of a cache; `capacity/4` of one that takes a place for every four tokens."""

RING = "ring"
"""The dimension of a ring is `ring:128`: the place of a token is its time modulo that."""

Pieces: TypeAlias = Mapping[str, tuple[int | str, ...]]
Carried: TypeAlias = Mapping[str, Tensor]


class MixerGraph(Protocol):
    """A mixer as a graph: a module of this folder."""

    def pieces(self, config: ModelConfig, /) -> Pieces:
        """Return names and shapes of what a layer remembers."""

    def mix(self, t: Trace, layer: int, x: ir.Value, /) -> ir.Value:
        """Return what is added to the stream (1, T, D), and put the next pieces in the place of the last."""

    def carried(
        self, mixer: Mixer, state: tuple[Tensor, ...], inputs_TD: Tensor, position: int, /
    ) -> Carried:
        """Return what the pieces should hold after all inputs of the window, from torch's state or by itself.

        A cache is returned as far as it is used.
        """


def piece(layer: int, name: str) -> str:
    """Return the name of a piece of a layer."""
    return f"layers.{layer}.{name}"


def times(t: Trace) -> ir.Value:
    """Return the place of every token in its text, (T,)."""
    g = t.g
    if "times" not in t.shared:
        here = g.op("Range", np.int64(0), g.op("Squeeze", t.num_steps, ints(0)), np.int64(1))
        t.shared["times"] = (g.op("Add", here, t.state[POSITION]),)
    return t.shared["times"][0]


def place_in(t: Trace, places_T: ir.Value, heads: int = 0) -> ir.Value:
    """Return where `write` puts what comes at those places: (1, T, 2), or (1, H, T, 3) beneath heads."""
    g = t.g
    if not heads:
        return g.op("Unsqueeze", g.op("Mul", g.op("Unsqueeze", places_T, ints(1)), ints(0, 1)), ints(0))
    of_head = np.arange(heads)[None, :, None, None] * ints(0, 1, 0)
    return g.op("Add", g.op("Mul", g.op("Unsqueeze", places_T, ints(0, 1, 3)), ints(0, 0, 1)), of_head)


def write(t: Trace, name: str, where: ir.Value, new: ir.Value) -> ir.Value:
    """Return a piece with new numbers in their places; of a cache, nothing is copied."""
    t.state[name] = t.g.op("ScatterND", t.state[name], where, new)
    return t.state[name]


def remember(t: Trace, name: str, new: ir.Value, size: int, heads: int = 0) -> tuple[ir.Value, ir.Value]:
    """Write the tokens of a call into a ring of the last L, and return it, and all that they see in order.

    The second is (…, L − 1 + T, …) for several tokens, and nothing but the token for a single one, which sees
    what is in the ring now. It is made of the ring before, and what is written is taken from it: so the ring
    is read before it is written to, and one buffer can be both.
    """
    g, L, axis = t.g, size, 2 if heads else 1
    key = f"ring of {heads}"
    if key not in t.shared:
        place = g.op("Mod", times(t), np.int64(L))
        before = g.op("Mod", g.op("Add", t.state[POSITION], np.arange(1, L)), np.int64(L))
        t.shared[key] = (place_in(t, place, heads), before, g.op("Neg", t.num_steps))
    where, before, last = t.shared[key]

    def in_order(b: Builder) -> ir.Value:
        return b.op("Concat", b.op("Gather", t.state[name], before, axis=axis), new, axis=axis)

    seen = either(t, lambda b: b.op("Identity", new), in_order, axis + 2)
    ring = write(t, name, where, g.op("Slice", seen, last, ints(TO_THE_END), ints(axis)))
    return ring, seen


def either(
    t: Trace, one: Callable[[Builder], ir.Value], many: Callable[[Builder], ir.Value], rank: int
) -> ir.Value:
    """Return what `one` makes for a single token, `many` for several; of so many dimensions."""
    bodies: dict[str, Any] = {}
    for name, make in (("then_branch", one), ("else_branch", many)):
        branch = t.g.branch()
        value = make(branch)
        branch.output(value.name or "", value, ir.DataType.FLOAT, [f"{value.name}:{i}" for i in range(rank)])
        bodies[name] = branch.graph(name)
    return t.g.op("If", t.single_step, **bodies)


def as_ring(x_TD: Tensor, size: int) -> Tensor:
    """Return the last rows where a ring has them, zeros in places that are empty."""
    ring = x_TD.new_zeros((size, *x_TD.shape[1:]))
    first = max(0, len(x_TD) - size)
    ring[torch.arange(first, len(x_TD)) % size] = x_TD[first:]
    return ring


def split_heads(t: Trace, x: ir.Value, heads: int) -> ir.Value:
    """Return (1, H, T, E) of (1, T, H·E)."""
    g = t.g
    return g.op(
        "Transpose", g.op("Reshape", x, ints(1, -1, heads, t.config.width // heads)), perm=(0, 2, 1, 3)
    )


def join_heads(t: Trace, x: ir.Value) -> ir.Value:
    """Return (1, T, D) of (1, H, T, E)."""
    g = t.g
    return g.op("Reshape", g.op("Transpose", x, perm=(0, 2, 1, 3)), ints(1, -1, t.config.width))


def linear(t: Trace, name: str, x: ir.Value) -> ir.Value:
    """Return x Wᵀ, with the bias where there is one."""
    bias: Array | None = t.weights.get(f"{name}.bias")
    with t.g.at(name.rpartition(".")[2]):
        return t.matrix(f"{name}.weight").product(x, bias)
