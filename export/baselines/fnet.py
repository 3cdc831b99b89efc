"""FNet: spectra of the tokens so far in two caches, real and imaginary parts, and two products with them.

The transform of a real vector is symmetric: D / 2 + 1 features hold all of it, also after the sums over time.

    A = Σ_τ cos(2π tτ/L) Re x̂_τ,  B = Σ_τ sin(2π tτ/L) Im x̂_τ;   y_d = A_d + B_d,  y_{D−d} = A_d − B_d

The tables of the transform are no weights: they are computed while the graph is loaded.

Shapes: T time, D width, N = D // 2 + 1, L window, J places of the cache.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from sdgm_edge.models import Mixer, ModelConfig

from ..builder import floats, ints
from ..layers import Trace
from .mixer import CAPACITY, Carried, Pieces, piece, place_in, times, write


def pieces(config: ModelConfig) -> Pieces:
    """Half the spectra so far."""
    shape = (1, CAPACITY, config.width // 2 + 1)
    return {"real": shape, "imaginary": shape}


def mix(t: Trace, layer: int, x: ir.Value) -> ir.Value:
    """Transform the window up to each token."""
    g, D = t.g, t.config.width
    num_features = D // 2 + 1
    with g.at("features"):
        turns = g.op("Mod", g.op("Mul", np.arange(D)[:, None], np.arange(num_features)), np.int64(D))
        angle = g.op("Mul", g.op("Cast", turns, to=ir.DataType.FLOAT), floats(2 * math.pi / D))
        scale = floats(1 / math.sqrt(D))
        cos, sin = g.op("Mul", g.op("Cos", angle), scale), g.op("Mul", g.op("Sin", angle), -scale)
        spectrum = g.op("MatMul", x, g.op("Concat", cos, sin, axis=1))
        real, imaginary = g.ops(2, "Split", spectrum, axis=-1, num_outputs=2)
    with g.at("time"):
        where, cosine, sine = _places(t, t.state[piece(layer, "real")])
        a = g.op("MatMul", cosine, write(t, piece(layer, "real"), where, real))
        b = g.op("MatMul", sine, write(t, piece(layer, "imaginary"), where, imaginary))
        mirrored = g.op("Slice", g.op("Sub", a, b), ints(D - num_features), ints(0), ints(2), ints(-1))
        return g.op("Concat", g.op("Add", a, b), mirrored, axis=-1)


def carried(mixer: Mixer, state: tuple[Tensor, ...], inputs_TD: Tensor, position: int) -> Carried:
    """The transforms of the window so far."""
    half = torch.fft.rfft(state[0][:, :position], dim=-1, norm="ortho")
    return {"real": half.real, "imaginary": half.imag}


def _places(t: Trace, cache: ir.Value) -> tuple[ir.Value, ...]:
    """Return where spectra are written, and cosines and sines (T, J) of 2π tτ/L, zero where τ > t."""
    g, L = t.g, t.config.window
    if "places" not in t.shared:
        num_places = g.op("Squeeze", g.op("Shape", cache, start=1, end=2), ints(0))
        time, place = (
            g.op("Unsqueeze", times(t), ints(1)),
            g.op("Range", np.int64(0), num_places, np.int64(1)),
        )
        turns = g.op("Mod", g.op("Mul", g.op("Mod", time, np.int64(L)), place), np.int64(L))
        angle = 2 * np.pi * np.arange(L) / L
        later = g.op("Greater", place, time)
        tables = [np.append(np.float32(f(angle) / math.sqrt(L)), np.float32(0)) for f in (np.cos, np.sin)]
        row = g.op("Where", later, np.int64(L), turns)
        waves = (g.op("Gather", table, row, axis=0) for table in tables)
        t.shared["places"] = (place_in(t, times(t)), *waves)
    return t.shared["places"]
