"""What a graph must pass before it may be written into a bundle.

*Parity*: the graph computes what the model computes. Torch runs token by token, ONNX Runtime the same tokens
cut at odd places, several sequences at once; logits, mixing vectors and the state after the last token are
held against each other, for several seeds. Torch is given the weights as the variant holds them, so what is
left is the rounding of activations, and a mistake in the graph cannot hide behind the loss of quantization.

*Accuracy*: what the variant loses against float32, in bits per byte of the run's held-out text.

All failures are collected before one error tells them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdgm_edge.models import SDGM, ModelConfig
from sdgm_edge.runtime import AccuracyError, Engine, ExportError, ParityError, Score, chunk_nlls, score_chunks

from .builder import Array
from .matrices import Plan
from .variants import Variant

STEPS = 512
SEEDS = (0, 1, 2)
BATCH = 2
FEW_WORDS = 5
ORDINARY = 16.0
"""Logits in float32 up to here may differ by the tolerance itself, larger ones in proportion."""
LEAST = 1e-3
"""A part whose numbers all stay below this is as good as empty: it is measured as if they reached it."""
COUNTS = ("clock", "copy.ids")
"""Pieces of the state that hold whole numbers, which no variant rounds."""
PIECES = (1, 1, 2, 3, 7, 16, 61, 128)
"""Lengths that prompts are cut into, where a call takes so many; longer ones are cut to what it takes."""


@dataclass(frozen=True, slots=True)
class Parity:
    """Largest differences between torch and ONNX Runtime, over all seeds.

    As `difference` measures them: of float32 max |Δ|, of all else max |Δ| relative to the largest number.
    """

    logits: float
    state: float
    """Of the state after the last token, the worst of its pieces."""
    mixing: float
    tolerance: float
    """What was allowed."""
    steps: int
    """Tokens of each sequence."""
    seeds: int
    """Batches of sequences that were compared."""

    def to_dict(self) -> dict[str, Any]:
        """Return the figures for the manifest, in three digits."""
        return {name: _digits(value) for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A variant's score on the held-out text, beside that of float32."""

    bits_per_byte: float | None
    """None where `<unk>` occurs."""
    word_perplexity: float | None
    """None where no float holds it, as of text without white space."""
    token_perplexity: float
    """Depends on the tokenizer."""
    loss_increase: float
    """Relative increase of bits per byte (of −ln p, which is the same), against float32."""
    perplexity_increase: float | None
    """Relative increase of the word perplexity; None where no float holds it."""
    limit: float
    """Largest loss_increase that passes."""
    num_tokens: int
    num_bytes: int
    sha256: str
    """Of the text."""

    @property
    def within(self) -> bool:
        """Whether the loss is within its limit."""
        return self.loss_increase <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """Return the figures for the manifest."""
        return {name: _digits(value, 6) for name, value in asdict(self).items()}


def check_finite(weights: Mapping[str, Array], where: Path) -> None:
    """Refuse weights that are no numbers. Raises ExportError."""
    for name, weight in weights.items():
        if not np.isfinite(weight).all():
            raise ExportError(
                f"{where}: {name}: expected finite weights, got {weight[~np.isfinite(weight)][0]}; "
                "the training went astray: train anew with a lower learning rate"
            )


def check_half(plan: Plan, weights: Mapping[str, Array]) -> None:
    """Refuse matrices that float16 cannot hold, where it is to. Raises ExportError."""
    most = float(np.finfo(np.float16).max)
    for name, precision in plan.items():
        if precision == "fp16" and (largest := float(np.abs(weights[name]).max())) > most:
            raise ExportError(
                f"fp16: {name}: expected weights up to {most:g}, which float16 can hold, got {largest:g}; "
                "ask for 32 bits"
            )


