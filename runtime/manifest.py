"""The JSON files of a bundle: their fields, and how each of them can be wrong.

A field that is missing, unknown or of another type is an error that names it: a bundle of another version is
recognised by its version, never half understood.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from .container import AGAIN, check_name, invalid, shown
from .errors import BundleError, ParameterError
from .parameters import SamplingParams

FORMAT, VERSION = "sdgm-bundle", 1
VARIANTS = ("fp32", "int8", "q4", "fp16")
MANIFEST, CONFIG, TOKENIZER = "manifest.json", "config.json", "tokenizer.json"
GENERATION, MIXTURE, CARD = "generation_config.json", "gmm.npz", "README.md"
LOOP = "generate.onnx"
REQUIRED, OPTIONAL = {CONFIG, TOKENIZER, GENERATION}, {MIXTURE, CARD, LOOP}
LONGEST_NAME = 200
"""Characters of a model's name."""
GRAPH_NAME = re.compile(r"model(_[a-z0-9]+)?\.onnx")

_LIMITS = {"vocab_size": 1 << 22, "state_size": 1 << 24, "mixing_size": 1 << 20, "chunk": 1 << 16}
_FLOAT32_MAX = 3.4028235e38
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FIGURES = (dict, type(None))


class BundleConfig(NamedTuple):
    """config.json."""

    vocab_size: int
    """Number of tokens V."""
    state_size: int
    """Numbers in the state of a sequence, S."""
    mixing_size: int
    """Length M of a mixing vector of the last spectral layer."""
    chunk: int
    """Most tokens that the graph takes at once."""
    model: dict[str, Any]
    """The model's own config; the runtime does not look into it."""


class GenerationConfig(NamedTuple):
    """generation_config.json."""

    begin_token: int
    """The token that every text begins with; the runtime puts it before the first one."""
    end_tokens: list[int]
    """Tokens that end a text."""
    sampling: SamplingParams
    """Default sampling parameters."""


class Variant(NamedTuple):
    """One graph of a bundle."""

    name: str
    """fp32, int8, q4 or fp16."""
    file: str
    """Name of its file."""
    parity: dict[str, Any] | None
    """Figures of the parity gate, as the exporter recorded them."""
    accuracy: dict[str, Any] | None
    """Figures of the accuracy gate, as the exporter recorded them."""


class Atoms(NamedTuple):
    """Of a bundle whose atoms lie in the order of their strength, so that weak ones can be left out."""

    num_atoms: int
    """Of each layer; `count` in the file."""
    state: int
    """Numbers of the state that an atom of each layer takes together."""
    steps: dict[str, int]
    """For each variant whose atoms can be parted, what their number must be a multiple of."""


class Golden(NamedTuple):
    """What the machine that exported the bundle generated greedily."""

    prompt: str
    """The prompt."""
    ids: list[int]
    """The prompt's tokens."""
    tokens: dict[str, list[int]]
    """For each variant, the tokens that follow."""
    logits: dict[str, list[list[float]]]
    """For each variant and token, the logits (or the first of them) from which it was taken."""


class Manifest(NamedTuple):
    """manifest.json."""

    name: str
    """The model's name."""
    default: str
    """The variant that is used when none is asked for."""
    variants: dict[str, Variant]
    """The graphs."""
    files: dict[str, tuple[str, int]]
    """sha256 and size of every other file."""
    made_with: dict[str, str]
    """Versions of the packages that made the bundle."""
    model_id: str
    """sha256 that names the weights; state files are bound to it."""
    golden: Golden
    """The golden prompt."""
    num_parameters: int | None
    """How many numbers the model has learnt, where the exporter tells."""
    atoms: Atoms | None
    """How weak atoms are left out, where they can be."""


def encode_json(value: object) -> bytes:
    """JSON as bytes: the same value gives the same bytes; NaN and infinity are refused."""
    try:
        text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
        return f"{text}\n".encode()
    except (TypeError, ValueError) as e:
        raise BundleError(
            f"cannot be written as JSON: {e}; use plain values, finite numbers and valid text"
        ) from e


