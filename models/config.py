"""What a model is made of: one validated, frozen description, and the presets."""

from __future__ import annotations

import math
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

from .baselines import MIXERS

SPECTRAL = ("ringing", "clock")
LAYERS = (*SPECTRAL, *MIXERS)
OF_SOME = frozenset({"num_atoms", "turning", "conv_width", "activation", "quickest", "atom_dropout"})
"""Fields that some layers heed and others do not."""
ACTIVATIONS = ("softmax", "tanh", "gelu", "silu", "identity")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A Spectral Dictionary model, or a baseline. Letters in brackets are the paper's."""

    vocab_size: int
    """Number of tokens [V]."""
    layer: str = "ringing"
    """Kind of layer: `ringing` (streams, the product), `clock` (the paper, literally) or a baseline's."""
    num_layers: int = 1
    """Number of layers."""
    width: int = 256
    """Width of an embedding [D]."""
    num_atoms: int = 256
    """Atoms in each layer's dictionary [K]; the width of a baseline's recurrence or polynomial."""
    turning: float = 1.0
    """Part of the ringing atoms that begin with a frequency; the rest only fade."""
    conv_width: int = 4
    """Tokens that the causal convolution of the mixing encoder sees, the current one included."""
    activation: str = "identity"
    """Activation of the mixing encoder, after its convolution."""
    quickest: float = -3.0
    """λ of the ringing atom that fades first as training begins; that of the last is larger by 5."""
    window: int = 128
    """Period of the clock, and the length of a training window [L]."""
    residual: bool = True
    """Layers add to a normalised residual stream; False: a bare x̂ = layer(x), as in the paper."""
    glu_width: int = 0
    """Hidden width of the gated linear unit that follows each spectral layer; 0 for none."""
    copy_window: int = 0
    """How many recent tokens the pointer-generator head can copy [M]; 0 for a plain head."""
    copy_width: int = 64
    """Width of the pointer's keys and queries."""
    copy_context: int = 0
    """How many of the last tokens the pointer looks for before a token to copy; 0 for none."""
    dropout: float = 0.0
    """Dropout on the embedding, what units and baselines add, and before the head; one mask for a window."""
    atom_dropout: float = 0.0
    """Probability that an atom goes unheard for one window; a ringing one rings on."""
    embedding_dropout: float = 0.0
    """Probability that a whole word of the vocabulary is dropped for one batch."""

    def __post_init__(self) -> None:
        _choice("layer", self.layer, LAYERS)
        _choice("activation", self.activation, ACTIVATIONS)
        for name in ("vocab_size", "num_layers", "width", "num_atoms", "conv_width", "window", "copy_width"):
            _integer(name, getattr(self, name), 1)
        for name in ("glu_width", "copy_window", "copy_context"):
            _integer(name, getattr(self, name), 0)
        if self.copy_context and not self.copy_window:
            raise ValueError(
                f"model.copy_context needs a head that points, got {self.copy_context} without copy_window: "
                "set copy_window too, or leave copy_context out"
            )
        for name in ("dropout", "atom_dropout", "embedding_dropout"):
            rate = getattr(self, name)
            if not isinstance(rate, int | float) or not 0 <= rate < 1:
                raise ValueError(f"model.{name} must lie in [0, 1), got {rate!r}")
        if not isinstance(self.turning, int | float) or not 0 <= self.turning <= 1:
            raise ValueError(f"model.turning must lie in [0, 1], got {self.turning!r}")
        if not isinstance(self.quickest, int | float) or not -10 <= self.quickest <= 10:
            raise ValueError(f"model.quickest must lie in [-10, 10], got {self.quickest!r}")
        if not isinstance(self.residual, bool):
            raise ValueError(f"model.residual must be true or false, got {self.residual!r}")
        if not self.residual and self.num_layers > 1:
            raise ValueError(
                f"model.residual = false is the paper's single layer, got num_layers = {self.num_layers}: "
                "set num_layers = 1 or residual = true"
            )
        if not self.spectral and not self.residual:
            raise ValueError(
                f"model.layer {self.layer!r} has a residual stream, got residual = false: set residual = true"
            )

    @property
    def spectral(self) -> bool:
        """Whether the layers are atoms of a dictionary: an SDGM, and no baseline."""
        return self.layer in SPECTRAL

    @property
    def unheeded(self) -> frozenset[str]:
        """Fields that change nothing here."""
        if not self.spectral:
            heeded = MIXERS[self.layer].reads
        else:
            heeded = OF_SOME if self.layer == "ringing" else OF_SOME - {"turning", "quickest"}
        return OF_SOME - heeded | (frozenset() if self.copy_window else {"copy_width"})

    @property
    def windowed(self) -> bool:
        """Whether a text is read in windows, each afresh."""
        return not self.spectral and MIXERS[self.layer].windowed

    @property
    def mixing_size(self) -> int:
        """Numbers in a mixing vector: K, 2K (real, then imaginary) where atoms ring, 0 without atoms."""
        return {"ringing": 2 * self.num_atoms, "clock": self.num_atoms}.get(self.layer, 0)

    @property
    def state_layout(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Names and shapes of the pieces of a sequence's state, in their order."""
        pieces: list[tuple[str, tuple[int, ...]]] = []
        convolved = self.num_atoms if self.layer == "ringing" else self.width
        for i in range(self.num_layers):
            if not self.spectral:
                own = MIXERS[self.layer].layout(self)
                pieces.extend((f"layers.{i}.{name}", shape) for name, shape in own)
                continue
            pieces.append((f"layers.{i}.conv", (self.conv_width - 1, convolved)))
            if self.layer == "ringing":
                pieces.append((f"layers.{i}.atoms", (2, self.num_atoms)))
        if self.layer == "clock" or self.windowed:
            pieces.append(("clock", (1,)))
        if self.copy_window:
            pieces.append(("copy.last_key", (1, self.copy_width)))
            pieces.append(("copy.keys", (self.copy_window, self.copy_width)))
            pieces.append(("copy.ids", (self.copy_window,)))
        return tuple(pieces)

    @property
    def atoms_in(self) -> dict[str, int]:
        """How many numbers of each atom the pieces of the state hold that ringing atoms make longer."""
        if self.layer != "ringing":
            return {}
        held = {"conv": self.conv_width - 1, "atoms": 2}
        return {f"layers.{i}.{name}": n for i in range(self.num_layers) for name, n in held.items() if n}

    @property
    def state_size(self) -> int:
        """Numbers in a sequence's state [S]."""
        return sum(math.prod(shape) for _, shape in self.state_layout)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Read the fields; an unknown or a missing one raises ValueError."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown model field {unknown[0]!r}; known: {', '.join(sorted(known))}")
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        missing = sorted(needed - set(values))
        if missing:
            raise ValueError(f"model field {missing[0]!r} is missing")
        return cls(**values)


def _choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"model.{name} must be one of {', '.join(choices)}, got {value!r}")


def _integer(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"model.{name} must be a whole number of at least {least}, got {value!r}")


PRESETS: dict[str, ModelConfig] = {
    # The paper's single layer: no residual stream, a pointer that sees one window.
    "paper": ModelConfig(
        vocab_size=4096,
        layer="clock",
        width=512,
        num_atoms=256,
        activation="tanh",
        residual=False,
        copy_window=128,
    ),
    # Few wide layers without units, five atoms for three features: see benchmarks/results/quality.md.
    "edge-nano": ModelConfig(vocab_size=4096, num_layers=2, width=160, num_atoms=256),
    "edge-micro": ModelConfig(vocab_size=4096, num_layers=2, width=384, num_atoms=640),
    "edge-small": ModelConfig(vocab_size=4096, num_layers=2, width=640, num_atoms=1056),
}


def preset(name: str, **changes: Any) -> ModelConfig:
    """Return a preset's config with some fields changed.

    >>> preset("edge-micro", vocab_size=2048).width
    384
    """
    _choice("preset", name, tuple(PRESETS))
    return replace(PRESETS[name], **changes)
