"""The bundle of a run: its files, its card and its report, of the variants that passed their gates."""

from __future__ import annotations

import hashlib
import importlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import tokenizers
import torch

from sdgm_edge import __version__
from sdgm_edge.run import Run
from sdgm_edge.runtime import encode_arrays, encode_json, write_bundle
from sdgm_edge.tokenization import BEGIN_ID, Tokenizer

from .atoms import Reduction, atoms_record
from .builder import Array
from .card import model_card
from .gates import Accuracy
from .golden import golden_prompt
from .graph import weights_of
from .loop import LOOP, checked_loop
from .report import ExportReport, VariantExport
from .variants import bundle_config


@dataclass(frozen=True, slots=True)
class Passed:
    """A variant that passed its gates."""

    told: VariantExport
    """What the report tells of it."""
    graph: bytes
    golden: dict[str, Any]
    """What it says after the golden prompt."""


@dataclass(frozen=True, slots=True)
class Gated:
    """All variants that were asked for, and what they are told beside."""

    passed: tuple[Passed, ...]
    reference: Accuracy
    """Float32 on the held-out text."""
    reduction: Reduction | None
    """Of the atoms, where there were more."""


def write_export(
    target: Path, name: str, run: Run, gated: Gated, *, trained_window: int, loop: bool
) -> ExportReport:
    """Write the bundle, whole or not at all. The first variant is the one that runs by default.

    `trained_window`: over how many tokens the head looked back in training. `loop`: write `generate.onnx`.

    Raises:
        BundleError: it cannot be written.
        ParityError: the loop says other than its variant.
    """
    sizes, tokenizer = bundle_config(run.config), Tokenizer.load(run.tokenizer_path)
    config_json, tokenizer_json = encode_json(sizes._asdict()), run.tokenizer_path.read_bytes()
    model_id, made_with = _identity(config_json, tokenizer_json, weights_of(run.model)), _versions()
    prompt, passed = golden_prompt(run.heldout), gated.passed
    ids, told = tokenizer.encode(prompt), [p.told for p in passed]
    graphs = {p.told.file: p.graph for p in passed}
    variants = {
        v.name: {
            "file": v.file,
            "parity": v.parity.to_dict(),
            "accuracy": v.accuracy.to_dict() | ({"screened": v.screened.to_dict()} if v.screened else {}),
        }
        for v in told
    }
    card = model_card(
        name=name,
        prompt=prompt,
        config=run.config,
        trained_window=trained_window,
        num_parameters=run.model.num_parameters,
        variants=told,
        reference=gated.reference,
        reduction=gated.reduction,
        model_id=model_id,
        made_with=made_with,
    )
    files = {
        "config.json": config_json,
        "tokenizer.json": tokenizer_json,
        "generation_config.json": encode_json(_generation(tokenizer)),
        "README.md": card.encode(),
        **graphs,
    }
    if run.prior is not None:
        files["gmm.npz"] = encode_arrays(run.prior)
    if loop:
        first = passed[0]
        files[LOOP] = checked_loop(
            first.graph, first.told.file, sizes, [BEGIN_ID, *ids], first.golden["tokens"]
        )
    write_bundle(
        target,
        files,
        name=name,
        default=told[0].name,
        variants=variants,
        model_id=model_id,
        golden={"prompt": prompt, "ids": ids, "variants": {p.told.name: p.golden for p in passed}},
        made_with=made_with,
        num_parameters=run.model.num_parameters,
        atoms=atoms_record(run.config, {p.told.name: p.graph for p in passed}),
    )
    return ExportReport(target, name, model_id, told[0].name, gated.reference, gated.reduction, tuple(told))


def _generation(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return how texts begin and end: with words, the token that begins a text ends every line of it."""
    return {
        "begin_token": BEGIN_ID,
        "end_tokens": [BEGIN_ID] if tokenizer.kind == "bpe" else [],
        "sampling": {"temperature": 0.8, "top_p": 0.95},
    }


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
