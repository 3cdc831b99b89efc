"""What a trained model costs on a device, as a comparison records it beside the trial: `inference.json`.

A process of the exporter (`python -m sdgm_edge.export.inference FOLDER CONTEXTS`) makes the int8 graph of the
model, holds it against the model, and measures it after each context, in processes of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from sdgm_edge.run import read_json, write_json
from sdgm_edge.runtime import ContextCost

INFERENCE = "inference.json"
CONTEXTS = (0, 128, 1024, 4096, 16384)
TOKENS = 64
"""That are decoded after each context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inference:
    """The int8 graph of a trial's model, and what it costs."""

    reason: str | None = None
    """Why there is no graph."""
    graph_bytes: int | None = None
    window: int = 0
    """Tokens that the model reads before it begins afresh; 0 for one that never does."""
    costs: Mapping[int, ContextCost] = field(default_factory=dict)
    """By context."""

    @property
    def first_token(self) -> float | None:
        """Seconds until a fresh process has its first token, the median over contexts."""
        return median(cost.first_token for cost in self.costs.values()) if self.costs else None

    def beyond(self, context: int) -> bool:
        """Whether what is decoded after a context goes beyond the model's window."""
        return 0 < self.window < context + TOKENS

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "costs": {str(context): asdict(c) for context, c in self.costs.items()}}

    @classmethod
    def read(cls, folder: Path) -> Inference | None:
        """Read what `write` left in a folder; None where there is nothing yet."""
        if not (folder / INFERENCE).exists():
            return None
        values = read_json(folder / INFERENCE)
        costs = {int(context): ContextCost(**cost) for context, cost in values.pop("costs").items()}
        return cls(**values, costs=costs)

    def write(self, folder: Path) -> None:
        """Leave it in a folder, whole or not at all."""
        write_json(folder / INFERENCE, self.to_dict())