def check_parity(
    variant: Variant, model: SDGM, engine: Engine, steps: int = STEPS, preview: SDGM | None = None
) -> Parity:
    """Hold a graph against a model with the weights that the graph stands for.

    `preview`, where the head is screened: the model that gives the preview's logits. Each logit is then held
    against the nearer of the two; whether those words are exact that should be, the accuracy gate tells.

    Raises:
        ParityError: it computes something else; the message tells all that differs.
    """
    exact = variant.name == "fp32"
    rngs = [np.random.default_rng(seed) for seed in SEEDS]
    ids = [rng.integers(0, model.config.vocab_size, (BATCH, steps)) for rng in rngs]
    for ids_BT in ids:
        ids_BT[-1] %= FEW_WORDS  # a text that repeats itself, for a pointer to copy
    outputs = run_torch(model, np.concatenate(ids), exact)
    nearly = None if preview is None else run_torch(preview, np.concatenate(ids), exact)["logits"]
    worst = {"logits": 0.0, "state": 0.0, "mixing": 0.0}
    failures = []
    for seed, rng in enumerate(rngs):
        expected = {part: np.split(values, len(SEEDS))[seed] for part, values in outputs.items()}
        got = run_graph(engine, ids[seed], _cuts(rng, steps, engine.chunk))
        if nearly is not None:
            whole, other = expected["logits"], np.split(nearly, len(SEEDS))[seed]
            nearer = np.abs(got["logits"] - other) < np.abs(got["logits"] - whole)
            expected["logits"] = np.where(nearer, other, whole)
        for part, difference in compare(model.config, expected, got, exact).items():
            kind = part.partition(".")[0]
            worst[kind] = max(worst[kind], difference)
            if not difference <= variant.tolerance:
                failures.append(f"{part} of seed {seed} by {difference:.3g}")
    if failures:
        raise parity_error(variant.name, variant.tolerance, steps, failures)
    return Parity(**worst, tolerance=variant.tolerance, steps=steps, seeds=len(SEEDS))


def parity_error(what: str, tolerance: float, steps: int, failures: Sequence[str]) -> ParityError:
    """Return the error of a graph that differs from its model by more than is allowed."""
    return ParityError(
        f"{what}: the graph does not compute what the model computes: expected differences of at "
        f"most {tolerance:g} over {steps} steps, got {', '.join(failures)}; "
        "check the weights for extreme values, and report it"
    )


def compare(
    config: ModelConfig, expected: Mapping[str, Array], got: Mapping[str, Array], exact: bool
) -> dict[str, float]:
    """Return the differences of the logits, the mixing vectors and each piece of the state."""
    differences = {}
    for part, reference in _parts(config, expected).items():
        found = _parts(config, got)[part]
        if found.shape != reference.shape:
            raise ValueError(f"{part}: expected shape {reference.shape}, got {found.shape}")
        differences[part] = difference(part, reference, found, exact)
    return differences


def difference(part: str, reference: Array, found: Array, exact: bool) -> float:
    """Return max |Δ| of a part, relative to the largest number of its reference.

    `exact`: absolute while numbers are ordinary, up to 1, or `ORDINARY` of logits. Otherwise numbers may be
    small throughout, and are told by their own size; logits by how far words lie apart: what all words of a
    place have in common says nothing, and where a model points it is most of a logit. Counts are held to the
    number itself. What is no number counts as infinite.
    """
    if not (np.isfinite(reference).all() and np.isfinite(found).all()):
        return math.inf
    off = found - reference
    if part == "logits" and not exact:
        off, reference = (x - x.mean(-1, keepdims=True) for x in (off, reference))
    largest, size = float(np.abs(reference).max(initial=0)), 1.0
    if not part.endswith(COUNTS):
        ordinary = ORDINARY if part == "logits" else 1.0
        size = max(1.0, largest / ordinary) if exact else max(LEAST, largest)
    return float(np.abs(off).max(initial=0)) / size


def _parts(config: ModelConfig, outputs: Mapping[str, Array]) -> dict[str, Array]:
    sizes = [math.prod(shape) for _, shape in config.state_layout]
    pieces = np.split(outputs["state"], np.cumsum(sizes)[:-1], axis=1)
    state = {f"state.{name}": piece for (name, _), piece in zip(config.state_layout, pieces, strict=True)}
    return {"logits": outputs["logits"], "mixing": outputs["mixing"], **state}


