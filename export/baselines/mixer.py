"""What the graph of a mixer is made of, and what several of them share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeAlias

import onnx_ir as ir
from torch import Tensor

from sdgm_edge.models import Mixer, ModelConfig

from ..builder import Array, ints
from ..layers import Trace

POSITION = "position"
CAPACITY = "capacity"
"""The dimension of a cache; `capacity/4` of one that takes a place for every four tokens."""

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
