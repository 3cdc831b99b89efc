"""What a training run is: one validated, frozen description, its presets, and its TOML form."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from sdgm_edge.losses import LossWeights
from sdgm_edge.models import PRESETS, ModelConfig
from sdgm_edge.runtime import ConfigError
from sdgm_edge.tokenization import LARGEST_BPE, Kind

DEFAULT_PRESET = "edge-micro"
RECIPES = resources.files("sdgm_edge.models") / "recipes"


def _expect(good: bool, what: str, expected: str, got: object) -> None:
    if not good:
        raise ValueError(f"{what} must be {expected}, got {got!r}")


def _expect_int(what: str, got: object, least: int) -> None:
    good = isinstance(got, int) and not isinstance(got, bool) and got >= least
    _expect(good, what, f"a whole number of at least {least}", got)


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusConfig:
    """The text and how it becomes tokens."""

    train: tuple[str, ...] = ()
    """Files, folders, globs, `.gz` or `-` for stdin; none for the embedded corpus."""
    valid: tuple[str, ...] = ()
    """Text to validate on; none to hold out a part of the training text."""
    tokenizer: Kind = "bpe"
    """`bpe` (byte-level, no unknown words) or `word` (the published benchmark protocol)."""
    vocab_size: int = 4096
    """Tokens of a `bpe` vocabulary; a `word` vocabulary has all the words of the training text."""

    def __post_init__(self) -> None:
        for name in ("train", "valid"):
            sources = getattr(self, name)
            good = isinstance(sources, tuple) and all(isinstance(source, str) for source in sources)
            _expect(good, f"corpus.{name}", f"a list such as {name} = ['my.txt']", sources)
        _expect(self.tokenizer in ("bpe", "word"), "corpus.tokenizer", "bpe or word", self.tokenizer)
        _expect_int("corpus.vocab_size", self.vocab_size, 257)
        fits = self.tokenizer == "word" or self.vocab_size <= LARGEST_BPE
        _expect(fits, "corpus.vocab_size", f"at most {LARGEST_BPE} for bpe", self.vocab_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """How the weights are found."""

    epochs: int = 4
    """Passes over the training text."""
    max_steps: int = 0
    """Stop after so many steps, the schedule fitted to them; 0 for all epochs."""
    batch_size: int = 16
    """Sequences in a batch, over all processes."""
    carry_state: bool = True
    """A sequence's next window goes on from the state of its last; False: each starts afresh."""
    fresh_starts: float = 0.05
    """Part of the windows that are read as the beginning of a text; carried state hardly shows any."""
    optimizer: str = "adamw"
    """`adamw` (decoupled weight decay), `adam` (the paper's) or `muon` (for matrices, AdamW for the rest)."""
    learning_rate: float = 3e-3
    """At its peak."""
    weight_decay: float = 0.1
    """On what has rows and columns, never on vectors: biases, gains of norms, frequencies, dampings."""
    beta2: float = 0.99
    """Memory of the squared gradient."""
    dynamics_rate: float = 0.1
    """Learning rate of frequencies and dampings, as a part of that of the weights."""
    schedule: str = "cosine"
    """`cosine` (to zero) or `constant`, after the warm-up."""
    warmup: float = 0.03
    """Part of all steps in which the learning rate rises."""
    sampled_words: int = 0
    """Words drawn for each step to stand for all that are no targets in it, for quick steps with a large
    vocabulary; 0 for the whole vocabulary."""
    exact_part: float = 0.2
    """With `sampled_words`: the last part of all steps, which takes the whole vocabulary."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 for no limit."""
    ema_decay: float = 0.998
    """Memory of the averaged weights that are evaluated and exported; 0 for the plain weights."""
    early_stop: int = 0
    """Stop after so many validations without a better loss; 0 never to."""
    valid_steps: int = 0
    """Steps between validations; 0 for one after each epoch."""
    num_components: int = 16
    """Components of the Gaussian mixture over the mixing vectors."""
    checkpoint_minutes: float = 5.0
    """Time between checkpoints; one is written after each epoch too."""
    seed: int = 0
    """Of the weights, the order of the text, dropout and the mixture."""

    def __post_init__(self) -> None:
        for name, least in (
            ("epochs", 1),
            ("max_steps", 0),
            ("batch_size", 1),
            ("early_stop", 0),
            ("valid_steps", 0),
            ("seed", 0),
            ("sampled_words", 0),
        ):
            _expect_int(f"training.{name}", getattr(self, name), least)
        _expect_int("training.num_components", self.num_components, 1)
        _expect(self.seed < 1 << 32, "training.seed", "less than 2^32", self.seed)
        known = self.optimizer in ("adamw", "adam", "muon")
        _expect(known, "training.optimizer", "adamw, adam or muon", self.optimizer)
        _expect(
            self.schedule in ("cosine", "constant"), "training.schedule", "cosine or constant", self.schedule
        )
        _expect(isinstance(self.carry_state, bool), "training.carry_state", "true or false", self.carry_state)
        for name, high in (
            ("learning_rate", 10.0),
            ("weight_decay", 10.0),
            ("beta2", 1.0),
            ("dynamics_rate", 100.0),
            ("warmup", 1.0),
            ("exact_part", 1.0),
            ("fresh_starts", 1.0),
            ("clip", math.inf),
            ("ema_decay", 1.0),
            ("checkpoint_minutes", math.inf),
        ):
            value = getattr(self, name)
            good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < high
            _expect(good, f"training.{name}", f"a number in [0, {high})", value)
        _expect(self.learning_rate > 0, "training.learning_rate", "a number above 0", self.learning_rate)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A whole run: corpus, model, loss and training."""

    preset: str = DEFAULT_PRESET
    """The preset it started from."""
    begun_from: str = ""
    """The run whose weights and tokenizer it began with; empty where they are its own."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    model: ModelConfig = PRESETS[DEFAULT_PRESET]
    loss: LossWeights = field(default_factory=LossWeights)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        if not self.model.spectral and (self.loss.reconstruction or self.loss.spectrum or self.loss.prior):
            raise ValueError(
                f"a model of layer {self.model.layer!r} has no dictionary: expected loss.reconstruction, "
                f"loss.spectrum and loss.prior of 0, got {self.loss}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], origin: str = "config", base: RunConfig | None = None
    ) -> RunConfig:
        """Read tables `corpus`, `model`, `loss` and `training` over those of `preset`, or of `base`.

        Raises:
            ConfigError: an unknown preset, table or key, or a value out of range; `origin` says where.
        """
        try:
            return _read(values, base)
        except (ValueError, TypeError) as reason:
            raise ConfigError(f"{origin}: {reason}") from reason


