"""Bundles to measure, with random weights, and the machine they are measured on.

Speed does not depend on what a model has learnt, but for a bias that makes some words common and most rare,
as they are in a language: what sampling costs depends on that.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from sdgm_edge.export.atoms import atoms_record
from sdgm_edge.export.graph import weights_of
from sdgm_edge.export.screening import screen_for
from sdgm_edge.export.sizing import small_files
from sdgm_edge.export.variants import VARIANTS, build

from sdgm_edge.console import cache_folder
from sdgm_edge.models import SDGM, ModelConfig, preset
from sdgm_edge.runtime import Generator, encode_json, machine, write_bundle
from sdgm_edge.shards import prepare_corpus

EDGE = ("edge-nano", "edge-micro", "edge-small")
SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95}
ZIPF = 1.3
"""Falls off with the rank of a word as fast as gives its next one 3 to 4 nats, a perplexity of 20 to 50."""


class Bench:
    """The bundles that sections share, each made when it is first asked for."""

    def __init__(self, folder: Path, run: Path | None) -> None:
        self.folder, self.run = folder, run
        self._bundles: dict[str, Path] = {}
        corpus = prepare_corpus(["pydoc"], vocab_size=4096, cache=cache_folder())
        self.text = corpus.heldout_text
        corpus.tokenizer.save(folder / "tokenizer.json")

    def bundle(self, name: str) -> Path:
        """An int8 bundle of a preset, with random weights."""
        if name not in self._bundles:
            self._bundles[name] = self.write(name, preset(name))
        return self._bundles[name]

    def generator(self, name: str) -> Generator:
        """That bundle, loaded."""
        return load(self.bundle(name))

    def write(self, name: str, config: ModelConfig, bits: int = 8, screened: bool = False) -> Path:
        """Write a bundle with random weights."""
        torch.manual_seed(0)
        model = SDGM(config).eval()
        weights, variant = weights_of(model), VARIANTS[bits]
        ranks = torch.randperm(config.vocab_size).numpy() + 1
        weights["bias"] = np.float32(torch.randn(config.vocab_size).numpy() - ZIPF * np.log(ranks))
        if "norm.weight" in weights:
            weights["norm.weight"] /= 2  # random weights are surer than a language lets anyone be
        plan, screen = variant.plan(weights), None
        if screened:
            model.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
            screen = screen_for(model, plan["embedding.weight"])
        graph = build(config, weights, plan, screen)
        files = {
            **small_files(config, self._tokenizer(config.vocab_size)),
            "generation_config.json": encode_json({"begin_token": 0, "end_tokens": [], "sampling": SAMPLING}),
            variant.file: graph,
        }
        return write_bundle(
            self.folder / name,
            files,
            name=name,
            default=variant.name,
            variants={variant.name: {"file": variant.file, "parity": None, "accuracy": None}},
            model_id="0" * 64,
            golden={"prompt": "", "ids": [], "variants": {}},
            made_with={},
            atoms=atoms_record(config, {variant.name: graph}),
        )

    def _tokenizer(self, vocab_size: int) -> bytes:
        """That of the text, with tokens that never occur in it up to the size asked for."""
        told = json.loads((self.folder / "tokenizer.json").read_bytes())
        vocabulary = told["model"]["vocab"]
        vocabulary.update({f"Ġw{i}": i for i in range(len(vocabulary), vocab_size)})
        return json.dumps(told, ensure_ascii=False).encode()


def load(bundle: Path) -> Generator:
    """Load a bundle as it is measured."""
    return Generator.load(bundle, providers="cpu", threads=1)


def described() -> dict[str, object]:
    """What the figures were measured on."""
    versions = {name: importlib.metadata.version(name) for name in ("numpy", "torch")}
    return {**machine(), "used": 1, "load average": round(os.getloadavg()[0], 2), **versions}
