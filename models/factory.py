"""From a description to a model, and from a number of parameters to a description."""

from __future__ import annotations

from .config import ModelConfig
from .language_model import LanguageModel
from .sdgm import SDGM
from .shell import MixerModel


def build_model(config: ModelConfig) -> LanguageModel:
    """Return a new model: an SDGM for a spectral layer, a baseline for any other."""
    return SDGM(config) if config.spectral else MixerModel(config)
