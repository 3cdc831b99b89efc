"""GFNet's global filter, made causal: a product in the frequency domain, one filter for each feature.

GFNet multiplies the spectrum of a whole window, which is a circular convolution and sees the future. Here
the learned spectrum has 2L points; of its impulse response the half before time zero is dropped, and the
window is padded so that nothing goes around. So a token sees the last L.

    y_t = Σ_{0≤τ<L} h_τ · x_{t−τ},   h = first half of irfft(filter)

Shapes: T time, B batch, D width, L window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .mixer import Layout, Mixer, State, slide

if TYPE_CHECKING:
    from ..config import ModelConfig


class GlobalFilter(Mixer):
    """A long convolution whose filter is learned as a spectrum."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.window = config.window
        self.filter = nn.Parameter(0.02 * torch.randn(config.window + 1, config.width, 2))  # real, imaginary

    @staticmethod
    def layout(config: ModelConfig) -> Layout:
        """The tokens before."""
        return (("tail", (config.window - 1, config.width)),)

    def response(self) -> Tensor:
        """Return the causal impulse response h, (L, D)."""
        filter_ = torch.complex(*self.filter.unbind(-1))
        both_sides: Tensor = torch.fft.irfft(filter_, n=2 * self.window, dim=0)
        return both_sides[: self.window]

    def forward(self, x_TBD: Tensor, state: State, position: int) -> tuple[Tensor, State]:
        """Convolve by FFT."""
        padded, tail = slide(x_TBD.float(), state[0])
        size = len(padded) + self.window
        response = torch.fft.rfft(self.response(), n=size, dim=0)[:, None]
        spectrum = torch.fft.rfft(padded, n=size, dim=0) * response
        return torch.fft.irfft(spectrum, n=size, dim=0)[self.window - 1 : len(padded)], (tail,)

    def naive(self, x_TD: Tensor) -> Tensor:
        """As the formula reads."""
        h = self.response()
        return torch.stack(
            [
                sum((h[lag] * x_TD[t - lag] for lag in range(min(t + 1, self.window))), torch.zeros(()))
                for t in range(len(x_TD))
            ]
        )
