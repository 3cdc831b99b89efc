"""An LSTM: ONNX Runtime's own, which in int8 quantizes its input and what it says as it goes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from torch import Tensor

from sdgm_edge.models import Mixer, ModelConfig

from ..builder import CONTRIB, Array, ints
from ..layers import Trace
from ..matrices import quantize_columns
from .mixer import Carried, Pieces, piece


def pieces(config: ModelConfig) -> Pieces:
    """What it says, and what it holds."""
    shape = (1, 1, config.width)
    return {"hidden": shape, "cell": shape}


def mix(t: Trace, layer: int, x: ir.Value) -> ir.Value:
    """Run it over all tokens of the call."""
    g, weights, D = t.g, f"blocks.{layer}.mixer.lstm", t.config.width
    matrices = [f"{weights}.weight_ih_l0", f"{weights}.weight_hh_l0"]
    of_input, of_hidden = (_reordered(t.weights[name]) for name in matrices)
    biases = [_reordered(t.weights[f"{weights}.bias_{kind}_l0"]) for kind in ("ih", "hh")]
    bias = np.concatenate(biases)[None]
    hidden, cell = piece(layer, "hidden"), piece(layer, "cell")
    before = (None, t.state[hidden], t.state[cell])
    x_TBD = g.op("Transpose", x, perm=(1, 0, 2))
    precision = t.plan[matrices[0]]
    if precision == "int8":
        (codes, scales), (codes_hidden, scales_hidden) = (
            quantize_columns(np.ascontiguousarray(weight.T)) for weight in (of_input, of_hidden)
        )
        zeros = np.zeros((1, 4 * D), np.int8)
        held = (codes[None], codes_hidden[None], bias, *before)
        scaled = (None, scales[None], zeros, scales_hidden[None], zeros)
        outputs = g.ops(3, "DynamicQuantizeLSTM", x_TBD, *held, *scaled, domain=CONTRIB, hidden_size=D)
    elif precision == "fp32":
        outputs = g.ops(3, "LSTM", x_TBD, of_input[None], of_hidden[None], bias, *before, hidden_size=D)
    else:
        raise ValueError(f"an LSTM is held in fp32 or int8, got {precision}")
    said, t.state[hidden], t.state[cell] = outputs
    return g.op("Transpose", g.op("Squeeze", said, ints(1)), perm=(1, 0, 2))  # from (T, 1, B, D)


def carried(mixer: Mixer, state: tuple[Tensor, ...], inputs_TD: Tensor, position: int) -> Carried:
    """As torch has them."""
    return {"hidden": state[0][None], "cell": state[1][None]}


def _reordered(weight: Array) -> Array:
    """Return gates i, f, g, o in ONNX's order: i, o, f, g."""
    i, f, g, o = np.split(weight, 4)
    return np.concatenate([i, o, f, g])