@torch.no_grad()
def run_torch(model: SDGM, ids_BT: Array, exact: bool = True) -> dict[str, Array]:
    """Return logits, mixing vectors and last state from torch.

    `exact`: step by step, in float64 but for the recurrence, so that differences are mostly the graph's own
    and not the sum of two roundings; a clock in float32, whose large angles the graph rounds alike. Otherwise
    in one window, which is quicker and coarser.
    """
    state = model.initial_state(len(ids_BT))
    ids = torch.from_numpy(ids_BT)
    if not exact:
        logits, mixing, state = model(ids, state)
        return {"logits": logits.numpy(), "state": state.numpy(), "mixing": mixing.numpy()}
    if model.config.layer == "ringing":
        model = copy.deepcopy(model).double()
    all_logits, all_mixing = [], []
    for ids_B in ids.T:
        logits, mixing, state = model.step(ids_B, state.to(model.bias.dtype))
        all_logits.append(logits)
        all_mixing.append(mixing)
    return {
        "logits": torch.stack(all_logits, 1).numpy(),
        "state": state.numpy(),
        "mixing": torch.stack(all_mixing, 1).numpy(),
    }


def run_graph(engine: Engine, ids_BT: Array, lengths: Sequence[int], **feeds: Array) -> dict[str, Array]:
    """Return the same from the graph, fed piece by piece; `feeds` are further inputs."""
    session = engine.opened.session
    state = np.zeros((len(ids_BT), engine.config.state_size), np.float32)
    all_logits, all_mixing, begin = [], [], 0
    for length in lengths:
        ids = np.ascontiguousarray(ids_BT[:, begin : begin + length])
        logits, state, mixing = session.run(
            ["logits", "next_state", "mixing"], {"ids": ids, "state": state, **feeds}
        )
        all_logits.append(logits)
        all_mixing.append(mixing)
        begin += length
    return {"logits": np.concatenate(all_logits, 1), "state": state, "mixing": np.concatenate(all_mixing, 1)}


def _cuts(rng: np.random.Generator, steps: int, chunk: int) -> list[int]:
    """Return lengths of pieces that sum to `steps`."""
    lengths: list[int] = []
    while (left := steps - sum(lengths)) > 0:
        lengths.append(min(int(rng.choice(PIECES)), left, chunk))
    return lengths


def score_graph(engine: Engine, text: str, ids: Sequence[int], begin_token: int, has_unk: bool) -> Score:
    """Score a text from its tokens, as the runtime does."""
    chunks = (list(ids[at : at + engine.chunk]) for at in range(0, len(ids), engine.chunk))
    nlls = (nll_T for _, nll_T in chunk_nlls(engine, chunks, begin_token))
    return score_chunks(text, nlls, has_unk=has_unk)


def accuracy(score: Score, reference: Score, limit: float) -> Accuracy:
    """Return the figures of a variant beside those of float32."""
    return Accuracy(
        bits_per_byte=None if score.has_unk else score.bits_per_byte,
        word_perplexity=_finite(score.word_perplexity),
        token_perplexity=score.token_perplexity,
        loss_increase=score.nll / reference.nll - 1,
        perplexity_increase=_finite(perplexity_increase(score.nll - reference.nll, score.num_words)),
        limit=limit,
        num_tokens=score.num_tokens,
        num_bytes=score.num_bytes,
        sha256=score.sha256,
    )


def perplexity_increase(more: float, count: int) -> float:
    """Return the relative increase of a perplexity by so many more nats over so many words or tokens.

    Of the difference, and not of two perplexities: these may be more than a float holds.
    """
    return math.expm1(more / count) if more / count < 709 else math.inf


def refuse(name: str, found: Accuracy) -> AccuracyError:
    """Make the error for a variant that loses too much."""
    return AccuracyError(
        f"{name}: loses too much on the held-out text: expected at most {found.limit:.2%} more bits per "
        f"byte than float32, got {found.loss_increase:.2%}; "
        "allow it with --max-loss-increase or --force, or ask for more bits"
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _digits(value: Any, digits: int = 3) -> Any:
    return _finite(float(f"{value:.{digits}g}")) if isinstance(value, float) else value
