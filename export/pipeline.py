"""From a trained run to a bundle: build, hold to the gates, write.

Nothing is written before every variant has passed, and then all at once.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import tokenizers
import torch

from sdgm_edge import __version__
from sdgm_edge.models import SDGM
from sdgm_edge.run import Run, load_run, newest_run
from sdgm_edge.runtime import (
    Engine,
    ExportError,
    ParityError,
    Score,
    UsageError,
    encode_arrays,
    encode_json,
    write_bundle,
)
from sdgm_edge.tokenization import BEGIN_ID, UNKNOWN, Tokenizer

from .builder import Array
from .card import model_card
from .gates import Accuracy, Parity, accuracy, check_parity, refuse, score_graph
from .golden import golden_prompt, golden_steps
from .graph import weights_of
from .matrices import Precision
from .search import Found, mixed_precision
from .variants import CHUNK, VARIANTS, Variant, build, bundle_config, model_as_held, variant_of

MAX_LOSS_INCREASE = 0.01
BUNDLES = Path("bundles")
SPEED_SECONDS = 0.3


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
    variants: tuple[VariantExport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain values."""
        return {
            "path": str(self.path),
            "name": self.name,
            "model_id": self.model_id,
            "default": self.default,
            "reference": self.reference.to_dict(),
            "variants": {
                v.name: {
                    "file": v.file,
                    "bytes": v.num_bytes,
                    "parity": v.parity.to_dict(),
                    "accuracy": v.accuracy.to_dict(),
                    "at_8_bits": list(v.at_8_bits),
                    "decode_tokens_per_second": v.decode_speed,
                    "prompt_tokens_per_second": v.prompt_speed,
                }
                for v in self.variants
            },
        }


def export_run(
    run_path: str | Path | None = None,
    out: str | Path | None = None,
    bits: Iterable[int] = (32,),
    *,
    force: bool = False,
    max_loss_increase: float = MAX_LOSS_INCREASE,
    single_file: bool = False,
    progress: Callable[[str], None] = lambda message: None,
) -> ExportReport:
    """Export a run, the newest by default, as a bundle with a variant for each of `bits`.

    `bits`: 32, 16, 8 (int8) and 4. `out`: a folder, or a file `*.sdgm`; by default `bundles/<name of the
    run>`. `force` writes variants that lose more than `max_loss_increase`, relative, in bits per byte.
    `progress` is told what is being done.

    Raises:
        UsageError: `bits` or `max_loss_increase` make no sense.
        RunError: there is no such run.
        ExportError: it is one of a baseline.
        ParityError: a graph does not compute what the model computes.
        AccuracyError: a variant loses too much.
        BundleError: the bundle cannot be written.
    """
    wanted = {variant_of(b).bits for b in bits}
    if not wanted:
        raise UsageError("bits: expected at least one of 4, 8, 16, 32, got none; leave it out for 32")
    if not (math.isfinite(max_loss_increase) and max_loss_increase >= 0):
        raise UsageError(
            f"max_loss_increase: expected a share from 0, got {max_loss_increase}; "
            "0.01 allows 1% more bits per byte"
        )
    folder = newest_run() if run_path is None else Path(run_path)
    run = load_run(folder)
    if not isinstance(run.model, SDGM):
        raise ExportError(
            f"{folder}: expected a model of {' or '.join(CHUNK)} atoms, got the layer {run.config.layer!r}: "
            "baselines are there to compare with, and are not exported"
        )
    name = folder.resolve().name
    target = BUNDLES / name if out is None else Path(out)
    if single_file and target.suffix != ".sdgm":
        target = target.with_name(f"{target.name}.sdgm")
    exporter = _Exporter(run, run.model, max_loss_increase, force, progress)
    passed = exporter.pass_gates([variant for variant in VARIANTS.values() if variant.bits in wanted])
    progress(f"writing {target}")
    return exporter.write(target, name, passed)


@dataclass(frozen=True, slots=True)
class _Passed:
    variant: Variant
    graph: bytes
    parity: Parity
    accuracy: Accuracy
    at_8_bits: tuple[str, ...]
    golden: dict[str, Any]
    speeds: tuple[float, float]


