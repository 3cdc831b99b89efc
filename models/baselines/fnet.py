"""FNet, made causal: a Fourier transform over the features and the window, without a learned number.

FNet's layer is the real part of the transform along both. Along time that is a product with the matrix
e^{−2πi tτ/L}; causal is that matrix with its upper triangle struck out, so that a token sees its window up to
itself.

    y_t = Re Σ_{τ≤t} e^{−2πi tτ/L} · DFT(x_τ) / √(L·D)

Positions are learned, as in the original: the next window begins afresh. The state is the window so far.

Shapes: T time, B batch, D width, L window.
"""

from __future__ import annotations

import cmath
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .mixer import Layout, Mixer, State, grow

if TYPE_CHECKING:
    from ..config import ModelConfig


class FNet(Mixer):
    """The lower triangle of a Fourier transform."""

    windowed = True
    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        L = config.window
        time = torch.arange(L)
        angle = 2 * math.pi * (time[:, None] * time % L) / L
        self.register_buffer("cos", (angle.cos() / math.sqrt(L)).tril(), persistent=False)
        self.register_buffer("sin", (angle.sin() / math.sqrt(L)).tril(), persistent=False)

    @staticmethod
    def layout(config: ModelConfig) -> Layout:
        """The window so far."""
        return (("past", (config.window, config.width)),)

    def forward(self, x_TBD: Tensor, state: State, position: int) -> tuple[Tensor, State]:
        """Transform the window up to each token."""
        seen_BJD, past = grow(state[0], x_TBD.transpose(0, 1).float(), position)
        spectrum = torch.fft.fft(seen_BJD, dim=-1, norm="ortho")
        rows, columns = slice(position, position + len(x_TBD)), slice(0, seen_BJD.shape[1])
        mixed_BTD = self.cos[rows, columns] @ spectrum.real + self.sin[rows, columns] @ spectrum.imag
        return mixed_BTD.transpose(0, 1), (past,)

    def naive(self, x_TD: Tensor) -> Tensor:
        """As the formula reads, within one window."""
        L, D = len(self.cos), x_TD.shape[1]
        d = torch.arange(D, dtype=torch.float64)
        features = torch.exp(-2j * math.pi * d[:, None] * d / D)
        out = []
        for t in range(len(x_TD)):
            total = torch.zeros(D, dtype=torch.complex128)
            for past in range(t + 1):
                total += cmath.exp(-2j * math.pi * t * past / L) * (features @ x_TD[past].to(features.dtype))
            out.append(total.real / math.sqrt(L * D))
        return torch.stack(out)
