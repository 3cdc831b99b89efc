"""Run a bundle: text generation with numpy, onnxruntime and tokenizers alone."""

from .errors import (
    AccuracyError,
    BundleError,
    CheckpointError,
    ConfigError,
    CorpusError,
    DivergedError,
    ExportError,
    ParameterError,
    ParityError,
    ProviderError,
    RunError,
    SdgmError,
    StateError,
    TokenizerError,
    UsageError,
)

__all__ = [
    "AccuracyError",
    "BundleError",
    "CheckpointError",
    "ConfigError",
    "CorpusError",
    "DivergedError",
    "ExportError",
    "ParameterError",
    "ParityError",
    "ProviderError",
    "RunError",
    "SdgmError",
    "StateError",
    "TokenizerError",
    "UsageError",
]
