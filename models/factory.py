"""From a description to a model, and from a number of parameters to a description."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch

from .config import ModelConfig
from .language_model import LanguageModel
from .sdgm import SDGM
from .shell import MixerModel

GPT2_SMALL = ModelConfig(
    vocab_size=50257, layer="gpt2", num_layers=12, width=768, glu_width=3072, window=1024, dropout=0.1
)
"""The shape of GPT-2 small: 124 M parameters, and a bias of the logits."""

SHAPES: dict[str, dict[str, Any]] = {
    "ringing": {"num_layers": 2, "num_atoms": 107, "glu_width": 0},  # five atoms for three features
    "gated-recurrence": {"num_layers": 2, "num_atoms": 128, "glu_width": 0},
    "gpt2": {"glu_width": 256},  # four times the width, as in the original
    "lstm": {"num_layers": 2, "glu_width": 0},  # no unit: its gates are one
    "nplm": {"conv_width": 8},
}
"""What a layer has other than the rest: a width of 64, as many atoms, units of 128, convolutions of 4."""

SIZE_TOLERANCE = 0.05
"""How far from the number of parameters that is asked for, as a part of it, a model may be."""


def build_model(config: ModelConfig) -> LanguageModel:
    """Return a new model: an SDGM for a spectral layer, a baseline for any other."""
    return SDGM(config) if config.spectral else MixerModel(config)


@cache
def count_parameters(config: ModelConfig) -> int:
    """Return how many numbers a model learns, without making them."""
    with torch.device("meta"):
        return build_model(config).num_parameters


def _usual_depth(num_parameters: int) -> int:
    """Return how many layers a model of so many parameters is given."""
    return next((depth for depth, most in ((3, 2e6), (4, 2e7), (8, 8e7)) if num_parameters < most), 12)


def sized(layer: str, num_parameters: int, **settings: Any) -> ModelConfig:
    """Return a model of a layer with about so many parameters: deeper, then wider.

    >>> sized("gpt2", 4_000_000, vocab_size=4096).num_layers
    4
    """
    shape = {"num_layers": _usual_depth(num_parameters), "width": 64, "num_atoms": 64, "glu_width": 128}
    return scaled(ModelConfig(layer=layer, **{**shape, **SHAPES.get(layer, {}), **settings}), num_parameters)


def scaled(shape: ModelConfig, num_parameters: int) -> ModelConfig:
    """Return the shape, as deep as it is, with the width that comes nearest to a number of parameters.

    Width, atoms and hidden width of the units keep their proportions; the last then makes up for the rest.

    Raises:
        ValueError: none comes within 5 %.
    """

    def of_width(width: int) -> ModelConfig:
        share = width / shape.width
        num_atoms = max(1, round(shape.num_atoms * share))
        return replace(shape, width=width, num_atoms=num_atoms, glu_width=round(shape.glu_width * share))

    step = 1 if num_parameters < 500_000 else 32 if shape.glu_width else 4  # widths that processors like
    low, high = 1, 2
    while count_parameters(of_width(high * step)) < num_parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if count_parameters(of_width(middle * step)) < num_parameters:
            low = middle
        else:
            high = middle
    best = min(
        (of_width(w * step) for w in (low, high)), key=lambda c: abs(count_parameters(c) - num_parameters)
    )
    if best.glu_width:
        count = count_parameters(best)
        one = count_parameters(replace(best, glu_width=best.glu_width + 1)) - count
        best = replace(best, glu_width=max(1, best.glu_width + round((num_parameters - count) / one)))
    got = count_parameters(best)
    if abs(got / num_parameters - 1) > SIZE_TOLERANCE:
        raise ValueError(
            f"no {shape.layer} model of {shape.num_layers} layers has {num_parameters:,} parameters within "
            f"{SIZE_TOLERANCE:.0%}: the nearest has {got:,}, with a vocabulary of {shape.vocab_size:,}; "
            "ask for more parameters or a smaller vocabulary"
        )
    return best
