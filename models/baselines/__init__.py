"""What others mix tokens with, one file each, made causal and streaming; `shell.py` is what they share.

A new mixer is a file with a `Mixer` and a line here: it then trains, is scored and is compared like the rest.
"""

from .fnet import FNet
from .gated_recurrence import GatedRecurrence
from .gfnet import GlobalFilter
from .gpt2 import GPT2
from .linformer import Linformer
from .lmwt import HaarWavelets
from .lstm import LSTM
from .mixer import Mixer
from .nplm import LocalConcatenation
from .pom import PolynomialMixer
from .transformer_xl import TransformerXL

MIXERS: dict[str, type[Mixer]] = {
    "gpt2": GPT2,
    "transformer-xl": TransformerXL,
    "linformer": Linformer,
    "fnet": FNet,
    "gated-recurrence": GatedRecurrence,
    "lstm": LSTM,
    "nplm": LocalConcatenation,
    "gfnet": GlobalFilter,
    "lmwt": HaarWavelets,
    "pom": PolynomialMixer,
}
"""By the name that is the value of `ModelConfig.layer`."""

__all__ = ["MIXERS", "Mixer"]
