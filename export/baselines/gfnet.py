"""GFNet: a convolution with the causal half of what its spectrum responds."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from torch import Tensor

from sdgm_edge.models import Mixer, ModelConfig

from ..layers import Trace
from .convolution import convolve, inputs
from .mixer import Carried, Pieces, as_ring


def pieces(config: ModelConfig) -> Pieces:
    """The last inputs."""
    return inputs(config.window, config.width)


def mix(t: Trace, layer: int, x: ir.Value) -> ir.Value:
    """Convolve with the response."""
    spectrum, L = t.weights[f"blocks.{layer}.mixer.filter"], t.config.window
    both_sides = np.fft.irfft(spectrum[..., 0] + 1j * spectrum[..., 1], n=2 * L, axis=0)
    response = both_sides[:L][::-1].astype(np.float32)
    return convolve(t, layer, x, t.g.constant(response, f"layers.{layer}.response"), L)


def carried(mixer: Mixer, state: tuple[Tensor, ...], inputs_TD: Tensor, position: int) -> Carried:
    """The ring of them."""
    return {"inputs": as_ring(inputs_TD, state[0].shape[1] + 1)[None]}
