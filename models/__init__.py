"""The Spectral Dictionary model, its baselines and their parts, in PyTorch."""

from .baselines import MIXERS, Mixer
from .baselines.attention import num_heads
from .baselines.linformer import block_sizes
from .compiling import uncompiled
from .config import PRESETS, ModelConfig, preset
from .factory import GPT2_SMALL, SIZE_TOLERANCE, build_model, count_parameters, scaled, sized
from .language_model import Features, LanguageModel, Output
from .pointer import copy_log_probs
from .scan import LOG_DECAY_FLOOR
from .sdgm import SDGM
from .shell import MixerModel

__all__ = [
    "GPT2_SMALL",
    "LOG_DECAY_FLOOR",
    "MIXERS",
    "PRESETS",
    "SDGM",
    "SIZE_TOLERANCE",
    "Features",
    "LanguageModel",
    "Mixer",
    "MixerModel",
    "ModelConfig",
    "Output",
    "block_sizes",
    "build_model",
    "copy_log_probs",
    "count_parameters",
    "num_heads",
    "preset",
    "scaled",
    "sized",
    "uncompiled",
]