def decode_json(data: bytes, where: str) -> Any:
    """Strict JSON: UTF-8, also where characters are escaped, no field twice, finite numbers."""

    def unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(fields := dict(items)) != len(items):
            raise ValueError(f"a field is there twice among {shown(sorted(fields))}")
        return fields

    def finite(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text} is no finite number")
        return value

    try:
        value = json.loads(data.decode(), object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
        for text in _texts(value):
            text.encode()
        return value
    except (ValueError, RecursionError) as e:
        raise invalid(where, "not readable", "valid JSON", shown(str(e), 120)) from None


def parse_config(value: Any, where: str) -> BundleConfig:
    """Check the content of config.json."""
    _record(value, where, vocab_size=int, state_size=int, mixing_size=int, chunk=int, model=dict)
    for name, limit in _LIMITS.items():
        _require(1 <= value[name] <= limit, where, name, f"1 to {limit}", value[name])
    _require_printable(value["model"], where, "model")
    return BundleConfig(**value)


def parse_generation(value: Any, vocab_size: int, where: str) -> GenerationConfig:
    """Check the content of generation_config.json."""
    _record(value, where, begin_token=int, end_tokens=list, sampling=dict)
    check_ids([value["begin_token"], *value["end_tokens"]], vocab_size, where)
    try:
        sampling = SamplingParams.from_dict(value["sampling"])
    except ParameterError as e:
        raise BundleError(f"{where}: sampling: {e}") from None
    return GenerationConfig(
        begin_token=value["begin_token"], end_tokens=value["end_tokens"], sampling=sampling
    )


def parse_manifest(value: Any, where: str) -> Manifest:
    """Check the content of manifest.json."""
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise invalid(
            where, "not a bundle", f"format {FORMAT!r}", shown(value), f"check the path, or {AGAIN}"
        )
    version = value.get("version")
    if isinstance(version, int) and version > VERSION:
        raise invalid(
            where, "a newer version", VERSION, version, "upgrade with: pip install --upgrade sdgm-edge"
        )
    _require(version == VERSION and not isinstance(version, bool), where, "version", VERSION, version)
    value = {"num_parameters": None, "atoms": None} | value
    _record(value, where, format=str, version=int, name=str, default=str, variants=dict, files=dict,
            made_with=dict, model_id=str, golden=dict, num_parameters=(int, type(None)),
            atoms=_FIGURES)  # fmt: skip
    files = {}
    for name, entry in value["files"].items():
        _record(entry, f"{where}: files: {check_name(name, where)}", sha256=str, bytes=int)
        good = _SHA256.fullmatch(entry["sha256"]) and entry["bytes"] >= 0
        _require(good, where, f"files: {name}", "64 hexadecimal digits and a size", entry)
        files[name] = (entry["sha256"], entry["bytes"])
    variants = {}
    for name, entry in value["variants"].items():
        _require(name in VARIANTS, where, "unknown variant", " or ".join(VARIANTS), name)
        at = f"variants: {name}"
        _record(entry, f"{where}: {at}", file=str, parity=_FIGURES, accuracy=_FIGURES)
        _require(GRAPH_NAME.fullmatch(entry["file"]), where, at, "a file model….onnx", entry["file"])
        _require_printable(entry, where, at)
        variants[name] = Variant(name=name, **entry)
    graphs = {variant.file for variant in variants.values()}
    _require(len(graphs) == len(variants), where, "variants", "a file for each", sorted(graphs))
    _names(files.keys(), REQUIRED | graphs, OPTIONAL, f"{where}: files", "file")
    name = value["name"]
    _require(0 < len(name) <= LONGEST_NAME, where, "name", f"1 to {LONGEST_NAME} characters", name)
    _require_printable(name, where, "name")
    _require(
        value["default"] in variants, where, "default", f"one of {shown(sorted(variants))}", value["default"]
    )
    versions = value["made_with"]
    _require(
        all(isinstance(v, str) for v in versions.values()), where, "made_with", "versions as text", versions
    )
    _require_printable(versions, where, "made_with")
    count = value["num_parameters"]
    _require(count is None or count > 0, where, "num_parameters", "a number from 1", count)
    model_id = value["model_id"]
    _require(_SHA256.fullmatch(model_id), where, "model_id", "64 hexadecimal digits", model_id)
    return Manifest(
        name=name,
        default=value["default"],
        variants=variants,
        files=files,
        made_with=versions,
        model_id=model_id,
        golden=_golden(value["golden"], variants, f"{where}: golden"),
        num_parameters=count,
        atoms=None if value["atoms"] is None else _atoms(value["atoms"], variants, f"{where}: atoms"),
    )


def check_ids(ids: Iterable[Any], vocab_size: int, where: str) -> None:
    """Refuse what is no token of the model."""
    for i in ids:
        _require(type(i) is int and 0 <= i < vocab_size, where, "no token", f"0 to {vocab_size - 1}", i)


def check_golden(golden: Golden, vocab_size: int, where: str) -> None:
    """Compare the golden prompt with the size of the vocabulary."""
    for ids in (golden.ids, *golden.tokens.values()):
        check_ids(ids, vocab_size, f"{where}: golden")
    for rows in golden.logits.values():
        longest = max(map(len, rows), default=0)
        _require(longest <= vocab_size, where, "golden", f"at most {vocab_size} logits a token", longest)


def check_atoms(atoms: Atoms, config: BundleConfig, where: str) -> None:
    """Compare what is told of atoms with the sizes."""
    at = f"{where}: atoms"
    least = atoms.num_atoms * atoms.state
    _require(least <= config.state_size, at, "state", f"at most {config.state_size} numbers for all", least)
    fits = config.mixing_size % atoms.num_atoms == 0
    _require(fits, at, "count", f"a divisor of mixing_size {config.mixing_size}", atoms.num_atoms)


def _atoms(value: Any, variants: dict[str, Variant], where: str) -> Atoms:
    _record(value, where, count=int, state=int, steps=dict)
    for name in ("count", "state"):
        _require(1 <= value[name] <= _LIMITS["mixing_size"], where, name, "a number from 1", value[name])
    for name, step in value["steps"].items():
        _require(name in variants, where, "steps", f"names among {shown(sorted(variants))}", name)
        good = type(step) is int and step > 0 and value["count"] % step == 0
        _require(good, where, f"steps: {name}", f"a divisor of {value['count']}", step)
    return Atoms(num_atoms=value["count"], state=value["state"], steps=value["steps"])


def _golden(value: Any, variants: dict[str, Variant], where: str) -> Golden:
    _record(value, where, prompt=str, ids=list, variants=dict)
    for name, entry in value["variants"].items():
        _require(name in variants, where, "variants", f"names among {shown(sorted(variants))}", name)
        _record(entry, f"{where}: {name}", tokens=list, logits=list)
        tokens, rows = entry["tokens"], entry["logits"]
        _require(len(rows) == len(tokens), where, f"{name}: logits", f"{len(tokens)} rows", len(rows))
        for row in rows:
            good = isinstance(row, list) and all(type(x) in (float, int) for x in row)
            good = good and all(abs(x) <= _FLOAT32_MAX for x in row)
            _require(good, where, f"{name}: logits", "rows of numbers that float32 holds", row)
    return Golden(
        prompt=value["prompt"],
        ids=value["ids"],
        tokens={name: entry["tokens"] for name, entry in value["variants"].items()},
        logits={name: entry["logits"] for name, entry in value["variants"].items()},
    )


def _texts(value: Any) -> Iterator[str]:
    """All text in a JSON value, keys too."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list):
            left += value


def _require_printable(value: Any, where: str, what: str) -> None:
    """Require text that a command can print as it stands, which no terminal takes for an order."""
    for text in _texts(value):
        _require(text.isprintable(), where, what, "characters that can be printed", text)


def _require(good: object, where: str, what: str, expected: object, got: object) -> None:
    if not good:
        raise invalid(where, what, expected, shown(got))


def _names(
    got: Iterable[str], required: Iterable[str], optional: Iterable[str], where: str, kind: str
) -> None:
    got, required = set(got), set(required)
    if missing := required - got:
        raise invalid(where, f"missing {kind}", min(missing), shown(sorted(got)))
    if unknown := got - required - set(optional):
        raise invalid(where, f"unknown {kind}", ", ".join(sorted(required)), shown(min(unknown)))


def _record(value: Any, where: str, **kinds: type | tuple[type, ...]) -> None:
    """Require a JSON object with exactly these fields of these types."""
    _require(isinstance(value, dict), where, "not as it should be", "an object", value)
    _names(value, kinds, (), where, "field")
    for key, kind in kinds.items():
        good = isinstance(value[key], kind) and not isinstance(value[key], bool)
        expected = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        _require(good, where, key, expected.replace("NoneType", "null"), value[key])
