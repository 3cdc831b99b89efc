"""What the parts of the graph share: the model on its way into it, and small compositions of nodes.

Shapes: B batch, T time, D width, W width of the convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from sdgm_edge.models import ModelConfig

from .builder import Array, Builder, floats, ints
from .matrices import Matrix, Plan

NORM_EPSILON = 1e-6
TO_THE_END = np.iinfo(np.int64).max


@dataclass(slots=True)
class Trace:
    """A model on its way into a graph."""

    g: Builder
    config: ModelConfig
    weights: Mapping[str, Array]
    """The model's state dict, in float32."""
    plan: Plan
    chunk: int
    """Most tokens that one call takes."""
    ids: ir.Value
    """Token ids (B, T)."""
    start: ir.Value
    """First position whose logits are asked for: given as a number, held as a vector of one."""
    num_steps: ir.Value = field(init=False)
    """T, as a vector of one."""
    single_step: ir.Value = field(init=False)
    """Whether T = 1."""
    num_atoms: ir.Value | None = None
    """K, as a vector of one, where atoms ring."""
    state: dict[str, ir.Value] = field(default_factory=dict)
    """Pieces of the state by name; each part of the graph puts the next one in the place of what it read."""
    reach: Mapping[str, float] = field(default_factory=dict)
    """By matrix, the largest number that is expected in what it is multiplied with (`reach.py`)."""
    shared: dict[str, tuple[ir.Value, ...]] = field(default_factory=dict)
    """What layers compute alike, by a name: the first puts it here."""

    def __post_init__(self) -> None:
        g = self.g
        self.num_steps = g.op("Shape", self.ids, start=1, end=2)
        self.single_step = g.op("Equal", self.num_steps, ints(1))
        self.start = g.op("Reshape", self.start, ints(1))

    def weight(self, name: str) -> ir.Value:
        """Add a weight of the model in float32."""
        return self.g.constant(self.weights[name], path(name))

    def matrix(
        self,
        weight: str,
        array: Array | None = None,
        *,
        rows: bool = False,
        atoms: tuple[int, int] | None = None,
    ) -> Matrix:
        """Add a matrix of the model in its precision; `array` where it is laid out otherwise there."""
        name = path(weight).removesuffix(".weight")
        array = self.weights[weight] if array is None else array
        reach = self.reach.get(weight)
        return Matrix(self.g, name, array, self.plan[weight], rows=rows, reach=reach, atoms=atoms)


def path(name: str) -> str:
    """Return what a weight of the model is called in the graph."""
    return name.replace("blocks.", "layers.", 1)


def silu(g: Builder, x: ir.Value) -> ir.Value:
    """x · sigmoid(x), which ONNX Runtime makes one node."""
    return g.op("Mul", x, g.op("Sigmoid", x))


def activate(g: Builder, name: str, x: ir.Value) -> ir.Value:
    """Apply the activation of that name over the last dimension."""
    if name == "identity":
        return x
    if name == "silu":
        return silu(g, x)
    if name == "gelu":
        return g.op("Gelu", x, approximate="tanh")
    return g.op({"softmax": "Softmax", "tanh": "Tanh"}[name], x)


def norm(t: Trace, name: str, x: ir.Value) -> ir.Value:
    """Divide by the root of the mean square."""
    return t.g.op("RMSNormalization", x, t.weight(f"{name}.weight"), axis=-1, epsilon=NORM_EPSILON)


def asked(t: Trace, x: ir.Value) -> ir.Value:
    """Return x (B, T, …) at the positions whose logits are asked for, (B, U, …)."""
    return t.g.op("Slice", x, t.start, ints(TO_THE_END), ints(1))


def with_tail(t: Trace, x: ir.Value, piece: str) -> ir.Value:
    """Return x with the tail of W − 1 tokens before it, (B, W − 1 + T, D), and keep the new tail."""
    width = t.config.conv_width
    if width == 1:
        return x
    padded = t.g.op("Concat", t.state[piece], x, axis=1)
    t.state[piece] = t.g.op("Slice", padded, ints(1 - width), ints(TO_THE_END), ints(1))
    return padded


def taps(t: Trace, x: ir.Value, padded: ir.Value) -> list[ir.Value]:
    """Return the W shifts of `padded` that a causal convolution sums, each (B, T, D), the oldest first."""
    width = t.config.conv_width
    older = [t.g.op("Slice", padded, ints(tap), ints(tap + 1 - width), ints(1)) for tap in range(width - 1)]
    return [*older, x]


def depthwise(t: Trace, name: str, x: ir.Value, piece: str) -> ir.Value:
    """Convolve every channel, an atom each, with its own W taps.

    Products and sums of shifts: Conv wants the channels before the time, and is slow for a single token.
    """
    g, where, atoms = t.g, path(name), (0, 1, 1)
    total = g.constant(t.weights[f"{name}.bias"], f"{where}.bias", atoms=atoms)
    shifted = taps(t, x, with_tail(t, x, piece))
    for i, (tap, weight_D) in enumerate(zip(shifted, t.weights[f"{name}.weight"], strict=True)):
        weight = g.constant(weight_D, f"{where}.weight.{i}", atoms=atoms)
        total = g.op("Add", g.op("Mul", tap, weight), total)
    return total


def scan(
    g: Builder,
    x: ir.Value,
    inputs: Sequence[ir.Value],
    b: ir.Value,
    shapes: Sequence[Sequence[int | str]],
    fade: Callable[..., ir.Value],
) -> ir.Value:
    """Walk x_t = fade(x_{t−1}, inputs_t) + b_t along the time, axis 1, and return fade(…) of every step.

    Not x_t, which the body would have to copy: to add b again costs less. `fade` is given the builder of the
    body, x and the inputs of one step; `shapes` are those of x, of each input and of b at one step.
    """
    body = g.branch()
    values = [body.input(f"{i}:{x.name}", ir.DataType.FLOAT, shape) for i, shape in enumerate(shapes)]
    faded = fade(body, *values[:-1])
    for value in (body.op("Add", faded, values[-1]), faded):
        body.output(value.name or "", value, ir.DataType.FLOAT, shapes[0])
    count = len(inputs) + 1
    return g.ops(
        2,
        "Scan",
        x,
        *inputs,
        b,
        body=body.graph("body"),
        num_scan_inputs=count,
        scan_input_axes=(1,) * count,
        scan_output_axes=(1,),
    )[1]


def gated_unit(t: Trace, layer: int, x: ir.Value) -> ir.Value:
    """W_out (silu(gate) · value)."""
    g, weights = t.g, f"blocks.{layer}.unit"
    with g.at("expand"):
        expanded = t.matrix(f"{weights}.expand.weight").product(x)
    gate, value = g.ops(2, "Split", expanded, axis=-1, num_outputs=2)
    hidden = g.op("Mul", silu(g, gate), value)
    with g.at("contract"):
        return t.matrix(f"{weights}.contract.weight").product(hidden)


def blend(t: Trace, mixing: ir.Value, eta: ir.Value, drawn: ir.Value) -> ir.Value:
    """c ← (1 − η) c + η z."""
    g = t.g
    kept = g.op("Mul", g.op("Sub", floats(1), eta), mixing)
    return g.op("Add", kept, g.op("Mul", eta, drawn))
