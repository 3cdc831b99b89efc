"""What training costs: scans, a vocabulary's loss, the paper's clock atoms, a step in three ways, scoring.

    python benchmarks/bench_train.py            # everything, on one core
    python benchmarks/bench_train.py --json     # the same for a machine

Every figure is a median over rounds in which the competitors take turns, so that a change of the machine's
speed meets them all. Text is random: speed does not depend on it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sdgm_edge.models.ring import ring_chunks, ring_steps
from torch import Tensor

from sdgm_edge.config import PRESET_RUNS, TrainingConfig
from sdgm_edge.console import print_table
from sdgm_edge.evaluation import total_nll
from sdgm_edge.losses import LEAST_ROWS, LOGITS_AT_ONCE, LossWeights, Objective, vocabulary_nll
from sdgm_edge.models import SDGM, preset, ringing
from sdgm_edge.optimizers import Optimizer
from sdgm_edge.process import keep_memory, supports_bf16
from sdgm_edge.runtime import machine

BATCH, WINDOW, ROUNDS = 32, 128, 5
SCORED = 4096
VOCABULARIES = (4096, 10_000, 33_278)
SAMPLED = 4096
"""Words drawn where the loss of a large vocabulary is estimated."""


def doubling(f: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """The Hillis–Steele scan: after stage s every place holds the composition of the 2^s steps up to it."""
    b = torch.cat([(b[0] + f[0] * h)[None], b[1:]])
    reach = 1
    while reach < len(b):
        b = torch.cat([b[:reach], b[reach:] + f[reach:] * b[:-reach]])
        f = torch.cat([f[:reach], f[reach:] * f[:-reach]])
        reach *= 2
    return b


def ring_doubling(v: Tensor, f: Tensor, omega: Tensor, z: Tensor) -> Tensor:
    """Doubling on complex numbers, as the recurrence reads."""
    turn = torch.polar(torch.ones_like(omega), omega)
    states = doubling(f * turn, ((1 - f) * v).to(turn.dtype), torch.complex(z[:, 0], z[:, 1]))
    return torch.stack([states.real, states.imag], dim=2)


def ring_doubling_real(v: Tensor, f: Tensor, omega: Tensor, z: Tensor) -> Tensor:
    """Doubling on real numbers, in the frame that turns with the atoms."""
    angle = omega * torch.arange(1, len(v) + 1)[:, None, None]
    cos, sin = torch.cos(angle), torch.sin(angle)
    b = (1 - f) * v
    real, imag = doubling(f[:, :, None], torch.stack([b * cos, -b * sin], dim=2), z).unbind(2)
    return torch.stack([real * cos - imag * sin, real * sin + imag * cos], dim=2)


SCANS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "one step after another (ours)": ring_steps,
    "cumulative sums in chunks of 16": ring_chunks,
    "doubling, turning frame": ring_doubling_real,
    "doubling, as the recurrence reads": ring_doubling,
}


class Training:
    """A preset's whole training step on random text."""

    def __init__(self, name: str, vocab_size: int = 4096, optimizer: str = "adamw") -> None:
        torch.manual_seed(0)
        run = PRESET_RUNS[name]
        self.model = SDGM(replace(run.model, vocab_size=vocab_size))
        self.objective = Objective(self.model, run.loss, 16)
        self.optimizer = Optimizer(self.model, TrainingConfig(optimizer=optimizer))
        self.ids = torch.randint(vocab_size, (BATCH, WINDOW + 1))
        self.state = self.model.initial_state(BATCH)
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=supports_bf16(torch.device("cpu")))

    def step(self) -> float:
        """Return the processor's seconds for one step: other work on the machine does not count."""
        began = time.process_time()
        with self.autocast:
            terms, _ = self.objective(self.ids[:, :-1], self.ids[:, 1:], self.state)
        terms.loss.backward()
        self.optimizer.step(TrainingConfig().learning_rate)
        return time.process_time() - began


def in_turns(steps: dict[str, Callable[[], float]], rounds: int = ROUNDS) -> dict[str, float]:
    """Return each one's median seconds; all are run once before, uncounted."""
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(step())
    return {name: statistics.median(values) for name, values in times.items()}


