"""Everything that sdgm-edge raises on purpose, in one tree.

    SdgmError                 exit code 1: it was tried and failed
    ├── UsageError            exit code 2: it was asked for wrongly (also a ValueError)
    │   ├── ConfigError       a config field, file or preset
    │   └── ParameterError    a sampling or call parameter
    ├── CorpusError           a text source cannot be used
    ├── TokenizerError        a tokenizer is broken or does not belong to the model
    ├── RunError              a run folder is missing, in use or incomplete
    ├── CheckpointError       a checkpoint is damaged or of another version
    ├── DivergedError         training produced a loss that is no number
    ├── BundleError           a bundle is damaged, unsafe or of another version
    ├── StateError            a session's state is damaged or of another model
    ├── ProviderError         ONNX Runtime or an execution provider is not there
    ├── CacheError            a cache is damaged, unsafe or cannot be written
    ├── MeasureError          a measurement on this machine failed
    └── ExportError           an export could not be completed
        ├── ParityError       the graph does not compute what the model computes
        └── AccuracyError     a quantized variant loses more than its limit

A message says what is wrong, what was expected, what came, where, and what to do about it.
"""


class SdgmError(Exception):
    """Base of all errors that a user can act on."""

    exit_code = 1


class UsageError(SdgmError, ValueError):
    """The request itself is wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration cannot be used."""


class ParameterError(UsageError):
    """A parameter of a call is unsupported or out of range."""


class CorpusError(SdgmError):
    """A text source is missing, empty, not text, or too short."""


class TokenizerError(SdgmError):
    """A tokenizer is damaged or does not belong to the model."""


class RunError(SdgmError):
    """A run folder is missing, in use, or incomplete."""


class CheckpointError(SdgmError):
    """A checkpoint is damaged or of another version."""


class DivergedError(SdgmError):
    """Training produced a loss that is not a number."""


class BundleError(SdgmError):
    """A bundle is damaged, unsafe, or of another version."""


class StateError(SdgmError):
    """A session's state is damaged or belongs to another model."""


class ProviderError(SdgmError):
    """ONNX Runtime, or an execution provider that was asked for, is not available."""


class CacheError(SdgmError):
    """A cache is damaged, may be written by others, or cannot be written."""


class MeasureError(SdgmError):
    """A measurement on this machine could not be taken."""


class ExportError(SdgmError):
    """An export could not be completed."""


class ParityError(ExportError):
    """The exported graph does not compute what the model computes."""


class AccuracyError(ExportError):
    """A quantized variant loses more accuracy than its limit allows."""
