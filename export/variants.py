"""The variants of a graph: what each is called, how it holds the model's matrices, how near it must stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from sdgm_edge.models import SDGM, ModelConfig
from sdgm_edge.runtime import BundleConfig, UsageError

from .builder import Array
from .graph import build_graph, matrix_names, weights_of
from .matrices import Plan, Precision, as_held
from .screening import Previewed, Screen

ROWS: Mapping[int, Precision] = {8: "rows8", 4: "rows4"}
"""By bits, the precision in which several tokens at once give what they give one by one."""
CHUNK = {"ringing": 128, "clock": 16}
"""Most tokens that one call takes; fewer for a clock, whose atoms are a whole dictionary for each token."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to hold a model's matrices."""

    name: str
    """As the manifest calls it."""
    bits: int
    """As the command line asks for it."""
    matrices: Precision
    embedding: Precision
    """The embedding is also the head; its rows are looked up, which int8 by columns cannot give."""
    tolerance: float
    """Largest difference to torch with the same rounded weights, as `gates.Parity` measures it.

    fp32: two orders of the same sums. The others round activations at every product: to 11 bits in fp16; in
    int8 to 8 bits over all tokens of a call, in q8 and q4 over a block of one token; and the recurrence
    carries that on. A wrong graph is off by about 1.
    """

    @property
    def file(self) -> str:
        """Name of its file in a bundle."""
        return "model.onnx" if self.name == "fp32" else f"model_{self.name}.onnx"

    def plan(self, weights: Mapping[str, Array], names: Iterable[str] | None = None) -> dict[str, Precision]:
        """Return the precision of the embedding and of every matrix; `names` are those of a baseline.

        A pointer looks up the rows of all words in its window, which q8 takes long for. Where atoms lie side
        by side in 4 bits, blocks are small: any multiple of 32 atoms can be kept (`runtime/atoms.py`).
        """
        names = matrix_names(weights) if names is None else names
        points = "pointer.key.weight" in weights
        embedding = "rows8" if points and self.bits == 8 else self.embedding
        plan = {**dict.fromkeys(names, self.matrices), "embedding.weight": embedding}
        if self.bits == 4:
            plan |= {name: "rows4" for name in plan if name.endswith(".atoms.synthesis.weight")}
        return plan

    def by_rows(self) -> Variant:
        """Return the same with products that round each token's activations as if it were alone.

        Several tokens at once then give, bit for bit, what they give one by one: drafts can be checked.
        """
        if self.bits not in ROWS:
            return self
        return replace(self, matrices=ROWS[self.bits], embedding=ROWS[self.bits])


VARIANTS = {
    v.bits: v
    for v in (
        Variant("int8", 8, "int8", "q8", 0.25),
        Variant("q4", 4, "q4", "q4", 0.25),
        Variant("fp32", 32, "fp32", "fp32", 1e-4),
        Variant("fp16", 16, "fp16", "fp16", 0.02),
    )
}
"""By bits, the one that a bundle runs by default first."""


def variant_of(bits: int) -> Variant:
    """Return the variant of that many bits. Raises UsageError."""
    if bits not in VARIANTS:
        known = ", ".join(str(b) for b in sorted(VARIANTS))
        raise UsageError(f"bits: expected one of {known}, got {bits!r}; 8 is what --quantize gives")
    return VARIANTS[bits]


def bundle_config(config: ModelConfig) -> BundleConfig:
    """Return what a bundle tells the runtime of a model."""
    return BundleConfig(
        vocab_size=config.vocab_size,
        state_size=config.state_size,
        mixing_size=config.mixing_size,
        chunk=CHUNK[config.layer],
        model=config.to_dict(),
    )


def build(
    config: ModelConfig,
    weights: Mapping[str, Array],
    plan: Plan,
    screen: Screen | None = None,
    reach: Mapping[str, float] | None = None,
) -> bytes:
    """Return the bytes of a graph; the same model, plan, screen and reach give the same bytes."""
    model = build_graph(config, weights, plan, CHUNK[config.layer], screen, reach)
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return data


def model_as_held(model: SDGM, plan: Plan, screen: Screen | None = None) -> SDGM:
    """Return a copy of the model whose matrices are rounded as the plan's variant holds them.

    With a screen, one whose logits are all the preview's.
    """
    import torch

    held = SDGM(model.config) if screen is None else Previewed(model.config, screen)
    weights = weights_of(model)
    rounded = {name: as_held(weight, plan.get(name, "fp32")) for name, weight in weights.items()}
    held.load_state_dict({name: torch.from_numpy(weight.copy()) for name, weight in rounded.items()})
    return held.eval()
