"""Ringing atoms: every token strikes the dictionary, and each atom rings on as a damped sinusoid.

    v_t, f_t, g_t                                       strike, ring, listen: what x_t and its last tokens
                                                        say to each atom (`strikes.py`)
    z_t = f_t · e^{iω} · z_{t−1} + (1 − f_t) · v_t      K complex numbers of state
    c_t = g_t · z_t                                     the mixing vector
    x̂_t[d] = Σ_k Re c_t[k] · A[k,d] cos Φ[k,d] − Im c_t[k] · A[k,d] sin Φ[k,d]

The dictionary (A, Φ) is held as the two matrices A cos Φ and −A sin Φ, one on top of the other, so that
synthesis is one product; amplitude and phase are read back from them. ω and λ are learned.

Shapes: T time, B batch, D width, K atoms; 2 is real and imaginary part.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config import ModelConfig
from .layers import LockedDropout
from .ring import FEW, ring_chunks, ring_steps
from .strikes import Striking, new_damping

OMEGA_RANGE = (1e-3, math.pi)


class RingingAtoms(Striking):
    """The spectral layer that the product runs on."""

    state_names = ("conv", "atoms")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, K = config.width, config.num_atoms
        self.num_atoms = K
        self._add_strikes(config)
        self.dropout = LockedDropout(config.atom_dropout)
        self.synthesis = nn.Linear(2 * K, D, bias=False)  # weight: (D, [A cos Φ | −A sin Φ])
        omega = torch.zeros(K)
        turning = round(K * config.turning)
        omega[:turning] = torch.logspace(math.log10(OMEGA_RANGE[0]), math.log10(OMEGA_RANGE[1]), turning)
        self.omega = nn.Parameter(omega)
        # Damping has an order of its own, so that there are short and long atoms at every pitch.
        self.damping = nn.Parameter(new_damping(config)[torch.arange(K) * _coprime(K) % K])

    @property
    def amplitude(self) -> Tensor:
        """The dictionary's amplitudes A, (K, D)."""
        return torch.hypot(*self.synthesis.weight.T.chunk(2))

    @property
    def phase(self) -> Tensor:
        """The dictionary's phases Φ, (K, D)."""
        cosine, minus_sine = self.synthesis.weight.T.chunk(2)
        return torch.atan2(-minus_sine, cosine)

    def forward(
        self, x_TBD: Tensor, conv_BWK: Tensor, atoms_B2K: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Return x̂ (T, B, D), the mixing vectors (T, B, 2K) and the new state, for a whole window."""
        v_TBK, f_TBK, g_TBK, conv_BWK = self._strikes(x_TBD, conv_BWK)
        few = x_TBD.shape[1] * self.num_atoms <= FEW
        ring = ring_chunks if x_TBD.is_cuda or few else ring_steps
        z_TB2K = ring(v_TBK, f_TBK, self.omega, atoms_B2K)
        mixing_TB2K = g_TBK[:, :, None] * z_TB2K
        rebuilt_TBD = self.synthesis(self.dropout(mixing_TB2K).flatten(2))
        return rebuilt_TBD, mixing_TB2K.flatten(2), (conv_BWK, z_TB2K[-1])

    def step(
        self, x_BD: Tensor, conv_BWK: Tensor, atoms_B2K: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Return x̂ (B, D), the mixing vector (B, 2K) and the new state, for one token."""
        *struck, conv_BWK = self._strikes(x_BD[None], conv_BWK)
        v, f, g = (part[0] for part in struck)
        real, imag = atoms_B2K.unbind(1)
        cos, sin = torch.cos(self.omega), torch.sin(self.omega)
        atoms_B2K = torch.stack(
            [f * (cos * real - sin * imag) + (1 - f) * v, f * (sin * real + cos * imag)], dim=1
        )
        mixing_BM = (g[:, None] * atoms_B2K).flatten(1)
        return self.synthesis(mixing_BM), mixing_BM, (conv_BWK, atoms_B2K)

    def naive(self, x_TD: Tensor) -> Tensor:
        """Return x̂ (T, D) of one sequence from its start, as the formula at the head of this file reads."""
        z = torch.zeros(self.num_atoms, dtype=torch.complex128)
        turn = torch.exp(1j * self.omega.double())
        atoms = self.amplitude.double() * torch.exp(1j * self.phase.double())
        out = []
        for v, f, g in self._naive_strikes(x_TD):
            z = f * turn * z + (1 - f) * v
            c = g * z
            out.append((c[:, None] * atoms).real.sum(0))
        return torch.stack(out)


def _coprime(count: int) -> int:
    """Return a step near the golden section of `count` that visits every index once."""
    return next(step for step in range(max(1, round(count * 0.618)), count + 2) if math.gcd(step, count) == 1)
