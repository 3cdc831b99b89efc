"""Parity of a baseline: its graph says what the model says, and remembers what it remembers.

Torch reads a text whole, the graph the same in pieces of odd lengths, its caches in place as they are when it
is measured; a model that reads in windows begins again where one ends, but for its pointer. Torch has the
weights as the variant holds them, so what is left is the rounding of activations.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from sdgm_edge.models import MixerModel
from sdgm_edge.runtime import Stepper

from ..builder import Array
from ..gates import difference, parity_error
from ..variants import Variant
from . import GRAPHS
from .mixer import piece
from .shell import pieces_of

LENGTHS = (1, 1, 2, 3, 7, 16, 61)


def check_parity(variant: Variant, model: MixerModel, stepper: Stepper, steps: int, seed: int = 0) -> float:
    """Hold a graph against a model with the weights that the graph stands for; return the largest difference.

    Raises:
        ParityError: it computes something else; the message tells all that differs.
    """
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, model.config.vocab_size, steps)
    expected = run_torch(model, ids)
    got = run_graph(model, stepper, ids, rng)
    exact = variant.name == "fp32"
    worst, failures = 0.0, []
    for part, reference in expected.items():
        found = got[part][tuple(slice(size) for size in reference.shape)]  # of a cache, what is used
        off = difference(part, reference, found, exact)
        worst = max(worst, off)
        if not off <= variant.tolerance:
            failures.append(f"{part} by {off:.3g}")
    if failures:
        raise parity_error(f"{model.config.layer} in {variant.name}", variant.tolerance, steps, failures)
    return worst


@torch.no_grad()
def run_torch(model: MixerModel, ids_T: Array) -> dict[str, Array]:
    """Return all logits, and the pieces of the state after the last token as the graph has them."""
    inputs: list[list[Tensor]] = [[] for _ in model.blocks]

    def watch(i: int) -> None:
        def keep(mixer: nn.Module, given: tuple[Tensor, ...]) -> None:
            inputs[i].append(given[0][:, 0])

        handles.append(model.blocks[i].mixer.register_forward_pre_hook(keep))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for i in range(len(model.blocks)):
        watch(i)
    logits, _, state = model(torch.from_numpy(ids_T)[None])
    for handle in handles:
        handle.remove()
    graph, pieces = GRAPHS[model.config.layer], model.unpack(state)
    for i, block in enumerate(model.blocks):
        own = tuple(pieces[piece(i, name)] for name in model.state_names)
        seen_TD = inputs[i][-1] if model.config.windowed else torch.cat(inputs[i])
        carried = graph.carried(block.mixer, own, seen_TD, len(seen_TD))
        pieces |= {piece(i, name): value for name, value in carried.items()}
    kept = {name: pieces[name].numpy() for name in pieces_of(model.config, graph)}
    return {"logits": logits[0].numpy(), **kept}


def run_graph(
    model: MixerModel, stepper: Stepper, ids_T: Array, rng: np.random.Generator
) -> dict[str, Array]:
    """Return the same from the graph: what is fed alone by steps, the rest in calls."""
    window = model.config.window if model.config.windowed else len(ids_T)
    names = pieces_of(model.config, GRAPHS[model.config.layer])
    logits = []
    stepper.reset()
    for begin in range(0, len(ids_T), window):
        pointed = {name: stepper.piece(name).copy() for name in names if name.startswith("copy.")}
        stepper.reset()
        for name, kept in pointed.items():  # which goes on where a window ends
            stepper.piece(name)[:] = kept
        left = ids_T[begin : begin + window].tolist()
        while left:
            length = int(rng.choice(LENGTHS))
            taken, left = left[:length], left[length:]
            logits.append(stepper.step(*taken)[None].copy() if length == 1 else stepper.read_all(taken))
    return {"logits": np.concatenate(logits), **{name: stepper.piece(name) for name in names}}