def bench_scan() -> list[dict[str, object]]:
    """Training edge-micro with each form of the recurrence, and the recurrence alone with its gradient."""
    training = Training("edge-micro")
    layer = training.model.blocks[0].atoms
    v, gate = torch.randn(2, WINDOW, BATCH, layer.num_atoms).requires_grad_()
    state = torch.zeros(BATCH, 2, layer.num_atoms)

    def whole(ring: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Callable[[], float]:
        def step() -> float:
            ringing.ring_steps = ring
            try:
                return training.step()
            finally:
                ringing.ring_steps = ring_steps

        return step

    def alone(ring: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Callable[[], float]:
        def step() -> float:
            began = time.process_time()
            ring(v, torch.sigmoid(gate + 3), layer.omega, state).sum().backward()
            return time.process_time() - began

        return step

    steps = in_turns({name: whole(ring) for name, ring in SCANS.items()})
    rings = in_turns({name: alone(ring) for name, ring in SCANS.items()})
    return [
        {
            "edge-micro, recurrence": name,
            "tokens/s": round(BATCH * WINDOW / steps[name]),
            "ours against it": steps[name] / steps[next(iter(SCANS))],
            "recurrence alone, ms a layer": 1e3 * rings[name],
            "ours alone against it": rings[name] / rings[next(iter(SCANS))],
        }
        for name in SCANS
    ]


def bench_vocabulary() -> list[dict[str, object]]:
    """The head's loss and gradient, and what memory it takes, each vocabulary in a process of its own."""
    rows = []
    trainings = {f"{size:,}": Training("edge-micro", size) for size in VOCABULARIES}
    for size in VOCABULARIES:
        if size > SAMPLED:
            sampled = trainings[f"{size:,}, sampled"] = Training("edge-micro", size)
            sampled.objective.sampled_words = SAMPLED
    medians = in_turns({name: training.step for name, training in trainings.items()}, rounds=3)

    def speed(name: str) -> int | str:
        return round(BATCH * WINDOW / medians[name]) if name in medians else "–"

    for size in VOCABULARIES:
        command = [sys.executable, __file__, "--memory-of", str(size)]
        peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append(
            {
                "edge-micro, vocabulary": f"{size:,}",
                "tokens/s": speed(f"{size:,}"),
                f"tokens/s, {SAMPLED:,} words sampled": speed(f"{size:,}, sampled"),
                "logits chunk, MiB": peak["chunk"] / 2**20,
                "peak beyond inputs and gradients, MiB": peak["peak"] / 2**20,
                "of it weight-sized, MiB": peak["weights"] / 2**20,
                "the rest, in chunks": (peak["peak"] - peak["weights"]) / peak["chunk"],
                "logits of the whole batch, MiB": BATCH * WINDOW * size * 4 / 2**20,
            }
        )
    return rows


def memory_of(vocab_size: int) -> dict[str, int]:
    """Return the peak memory of the loss beyond what it is given and returns, in a process of its own."""
    model = SDGM(preset("edge-micro", vocab_size=vocab_size, num_layers=1))
    ids = torch.randint(vocab_size, (WINDOW, BATCH))
    features = model.features(ids, model.initial_state(BATCH))
    features = features._replace(hidden_TBD=features.hidden_TBD.detach().requires_grad_())
    small = features._replace(hidden_TBD=features.hidden_TBD[:1].detach().requires_grad_())
    vocabulary_nll(small, model, ids[:1]).backward()  # libraries are loaded, gradients of the weights exist
    returned = features.hidden_TBD.nbytes + model.embedding.weight.nbytes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here (Linux)
    before = peak_memory()
    bf16 = supports_bf16(torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        vocabulary_nll(features, model, ids)
    rows = max(LEAST_ROWS, LOGITS_AT_ONCE // vocab_size)
    # In bf16: the weights, and what a chunk adds to their gradient.
    low_precision = 2 * 2 * model.embedding.weight.numel()
    return {
        "chunk": rows * vocab_size * (2 if bf16 else 4),
        "peak": peak_memory() - before - returned,
        "weights": low_precision,
    }


def peak_memory() -> int:
    """Return the largest resident size so far, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def bench_clock() -> list[dict[str, object]]:
    """The paper's model at the paper's size, with each term of its loss and without."""
    full, plain = Training("paper"), Training("paper")
    plain.objective.weights = LossWeights()
    medians = in_turns({"all four terms": full.step, "language model alone": plain.step})
    return [
        {"paper (D 512, K 256, L 128), loss": name, "tokens/s": round(BATCH * WINDOW / t)}
        for name, t in medians.items()
    ]


def bench_step() -> list[dict[str, object]]:
    """A whole step of edge-micro: as it is, compiled, and by Muon."""
    kinds = {"as it is": Training("edge-micro"), "compiled": Training("edge-micro")}
    kinds["compiled"].objective.compile()
    kinds["by Muon"] = Training("edge-micro", optimizer="muon")
    medians = in_turns({name: training.step for name, training in kinds.items()})
    plain = medians["as it is"]
    return [
        {"edge-micro, step": name, "tokens/s": round(BATCH * WINDOW / t), "against it as it is": plain / t}
        for name, t in medians.items()
    ]


def bench_scoring() -> list[dict[str, object]]:
    """Scoring a text in one lane, as `sdgm-edge eval` does."""
    rng = np.random.default_rng(0)
    models = {name: SDGM(preset(name, vocab_size=4096)).eval() for name in ("paper", "edge-micro")}
    tokens = rng.integers(4096, size=SCORED + 1)

    def score(model: SDGM) -> Callable[[], float]:
        def step() -> float:
            began = time.process_time()
            total_nll(model, tokens)
            return time.process_time() - began

        return step

    medians = in_turns({name: score(model) for name, model in models.items()}, rounds=3)
    return [{"scoring in one lane": name, "tokens/s": round(SCORED / t)} for name, t in medians.items()]


def main() -> None:
    """Run the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        print(json.dumps(memory_of(options.memory_of)))
        return
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    keep_memory()  # as training does
    tables = [bench_scan(), bench_vocabulary(), bench_clock(), bench_step(), bench_scoring()]
    title = f"{machine()['cpu']}, one core, torch {torch.__version__}, batch {BATCH} × {WINDOW}, " + (
        "bf16" if supports_bf16(torch.device("cpu")) else "float32"
    )
    if options.json:
        print(json.dumps({"machine": title, "tables": tables}, indent=2))
        return
    print(title)
    for table in tables:
        print_table(list(table[0]), [list(row.values()) for row in table])


if __name__ == "__main__":
    main()
