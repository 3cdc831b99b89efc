"""Atoms in the order of their strength, and a model of the strongest alone.

What atom k adds to the stream at a token is c_k · a_k, of which the synthesis matrix holds both halves: the
column r_k for the real part of c_k, and i_k for the imaginary one. Its *strength* is the root of the mean
square of that, over a text:

    E ‖Re c_k · r_k + Im c_k · i_k‖² = E[Re²] ‖r_k‖² + 2 E[Re · Im] r_k·i_k + E[Im²] ‖i_k‖²

A model is the same in any order of its atoms. Every export puts the strongest first: their rows of the
strike, their columns of the synthesis, ω and λ, their part of the state and of the mixture. To leave out weak
ones is then to keep the first of each: here, for a smaller model that is quantized and gated as any other, or
when a bundle is loaded, where the graph tells in which tensors they lie (`runtime/atoms.py`).

The text is one that the model writes: the held-out text, at which the gates look, stays unseen.

Shapes: T time, B batch, D width, K atoms, M mixing vector; 2 is real and imaginary part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sdgm_edge.models import SDGM, ModelConfig
from sdgm_edge.run import Run
from sdgm_edge.runtime import UsageError, atoms_step

from .screening import written


@dataclass(frozen=True, slots=True)
class Reduction:
    """How many atoms were kept, and what that loses."""

    kept: int
    """Atoms of each layer."""
    of: int
    """Atoms that each layer was trained with."""
    loss_increase: float
    """Relative increase of bits per byte on the held-out text, in float32."""

    def __str__(self) -> str:
        return (
            f"the strongest {self.kept} of {self.of} in each layer, {self.loss_increase:+.2%} bits per byte"
        )


def strengths(model: SDGM, ids_TB: Tensor) -> list[Tensor]:
    """Return the strength of each atom, (K,) for every layer, on some text."""
    found: list[Tensor] = []

    def note(synthesis: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        K = model.config.num_atoms
        c_N2K = inputs[0].detach().double().reshape(-1, 2, K)
        columns_D2K = synthesis.get_parameter("weight").detach().double().reshape(-1, 2, K)
        moments = torch.einsum("nik,njk->ijk", c_N2K, c_N2K) / len(c_N2K)
        found.append((moments * torch.einsum("dik,djk->ijk", columns_D2K, columns_D2K)).sum((0, 1)).sqrt())

    hooks = [block.atoms.get_submodule("synthesis").register_forward_pre_hook(note) for block in model.blocks]
    with torch.no_grad():
        model.features(ids_TB, model.initial_state(ids_TB.shape[1]))
    for hook in hooks:
        hook.remove()
    return found


def with_atoms(model: SDGM, kept: list[Tensor]) -> SDGM:
    """Return a model of some atoms of another."""
    K, count = model.config.num_atoms, len(kept[0])
    fewer = SDGM(replace(model.config, num_atoms=count))
    weights = dict(model.state_dict())
    for i, atoms in enumerate(kept):
        name = f"blocks.{i}.atoms"
        halves, thirds = (torch.cat([atoms + K * part for part in range(parts)]) for parts in (2, 3))
        for weight in ("strike.weight", "strike.bias"):
            weights[f"{name}.{weight}"] = weights[f"{name}.{weight}"][thirds]
        weights[f"{name}.synthesis.weight"] = weights[f"{name}.synthesis.weight"][:, halves]
        for weight in ("omega", "damping", "conv.weight", "conv.bias"):  # atoms come last
            weights[f"{name}.{weight}"] = weights[f"{name}.{weight}"][..., atoms]
    fewer.load_state_dict(weights)
    return fewer.eval()


def strongest_first(run: Run, count: int | None = None) -> Run:
    """Return a run whose model, and mixture, have the atoms of every layer in the order of their strength.

    All of them, or the first `count`: a mixture of Gaussians with diagonal covariances is then its marginal.

    Raises:
        UsageError: the layers have not so many atoms, or none that ring.
    """
    model, most = run.model, run.config.num_atoms
    if not isinstance(model, SDGM) or run.config.layer != "ringing":
        raise UsageError(
            f"atoms: expected a run of ringing atoms, got the layer {run.config.layer!r}; leave --atoms out"
        )
    if count is not None and not 1 <= count <= most:
        raise UsageError(f"atoms: expected 1 to the {most} of each layer, got {count}; leave it out for all")
    found = strengths(model, written(model))
    kept = [s.argsort(descending=True, stable=True)[:count] for s in found]
    fewer = with_atoms(model, kept)
    prior = run.prior
    if prior is not None:
        halves = torch.cat([kept[-1], kept[-1] + most]).numpy()
        cut = {name: np.ascontiguousarray(prior[name][:, halves]) for name in ("means", "variances")}
        prior = {**prior, **cut}
    return replace(run, config=fewer.config, model=fewer, prior=prior)


def atoms_record(config: ModelConfig, graphs: Mapping[str, bytes]) -> dict[str, Any] | None:
    """Return what the manifest tells of the atoms of a model and its variants; nothing where none ring."""
    if config.layer != "ringing":
        return None
    steps = {name: atoms_step(graph, config.num_atoms) for name, graph in graphs.items()}
    return {
        "count": config.num_atoms,
        "state": sum(config.atoms_in.values()),
        "steps": {name: step for name, step in steps.items() if step is not None},
    }
