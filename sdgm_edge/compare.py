"""A comparison: models of one size, trained on one text under the same terms, each in a process of its own.

What is compared is named by *entries*:

    sdgm                       the SDGM of the protocol
    ringing                    the product's SDGM, whatever the protocol
    gpt2, transformer-xl, …    a baseline, by its name in `sdgm_edge.models.MIXERS`
    NAME:KEY=VALUE+KEY=VALUE   the same with some settings changed, after its size was chosen
    ablations                  all of `ABLATIONS`: the paper's questions

A KEY is a field of the model, the loss or the training, or a short name of one: see `SHORT`.

The *protocol* says how all are trained. `paper` is the paper's set-up: Adam at 1e-3, at most 10 epochs, early
stop, the literal SDGM and its composite loss. `best` is the product's: ringing atoms, AdamW with a cosine
schedule, averaged weights. What is not the protocol's SDGM has the likelihood alone as its loss. All models
have a pointer or none has: that of the protocol's SDGM, unless the terms say otherwise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from sdgm_edge import child
from sdgm_edge.config import PRESET_RUNS, CorpusConfig, RunConfig
from sdgm_edge.inference import Inference
from sdgm_edge.losses import LossWeights
from sdgm_edge.models import MIXERS, preset, scaled, sized
from sdgm_edge.run import TRIAL, write_json
from sdgm_edge.runtime import ConfigError, RunError
from sdgm_edge.trial import Result, Trial

PROTOCOLS = {"paper": "paper", "best": "edge-micro"}
"""The preset whose training a protocol takes."""

PRODUCT = "ringing"
"""The layer of the product's SDGM."""

SHORT = {
    "alpha": "reconstruction",
    "beta": "spectrum",
    "gamma": "language",
    "delta": "prior",
    "K": "num_atoms",
    "D": "width",
    "depth": "num_layers",
    "kernel": "conv_width",
    "lr": "learning_rate",
}
"""Short names of fields."""

_OF_THE_MODEL = (
    *(f"sdgm:K={size}" for size in (32, 64, 128, 256, 512)),
    *(f"sdgm:activation={name}" for name in ("softmax", "tanh", "gelu", "silu", "identity")),
    *(f"sdgm:kernel={width}" for width in (1, 2, 4, 8)),
    *(f"sdgm:layer={layer}" for layer in ("clock", "ringing")),
    *(f"sdgm:residual=true+depth={depth}" for depth in (1, 2, 4)),
)
_OF_THE_LOSS = tuple(f"sdgm:{term}=0" for term in ("alpha", "beta", "gamma", "delta"))

ABLATIONS = {"paper": ("sdgm", *_OF_THE_LOSS, *_OF_THE_MODEL), "best": ("sdgm", *_OF_THE_MODEL)}
"""By protocol, one thing changed at a time; the loss of `best` is the likelihood alone already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What all models of a comparison share."""

    corpus: CorpusConfig
    vocab_size: int
    num_parameters: int
    protocol: str = "best"
    training: Mapping[str, Any] | None = None
    """Fields of the training that differ from the protocol's, such as `epochs`."""
    window: int = 128
    copy_window: int | None = None
    """Recent tokens that every model's head can copy; None for those of the protocol's SDGM."""
    minutes: float = 0.0
    """Train every model for so long, in place of so many epochs; 0 for epochs."""
    device: str = "auto"
    precision: str = "auto"

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ConfigError(f"--protocol: expected {' or '.join(PROTOCOLS)}, got {self.protocol!r}")
        if not 0 <= self.minutes < math.inf:
            raise ConfigError(f"--minutes: expected a number from 0, got {self.minutes}; 0 trains by epochs")

    @property
    def pointer(self) -> int:
        """Tokens that every model's head can copy, unless its entry says otherwise."""
        of_protocol = PRESET_RUNS[PROTOCOLS[self.protocol]].model.copy_window
        return of_protocol if self.copy_window is None else self.copy_window


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one entry with one seed."""

    entry: str
    seed: int
    folder: Path
    result: Result
    inference: Inference | None = None
    """What its graph costs, where that was measured."""


def parse_budget(text: str) -> int:
    """Read a number of parameters: 4M, 250k, 22.8M or 4000000.

    >>> parse_budget("22.8M")
    22800000
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgGbB]?)", text.strip())
    if not match or not float(match[1]):
        raise ConfigError(f"--params: expected a number of parameters such as 4M or 250k, got {text!r}")
    return round(float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}[match[2].lower()])


