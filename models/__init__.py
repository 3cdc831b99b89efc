"""The Spectral Dictionary model and its parts, in PyTorch."""

from .config import PRESETS, ModelConfig, preset
from .pointer import copy_log_probs
from .sdgm import SDGM, Features, Output

__all__ = ["PRESETS", "SDGM", "Features", "ModelConfig", "Output", "copy_log_probs", "preset"]
