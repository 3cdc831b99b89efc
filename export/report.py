"""What an export made, and how each variant fared."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .atoms import Reduction
from .gates import Accuracy, Parity
from .screening import Screening


@dataclass(frozen=True, slots=True)
class VariantExport:
    """A variant that passed its gates."""

    name: str
    file: str
    num_bytes: int
    parity: Parity
    accuracy: Accuracy
    at_8_bits: tuple[str, ...]
    """Matrices that a 4-bit variant holds in 8 bits, to stay within its limit."""
    screened: Screening | None
    """How the head is screened, where it is not read whole."""
    decode_speed: float
    """Tokens a second, one by one, on this machine and one thread."""
    prompt_speed: float
    """Tokens a second, in chunks."""


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was exported."""

    path: Path
    name: str
    model_id: str
    default: str
    """The variant that runs unless another is asked for."""
    reference: Accuracy
    """The float32 graph on the held-out text, whether or not it is in the bundle."""
    reduction: Reduction | None
    """Of the atoms, where fewer than all were asked for."""
    variants: tuple[VariantExport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain values."""
        return {
            "path": str(self.path),
            "name": self.name,
            "model_id": self.model_id,
            "default": self.default,
            "reference": self.reference.to_dict(),
            "atoms": None if self.reduction is None else asdict(self.reduction),
            "variants": {
                v.name: {
                    "file": v.file,
                    "bytes": v.num_bytes,
                    "parity": v.parity.to_dict(),
                    "accuracy": v.accuracy.to_dict(),
                    "at_8_bits": list(v.at_8_bits),
                    "screened": v.screened and v.screened.to_dict(),
                    "decode_tokens_per_second": v.decode_speed,
                    "prompt_tokens_per_second": v.prompt_speed,
                }
                for v in self.variants
            },
        }