PRESET_RUNS: dict[str, RunConfig] = {
    # Adam at 1e-3, weight decay 1e-5, at most 10 epochs of 32 × 128, early stop: the paper's set-up. It gives
    # no weights for the terms of its loss. With these the likelihood leads by far: without the
    # reconstruction or the prior a model learns nearly the same (docs/results.md).
    "paper": RunConfig(
        preset="paper",
        model=PRESETS["paper"],
        loss=LossWeights(reconstruction=1.0, spectrum=0.1, language=1.0, prior=1e-3),
        training=TrainingConfig(
            epochs=10,
            batch_size=32,
            optimizer="adam",
            learning_rate=1e-3,
            weight_decay=1e-5,
            beta2=0.999,
            dynamics_rate=1.0,
            fresh_starts=0.0,
            schedule="constant",
            warmup=0.0,
            ema_decay=0.0,
            early_stop=1,
        ),
    ),
    **{
        name: RunConfig(preset=name, model=replace(PRESETS[name], dropout=0.1, atom_dropout=0.1))
        for name in ("edge-nano", "edge-micro", "edge-small")
    },
}


def load_config(
    path: Path | None = None,
    preset: str | None = None,
    base: RunConfig | None = None,
    **tables: Mapping[str, Any],
) -> RunConfig:
    """Read a TOML file, or the recipe of that name, over a preset or `base`, and keyword tables over both.

    >>> load_config(preset="edge-nano", training={"epochs": 1}).training.epochs
    1
    """
    values: dict[str, Any] = {}
    if path is not None:
        recipes = {file.name.removesuffix(".toml"): file for file in RECIPES.iterdir()}
        file = recipes.get(str(path), path) if path.is_dir() or not path.exists() else path
        try:
            values = tomllib.loads(file.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise ConfigError(
                f"{path}: no such config file; check the path given to --config, or name a recipe: "
                f"{', '.join(sorted(recipes))}"
            ) from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as reason:
            raise ConfigError(f"{path} is not a readable TOML file: {reason}") from reason
    if "begun_from" in values:
        raise ConfigError(f"{path}: begun_from is what a run keeps of --from: leave it out, and give --from")
    model = values.get("model")
    if isinstance(model, Mapping) and "vocab_size" in model:
        raise ConfigError(
            f"{path}: model.vocab_size is as large as the vocabulary that is learnt: expected none, got "
            f"{model['vocab_size']!r}; set corpus.vocab_size"
        )
    if preset is not None:
        values["preset"] = preset
    if base is not None and "preset" in values:
        raise ConfigError(
            f"preset: expected none beside a run to begin from, got {values['preset']!r}; leave it out"
        )
    for name, table in tables.items():
        known = values.get(name, {})
        if not isinstance(known, Mapping):
            raise ConfigError(f"{path}: {name} must be a table like [{name}], got {known!r}")
        values[name] = {**known, **table}
    return RunConfig.from_dict(values, str(path) if path else "config", base)


Config = TypeVar("Config", CorpusConfig, ModelConfig, LossWeights, TrainingConfig)


def _read(values: Mapping[str, Any], base: RunConfig | None) -> RunConfig:
    name = values.get("preset", DEFAULT_PRESET if base is None else base.preset)
    _expect(isinstance(name, str) and name in PRESET_RUNS, "preset", f"one of {', '.join(PRESET_RUNS)}", name)
    base = base or PRESET_RUNS[name]
    begun_from = values.get("begun_from", base.begun_from)
    _expect(isinstance(begun_from, str), "begun_from", "the name of a run folder", begun_from)
    tables = {f.name for f in fields(RunConfig)}
    told = ", ".join(sorted(tables - {"begun_from"}))  # which is not for a person to write
    for key in values:
        _expect(key in tables, "a table or key", f"one of {told}", key)
    return RunConfig(
        preset=name,
        begun_from=begun_from,
        corpus=_merge(base.corpus, values.get("corpus", {}), "corpus"),
        model=_merge(base.model, values.get("model", {}), "model"),
        loss=_merge(base.loss, values.get("loss", {}), "loss"),
        training=_merge(base.training, values.get("training", {}), "training"),
    )


def _merge(base: Config, changes: Mapping[str, Any], table: str) -> Config:
    _expect(isinstance(changes, Mapping), table, f"a table like [{table}]", changes)
    known = {f.name for f in fields(base)}
    for key in changes:
        _expect(key in known, f"a key of [{table}]", f"one of {', '.join(sorted(known))}", key)
    frozen: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
    return replace(base, **frozen)
