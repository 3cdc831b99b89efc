"""What one call of a preset's graph costs, in each variant, for a token, a few and a whole chunk.

    python benchmarks/graph.py                             # edge-small
    python benchmarks/graph.py --preset edge-nano --json
    python benchmarks/graph.py --preset edge-micro --pointer 128 --drafts     # what these add

Random weights, one core, one thread, logits after the last token alone, as prompts are read. Variants and
lengths take turns, and each figure is the quickest of many calls: what the others lose, they lose to other
processes of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from typing import TypeAlias

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from bundles import described
from sdgm_edge.export.graph import weights_of
from sdgm_edge.export.reach import find_reach
from sdgm_edge.export.variants import ROWS, VARIANTS, Variant, build, bundle_config

from sdgm_edge.console import print_table
from sdgm_edge.models import SDGM, preset
from sdgm_edge.runtime import Engine, pinned

LENGTHS = (1, 16, 128)
ROUNDS = 12
SECONDS = 0.1
"""Spent on each figure in each round."""
Graph: TypeAlias = tuple[Variant, Mapping[str, float] | None]
"""A variant, and how far activations reach that are rounded in fixed steps."""


def engines(name: str, pointer: int, drafts: bool) -> dict[str, Engine]:
    """The preset in every variant; also with a pointer to so many tokens, and as drafts need it."""
    made = {}
    for window in dict.fromkeys((0, pointer)):
        torch.manual_seed(0)
        model = SDGM(preset(name, copy_window=window)).eval()
        config, weights = model.config, weights_of(model)
        graphs: dict[str, Graph] = {v.name: (v, None) for v in VARIANTS.values()}
        if drafts:
            reach = find_reach(model)
            for variant in (VARIANTS[bits] for bits in ROWS):
                graphs[f"{variant.name} for drafts"] = variant.by_rows(), reach
        for told, (variant, reach) in graphs.items():
            told += f", pointer {window}" if window else ""
            graph = build(config, weights, variant.plan(weights), reach=reach)
            made[told] = Engine(graph, bundle_config(config), told, providers="cpu", threads=1)
    return made


def quickest(engine: Engine, length: int) -> float:
    """Seconds of the quickest of several calls."""
    ids = [int(i) for i in np.random.default_rng(0).integers(0, engine.config.vocab_size, length)]
    state = engine.zeros()
    times = []
    until = time.perf_counter() + SECONDS
    while not times or time.perf_counter() < until:
        begun = time.perf_counter()
        engine.last(ids, state)
        times.append(time.perf_counter() - begun)
    return min(times)


def measure(name: str, pointer: int = 0, drafts: bool = False) -> dict[str, dict[int, float]]:
    """Microseconds of a call by variant and length."""
    variants = engines(name, pointer, drafts)
    best: dict[str, dict[int, float]] = {variant: {} for variant in variants}
    for _ in range(ROUNDS):
        for variant, engine in variants.items():
            for length in LENGTHS:
                if length <= engine.chunk:
                    took = 1e6 * quickest(engine, length)
                    best[variant][length] = min(took, best[variant].get(length, took))
    return best


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure what a call of a graph costs, on this machine.")
    parser.add_argument("--preset", default="edge-small")
    parser.add_argument("--pointer", type=int, default=0, metavar="M", help="also with a pointer to M tokens")
    parser.add_argument("--drafts", action="store_true", help="also 8 and 4 bits as export --drafts has them")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    with pinned(1):
        here, found = described(), measure(options.preset, options.pointer, options.drafts)
    if options.json:
        report = {"machine": here, "preset": options.preset, "microseconds": found}
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return
    print(", ".join(f"{name} {value}" for name, value in here.items()))
    rows = [
        (variant, f"{length} token{'s' if length > 1 else ''}", us, us / length, 1e6 * length / us)
        for variant, times in found.items()
        for length, us in times.items()
    ]
    print_table((options.preset, "a call", "µs", "µs a token", "tokens/s"), rows)


if __name__ == "__main__":
    main()
