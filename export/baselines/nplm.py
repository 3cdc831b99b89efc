"""NPLM's local concatenation: the tail, and one product."""

from __future__ import annotations

import onnx_ir as ir
from torch import Tensor

from sdgm_edge.models import Mixer, ModelConfig

from ..layers import Trace, taps, with_tail
from .mixer import Carried, Pieces, linear, piece


def pieces(config: ModelConfig) -> Pieces:
    """The tokens before."""
    return {"tail": (1, config.conv_width - 1, config.width)} if config.conv_width > 1 else {}


def mix(t: Trace, layer: int, x: ir.Value) -> ir.Value:
    """Concatenate, oldest first."""
    near = taps(t, x, with_tail(t, x, piece(layer, "tail")))
    return linear(t, f"blocks.{layer}.mixer.output", t.g.op("Concat", *near, axis=-1))


def carried(mixer: Mixer, state: tuple[Tensor, ...], inputs_TD: Tensor, position: int) -> Carried:
    """As torch has them."""
    return {"tail": state[0]}