class _Exporter:
    """One run on its way into a bundle."""

    def __init__(
        self, run: Run, model: SDGM, limit: float, force: bool, progress: Callable[[str], None]
    ) -> None:
        self.run, self.model, self.limit, self.force, self.progress = run, model, limit, force, progress
        self.config = run.config
        self.weights = weights_of(model)
        self.tokenizer = Tokenizer.load(run.tokenizer_path)
        self.tokens = self.tokenizer.encode(run.heldout)
        self.has_unk = self.tokenizer.kind == "word" and self.tokenizer.token_id(UNKNOWN) in self.tokens
        self.prompt = golden_prompt(run.heldout)
        self.prompt_ids = self.tokenizer.encode(self.prompt)
        self.sizes = bundle_config(self.config)

    def pass_gates(self, variants: list[Variant]) -> list[_Passed]:
        """Build all variants and hold them to the gates; float32 is always built, to be the reference."""
        float32 = VARIANTS[32]
        graph = build(self.config, self.weights, float32.plan(self.weights))
        engine = self._engine(graph, float32)
        self.progress("fp32: comparing with torch")
        parity = check_parity(float32, self.model, engine)
        self.progress(f"fp32: scoring {len(self.tokens)} held-out tokens")
        reference = self._score(engine)
        self.reference = accuracy(reference, reference, self.limit)
        passed, failures = [], []
        for variant in variants:
            if variant is float32:
                passed.append(self._passed(variant, graph, engine, parity, self.reference, ()))
                continue
            try:
                passed.append(self._pass(variant, reference))
            except ExportError as failure:
                failures.append(failure)
        if failures:
            kind = ParityError if any(isinstance(f, ParityError) for f in failures) else type(failures[0])
            raise kind("; and ".join(map(str, failures)))
        return passed

    def _pass(self, variant: Variant, reference: Score) -> _Passed:
        def attempt(plan: dict[str, Precision]) -> Found:
            graph = build(self.config, self.weights, plan)
            score = self._score(self._engine(graph, variant))
            return Found(plan, graph, accuracy(score, reference, self.limit))

        self.progress(f"{variant.name}: scoring")
        plan = variant.plan(self.weights)
        found = attempt(plan)
        if variant.bits == 4 and not found.accuracy.within:
            mixed = mixed_precision(self.model, self.weights, plan, self.tokens, attempt, self.progress)
            found = mixed if mixed.accuracy.within else found
        if not (found.accuracy.within or self.force):
            raise refuse(variant.name, found.accuracy)
        engine = self._engine(found.graph, variant)
        self.progress(f"{variant.name}: comparing with torch")
        parity = check_parity(variant, model_as_held(self.model, found.plan), engine)
        raised = tuple(name for name in plan if found.plan[name] != plan[name])
        return self._passed(variant, found.graph, engine, parity, found.accuracy, raised)

    def _passed(
        self,
        variant: Variant,
        graph: bytes,
        engine: Engine,
        parity: Parity,
        found: Accuracy,
        raised: tuple[str, ...],
    ) -> _Passed:
        golden = golden_steps(engine, BEGIN_ID, self.prompt_ids)
        return _Passed(variant, graph, parity, found, raised, golden, measure_speed(engine))

    def _engine(self, graph: bytes, variant: Variant) -> Engine:
        return Engine(graph, self.sizes, variant.file, providers="cpu")

    def _score(self, engine: Engine) -> Score:
        return score_graph(engine, self.run.heldout, self.tokens, BEGIN_ID, self.has_unk)

    def write(self, target: Path, name: str, passed: list[_Passed]) -> ExportReport:
        """Write the bundle."""
        config_json, tokenizer_json = encode_json(asdict(self.sizes)), self.run.tokenizer_path.read_bytes()
        model_id = _identity(config_json, tokenizer_json, self.weights)
        made_with = _versions()
        default = passed[0].variant.name  # VARIANTS lists them in that order
        variants = {
            p.variant.name: {
                "file": p.variant.file,
                "parity": p.parity.to_dict(),
                "accuracy": p.accuracy.to_dict(),
            }
            for p in passed
        }
        graphs = {p.variant.file: p.graph for p in passed}
        card = model_card(
            name=name,
            prompt=self.prompt,
            config=self.config,
            num_parameters=self.model.num_parameters,
            default=default,
            variants=variants,
            sizes={file: len(graph) for file, graph in graphs.items()},
            reference=self.reference.to_dict(),
            mixed=[name for p in passed for name in p.at_8_bits],
            model_id=model_id,
            made_with=made_with,
        )
        files = {
            "config.json": config_json,
            "tokenizer.json": tokenizer_json,
            "generation_config.json": encode_json(self._generation()),
            "README.md": card.encode(),
            **graphs,
        }
        if self.run.prior is not None:
            files["gmm.npz"] = encode_arrays(self.run.prior)
        write_bundle(
            target,
            files,
            name=name,
            default=default,
            variants=variants,
            model_id=model_id,
            golden={
                "prompt": self.prompt,
                "ids": self.prompt_ids,
                "variants": {p.variant.name: p.golden for p in passed},
            },
            made_with=made_with,
        )
        exported = tuple(
            VariantExport(
                p.variant.name, p.variant.file, len(p.graph), p.parity, p.accuracy, p.at_8_bits, *p.speeds
            )
            for p in passed
        )
        return ExportReport(target, name, model_id, default, self.reference, exported)

    def _generation(self) -> dict[str, Any]:
        """Return how texts begin and end: with words, the token that begins a text ends every line of it."""
        end_tokens = [BEGIN_ID] if self.tokenizer.kind == "bpe" else []
        return {
            "begin_token": BEGIN_ID,
            "end_tokens": end_tokens,
            "sampling": {"temperature": 0.8, "top_p": 0.95},
        }


def measure_speed(engine: Engine) -> tuple[float, float]:
    """Return tokens a second, one by one and in chunks, on this machine now."""
    rates = []
    for length in (1, engine.chunk):
        ids = [i % engine.config.vocab_size for i in range(length)]
        state = engine.last(ids, engine.zeros())[1]
        seconds: list[float] = []
        while sum(seconds) < SPEED_SECONDS:
            begin = time.perf_counter()
            state = engine.last(ids, state)[1]
            seconds.append(time.perf_counter() - begin)
        rates.append(length / statistics.median(seconds))
    return rates[0], rates[1]


def _versions() -> dict[str, str]:
    """Return the versions of what an export depends on."""
    packages = (onnx, onnx_ir, tokenizers, torch, np, importlib.import_module("onnxruntime"))
    versions = {"sdgm-edge": __version__, "python": platform.python_version()}
    return versions | {package.__name__: str(package.__version__) for package in packages}


def _identity(config_json: bytes, tokenizer_json: bytes, weights: Mapping[str, Array]) -> str:
    """Return the sha256 that names a model: its config, tokenizer and float32 weights."""
    digest = hashlib.sha256()
    digest.update(config_json + tokenizer_json)
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(weights[name], "<f4").tobytes())
    return digest.hexdigest()
