"""Whether a bundle does on this machine what it did where it was exported.

All hashes are checked, every variant is opened and held against the graph contract, and the golden prompt is
run: the golden tokens are fed one by one, whatever this machine would have chosen, so that steps compare. A
step agrees where no logit differs by more than the variant's tolerance, and the golden token is the likeliest
here too, up to that tolerance. Float32 may differ as much as another processor's order of additions makes it;
quantized and half precision kernels round differently on each kind of processor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .bundle import read_bundle
from .encoding import encode
from .generator import Generator
from .manifest import VERSION, Golden
from .providers import onnxruntime

TOLERANCES = {"fp32": 1e-3, "fp16": 0.1, "int8": 0.5, "q4": 0.5}
"""The largest difference of a logit that is no failure, for each variant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantReport:
    """How one variant fares here."""

    variant: str
    """Its name."""
    provider: str
    """Where it ran: cpu, cuda, …"""
    num_tokens: int
    """Golden tokens."""
    num_same: int
    """How many of them are the likeliest here."""
    max_difference: float
    """Largest difference of a logit."""
    tolerance: float
    """What is allowed."""
    ok: bool
    """Whether all steps agree."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What `verify` found; a bundle that is damaged raises instead."""

    path: str
    """The bundle."""
    name: str
    """The model's name."""
    model_id: str
    """The model's hash."""
    version: int
    """Version of the bundle's format."""
    num_files: int
    """Files whose hashes were checked."""
    num_bytes: int
    """Their bytes."""
    prompt_ok: bool
    """Whether the tokenizer gives the golden prompt's tokens."""
    variants: tuple[VariantReport, ...]
    """One for each variant with golden tokens; the others were opened alone."""
    made_with: dict[str, str]
    """Versions of the packages that made it."""
    onnxruntime: str
    """Version of ONNX Runtime here."""

    @property
    def ok(self) -> bool:
        """Whether everything agrees."""
        return self.prompt_ok and all(variant.ok for variant in self.variants)


def verify(
    path: str | Path, *, providers: str | Sequence[str] = "auto", threads: int | None = None
) -> VerifyReport:
    """Check all of a bundle on this machine.

    Raises:
        BundleError: it is damaged, or a graph cannot be opened.
        TokenizerError: its tokenizer cannot encode the golden prompt.
        ProviderError: ONNX Runtime, or a provider that was asked for, is not there.
    """
    bundle = read_bundle(path)
    bundle.check_all()
    manifest = bundle.manifest
    golden = manifest.golden
    reports = []
    for name in manifest.variants:  # one at a time in memory
        generator = Generator.load(path, name, providers, threads)
        if name in golden.tokens:
            reports.append(_compare(generator, golden))
    return VerifyReport(
        path=str(path),
        name=manifest.name,
        model_id=manifest.model_id,
        version=VERSION,
        num_files=len(manifest.files),
        num_bytes=sum(size for _, size in manifest.files.values()),
        prompt_ok=list(encode(bundle.tokenizer, golden.prompt)) == golden.ids,
        variants=tuple(reports),
        made_with=manifest.made_with,
        onnxruntime=onnxruntime().__version__,
    )


def _compare(generator: Generator, golden: Golden) -> VariantReport:
    variant = generator.variant
    tokens, tolerance = golden.tokens[variant], TOLERANCES[variant]
    session = generator.session(history=0)
    session.feed(golden.ids)
    num_same, largest, ok = 0, 0.0, True
    for token, row in zip(tokens, golden.logits[variant], strict=True):
        logits_V = session.logits
        difference = float(np.abs(logits_V[: len(row)] - np.array(row)).max(initial=0.0))
        num_same += int(logits_V.argmax()) == token
        ok = ok and difference <= tolerance and float(logits_V.max() - logits_V[token]) <= tolerance
        largest = max(largest, difference)
        session.push(token)
    return VariantReport(
        variant=variant,
        provider=generator.provider,
        num_tokens=len(tokens),
        num_same=num_same,
        max_difference=largest,
        tolerance=tolerance,
        ok=ok,
    )
