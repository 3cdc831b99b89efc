"""How far two forms of the same computation may be apart, and why, in one place."""

FORMS = 1e-5
"""Naive, window and step forms in float32: rounding of sums in another order, values of order one."""

GRADIENT = 2e-5
"""Hand-written against automatic gradients in float32, relative: two passes of rounding."""

SPECTRUM = 1e-3
"""Squared STFT magnitudes by a matrix against by FFT: sums of 256 terms, values up to some hundreds."""

LOG_DENSITY = 1e-2
"""Log densities over tens of dimensions in float32 against scikit-learn's float64, in nats."""

BF16 = 1e-2
"""Sums over many products in bfloat16 (8 bits) against float32, relative to the largest."""
