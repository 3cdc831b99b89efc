"""The Spectral Dictionary model and its parts, in PyTorch."""

from .config import PRESETS, ModelConfig, preset
from .sdgm import SDGM, Features, Output

__all__ = ["PRESETS", "SDGM", "Features", "ModelConfig", "Output", "preset"]
