"""How far the numbers reach that a matrix is multiplied with.

Where all tokens are about equally loud, they may be rounded in steps of one size, known before: two nodes of
a graph then do what takes six where each token has a step of its own. How loud they are is seen on text that
the model itself writes: no text is needed for it, and the held-out text, at which the gates look, stays
unseen. What is louder than all that was seen is cut off.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdgm_edge.models import SDGM

from .graph import matrix_names, weights_of
from .screening import LANES, written

MOST_UNEVEN = 3.0
"""The loudest token seen is at most so much louder than the middle one; otherwise 8 bits are too few."""


@torch.no_grad()
def find_reach(model: SDGM) -> dict[str, float]:
    """Return the largest number in what a matrix is multiplied with, by the name of its weight.

    Of those matrices whose tokens are about equally loud. The same model gives the same numbers.
    """
    ids_TB, matrices = written(model), matrix_names(weights_of(model))
    loudness: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" in matrices:

            def look(_: nn.Module, inputs: tuple[Tensor, ...], name: str = f"{name}.weight") -> None:
                loudness[name] = inputs[0].abs().amax(-1).flatten()

            handles.append(module.register_forward_pre_hook(look))
    hidden = model.features(ids_TB, model.initial_state(LANES)).hidden_TBD
    for handle in handles:
        handle.remove()
    loudness["embedding.weight"] = hidden.abs().amax(-1).flatten()
    return {
        name: float(loud.max())
        for name, loud in loudness.items()
        if 0 < loud.max() <= MOST_UNEVEN * loud.median()
    }