def parse_entries(text: str, protocol: str = "best") -> tuple[str, ...]:
    """Read a list of entries with commas; each counts once.

    >>> parse_entries("sdgm,gpt2:lr=1e-3")
    ('sdgm', 'gpt2:lr=1e-3')
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    ablations = ABLATIONS.get(protocol, ())
    entries = [entry for name in names for entry in (ablations if name == "ablations" else (name,))]
    for entry in entries:
        for key, flag in (("seed", "--seeds"), ("vocab_size", "--vocab-size")):
            if key in dict(_changes(entry, entry.partition(":")[2])):
                raise ConfigError(f"{entry}: {key} is the same for all models: leave it out, and give {flag}")
    if not entries:
        raise ConfigError("--models: expected names with commas between them, such as sdgm,gpt2; got none")
    return tuple(dict.fromkeys(entries))


def parse_contexts(text: str) -> tuple[int, ...]:
    """Read numbers of tokens with commas; each counts once.

    >>> parse_contexts("0, 128,4k")
    (0, 128, 4096)
    """
    contexts: dict[int, None] = {}
    for name in filter(None, map(str.strip, text.split(","))):
        match = re.fullmatch(r"(\d{1,7})([kK]?)", name)
        if not match:
            raise ConfigError(f"--contexts: expected numbers of tokens such as 0,128,4k, got {name!r}")
        contexts[int(match[1]) * (1024 if match[2] else 1)] = None
    if not contexts:
        raise ConfigError(
            "--contexts: expected numbers of tokens such as 0,128,4k, got none; or --no-inference"
        )
    return tuple(contexts)


def at_rates(entries: Sequence[str], rates: str) -> tuple[str, ...]:
    """Return every entry at each of some learning rates, so that none is judged by one that does not suit it.

    >>> at_rates(["sdgm", "gpt2:depth=2"], "1e-3,4e-3")
    ('sdgm:lr=1e-3', 'sdgm:lr=4e-3', 'gpt2:depth=2+lr=1e-3', 'gpt2:depth=2+lr=4e-3')
    """
    values = [rate.strip() for rate in rates.split(",") if rate.strip()]
    if not values:
        return tuple(entries)
    return tuple(f"{entry}{'+' if ':' in entry else ':'}lr={rate}" for entry in entries for rate in values)


def entry_config(entry: str, terms: Terms, seed: int) -> RunConfig:
    """Return how an entry is trained.

    Raises:
        ConfigError: an unknown name or key, or a size that cannot be had.
    """
    name, _, changes = entry.partition(":")
    if name not in ("sdgm", PRODUCT, *MIXERS):
        raise ConfigError(f"--models: expected sdgm, {PRODUCT}, ablations, {', '.join(MIXERS)}, got {name!r}")
    base = PRESET_RUNS[PROTOCOLS[terms.protocol]]
    settings: dict[str, Any] = {
        "vocab_size": terms.vocab_size,
        "window": terms.window,
        "dropout": base.model.dropout,
        "copy_window": terms.pointer,
    }
    try:
        if name == "sdgm" and terms.protocol == "paper":
            model = scaled(preset("paper", **settings), terms.num_parameters)
        else:
            layer = PRODUCT if name == "sdgm" else name
            model = sized(layer, terms.num_parameters, **settings)
            if "atom_dropout" not in model.unheeded:
                model = replace(model, atom_dropout=base.model.atom_dropout)
        training = replace(base.training, **{**(terms.training or {}), "seed": seed})
        loss = base.loss if name == "sdgm" else LossWeights()
        config = replace(base, corpus=terms.corpus, model=model, loss=loss, training=training)
        return _changed(config, dict(_changes(entry, changes)))
    except ValueError as reason:
        raise ConfigError(f"{entry}: {reason}") from reason


def _changes(entry: str, text: str) -> Iterator[tuple[str, str]]:
    for change in filter(None, text.split("+")):
        key, equals, value = change.partition("=")
        if not equals:
            raise ConfigError(f"{entry}: expected KEY=VALUE, got {change!r}; write it as in sdgm:beta=0+K=64")
        yield SHORT.get(key, key), value


def _changed(config: RunConfig, changes: dict[str, str]) -> RunConfig:
    tables: dict[str, Any] = {"model": config.model, "loss": config.loss, "training": config.training}
    new: dict[str, dict[str, Any]] = {name: {} for name in tables}
    known = {f.name: name for name, table in tables.items() for f in fields(table)}
    for key, text in changes.items():
        if key not in known:
            raise ValueError(f"a key must be one of {', '.join([*SHORT, *sorted(known)])}, got {key!r}")
        new[known[key]][key] = _value(key, text, getattr(tables[known[key]], key))
    model, loss, training = (replace(table, **new[name]) for name, table in tables.items())
    if unheeded := model.unheeded & new["model"].keys():
        raise ValueError(f"{min(unheeded)} changes nothing in a model of layer {model.layer!r}: leave it out")
    return replace(config, model=model, loss=loss, training=training)


def _value(key: str, text: str, before: object) -> object:
    """Read a value of the kind that a field has."""
    if isinstance(before, str):
        return text
    if isinstance(before, bool):
        if text not in ("true", "false"):
            raise ValueError(f"{key} must be true or false, got {text!r}")
        return text == "true"
    try:
        return type(before)(text)  # type: ignore[call-arg]
    except ValueError:
        kind = "a whole number" if isinstance(before, int) else "a number"
        raise ValueError(f"{key} must be {kind}, got {text!r}") from None


def compare(
    entries: Sequence[str],
    terms: Terms,
    folder: Path,
    cache: Path,
    seeds: int = 1,
    contexts: Sequence[int] = (),
    progress: Callable[[str], None] = lambda message: None,
) -> list[Outcome]:
    """Train every entry with every seed, measure its graph after every context, and return what came of each.

    What is there already is not done again; without `contexts`, nothing is exported.

    Raises:
        ConfigError: an entry cannot be read; before anything is trained.
        RunError: the folder holds a trial of the same name with other settings.
        KeyboardInterrupt: a signal came; what was under way is saved, and the next call goes on with it.
    """
    if seeds < 1:
        raise ConfigError(f"--seeds: expected a whole number from 1, got {seeds}")
    trials = {
        (entry, seed): Trial(
            config=entry_config(entry, terms, seed),
            minutes=terms.minutes,
            device=terms.device,
            precision=terms.precision,
        )
        for seed in range(seeds)
        for entry in entries
    }
    places: dict[Trial, Path] = {}  # entries that come to the same are trained once
    outcomes = []
    for number, ((entry, seed), trial) in enumerate(trials.items(), start=1):
        name = re.sub(r"[^\w.=+-]", "-", entry) + f"-seed{seed}"
        place = places.setdefault(trial, folder / name)
        _prepare(place, trial)
        result = Result.read(place)
        progress(
            f"{number}/{len(trials)} {entry}, seed {seed}"
            + (f": {result.status} already" if result else f": {trial.config.model.layer}")
        )
        result = result or _run(place, cache)
        inference = _measure(place, contexts) if contexts and result.status == "finished" else None
        outcomes.append(Outcome(entry, seed, place, result, inference))
    return outcomes


def _prepare(place: Path, trial: Trial) -> None:
    if not (place / TRIAL).exists():
        write_json(place / TRIAL, trial.to_dict())
    elif Trial.read(place) != trial:
        raise RunError(
            f"{place} holds a trial with other settings: choose another --out, or delete that folder"
        )


def _run(place: Path, cache: Path) -> Result:
    """Run a trial in a process of its own."""
    ended = _process("sdgm_edge.trial", str(place), str(cache))
    result = Result.read(place)
    if ended or result is None:  # nothing is left behind, so that the next call tries again
        return Result(status="failed", reason=f"the training process {ended}; see {place}")
    return result


def _measure(place: Path, contexts: Sequence[int]) -> Inference:
    """Export what was trained and measure it, in processes of their own."""
    found = Inference.read(place)
    if found is None or found.graph_bytes is None or not set(contexts) <= found.costs.keys():
        ended = _process("sdgm_edge.export.inference", str(place), ",".join(map(str, contexts)))
        found = Inference.read(place) or Inference()
        if ended:
            return replace(found, reason=f"the measuring process {ended}; see {place}")
    return replace(found, costs={c: found.costs[c] for c in contexts if c in found.costs})


def _process(module: str, *arguments: str) -> str:
    """Run a module; what it ended with, or nothing where all went well.

    Raises:
        KeyboardInterrupt: a signal came, here or there.
    """
    code = child.run(["-m", module, *arguments]).returncode
    return child.told(code) if code else ""


def summarize(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return a row for each entry: the mean over its seeds, and the sample deviation where there are several.

    An entry one of whose seeds diverged or failed has that as its status; `beyond` are contexts that its
    window does not hold.
    """
    rows = []
    for entry in dict.fromkeys(outcome.entry for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.entry == entry]
        results, measured = [o.result for o in own], [o.inference for o in own if o.inference]
        bad = [result for result in results if result.status != "finished"]
        row: dict[str, Any] = {
            "entry": entry,
            "status": bad[0].status if bad else "finished",
            "reason": next(filter(None, (*(r.reason for r in bad), *(i.reason for i in measured))), None),
            "seeds": len(results),
            "finished": len(results) - len(bad),
        }
        contexts = sorted({context for inference in measured for context in inference.costs})
        columns = {name: [getattr(result, name) for result in results] for name in FIGURES}
        columns |= {name: [getattr(inference, name) for inference in measured] for name in GRAPH_FIGURES}
        for context in contexts:
            costs = [inference.costs.get(context) for inference in measured]
            columns[f"decode_at_{context}"] = [cost and cost.tokens_per_second for cost in costs]
            columns[f"peak_at_{context}"] = [cost and cost.peak for cost in costs]
        for name, column in columns.items():
            values = [value for value in column if value is not None]
            row[name] = sum(values) / len(values) if values else None
            row[f"{name}_spread"] = _deviation(values)
        row["contexts"] = contexts
        row["beyond"] = [c for c in contexts if any(inference.beyond(c) for inference in measured)]
        row["results"] = [asdict(result) for result in results]
        row["inference"] = [inference.to_dict() for inference in measured]
        rows.append(row)
    return rows


FIGURES = (
    "num_parameters",
    "word_perplexity",
    "overlapping_word_perplexity",
    "bits_per_byte",
    "token_perplexity",
    "tokens_per_second",
    "peak_memory_bytes",
    "cosine",
    "steps",
    "seconds",
)
"""Of a `Result`."""
GRAPH_FIGURES = ("graph_bytes", "first_token")
"""Of an `Inference`, besides those of each context."""


def _deviation(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
