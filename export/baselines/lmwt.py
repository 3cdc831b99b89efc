"""The Haar pyramid as a convolution.

Every level scales and adds two shifts of the one before, so the whole pyramid is one impulse response: what
it makes of a one at time zero. It is climbed once, from its few numbers while the graph is loaded, and then a
token costs one product in place of several nodes for every level.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from torch import Tensor

from sdgm_edge.models import Mixer, ModelConfig

from ..builder import Array, Builder, ints
from ..layers import TO_THE_END, Trace
from .convolution import convolve, inputs
from .mixer import Carried, Pieces, as_ring, linear


def pieces(config: ModelConfig) -> Pieces:
    """The last inputs."""
    return inputs(_size(config), config.width)


def mix(t: Trace, layer: int, x: ir.Value) -> ir.Value:
    """Convolve with the response, whose oldest tap is the first."""
    g, weights, size = t.g, f"blocks.{layer}.mixer", _size(t.config)
    low, high, gain = (t.weights[f"{weights}.{name}"] for name in ("low", "high", "gain"))
    with g.at("pyramid"):
        average = g.op("Pad", np.ones((1, t.config.width), np.float32), ints(size - 1, 0, 0, 0))
        details = []
        for j in range(len(low)):
            after = g.op("Slice", average, ints(2**j), ints(TO_THE_END), ints(0))
            shifted = g.op("Pad", after, ints(0, 0, 2**j, 0))
            details.append(_sum(g, average, gain[j + 1] * high[j, 0], shifted, -gain[j + 1] * high[j, 1]))
            average = _sum(g, average, low[j, 0], shifted, low[j, 1])
        response = g.op("Sum", *details, g.op("Mul", average, gain[0]))
    return linear(t, f"{weights}.output", convolve(t, layer, x, response, size))


def carried(mixer: Mixer, state: tuple[Tensor, ...], inputs_TD: Tensor, position: int) -> Carried:
    """The ring of the last inputs; torch has averages of them."""
    return {"inputs": as_ring(inputs_TD, state[0].shape[1] + 1)[None]}


def _size(config: ModelConfig) -> int:
    """Return how many tokens the pyramid sees."""
    return 1 << max(1, config.window.bit_length() - 1)


def _sum(g: Builder, x: ir.Value, of_x: Array, y: ir.Value, of_y: Array) -> ir.Value:
    return g.op("Add", g.op("Mul", x, of_x), g.op("Mul", y, of_y))
