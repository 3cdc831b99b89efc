"""The bundle: everything that a model needs on a device, checked before it is used.

    manifest.json           version, sha256 and size of every file below, figures, a golden prompt
    config.json             the sizes that the runtime needs, and the model's own config
    tokenizer.json          a tokenizer of exactly `vocab_size` tokens
    generation_config.json  how texts begin and end, and default sampling parameters
    gmm.npz                 the prior: weights (G,), means and variances (G, M) of a mixture; may be absent
    model.onnx, …           the graph, in one variant or more
    generate.onnx           the decoding loop as a graph, for other hosts; may be absent
    README.md               the model card; may be absent

`read_bundle` refuses what is not exactly that, always with a BundleError. `write_bundle` passes what it is
about to write through the same checks and puts it in place by one rename: there is a whole bundle, or none.
"""

import glob
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from .atomic import replacing, replacing_folder, sweep
from .atoms import cut
from .container import AGAIN, Folder, InMemory, Source, decode_arrays, invalid, open_source, shown, write_zip
from .errors import BundleError
from .manifest import (
    CARD,
    CONFIG,
    FORMAT,
    GENERATION,
    GRAPH_NAME,
    LOOP,
    MANIFEST,
    MIXTURE,
    TOKENIZER,
    VERSION,
    BundleConfig,
    GenerationConfig,
    Manifest,
    Variant,
    check_atoms,
    check_golden,
    decode_json,
    encode_json,
    parse_config,
    parse_generation,
    parse_manifest,
)
from .mixture import Mixture
from .shipped import named

SUFFIX = ".sdgm"
_MB = 1 << 20
CAPS = {
    MANIFEST: 16 * _MB,
    CONFIG: _MB,
    TOKENIZER: 64 * _MB,
    GENERATION: _MB,
    MIXTURE: 256 * _MB,
    CARD: _MB,
    LOOP: 64 * _MB,
}
GRAPH_CAP = 2048 * _MB - 1  # protobuf's own limit
_EXTERNAL = b"location"
"""The key that names where a tensor's external data lie: whatever the order of fields, it stands as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A bundle whose small files are read and checked; a graph is checked when it is asked for."""

    path: Path
    """The folder or file."""
    config: BundleConfig
    """Sizes."""
    manifest: Manifest
    """What is in it."""
    tokenizer: Tokenizer
    """The tokenizer, of exactly `config.vocab_size` tokens."""
    generation: GenerationConfig
    """How texts begin and end, and default sampling parameters."""
    mixture: Mixture | None
    """The mixture over mixing vectors, where the model has a prior."""
    source: Source = field(repr=False)
    """Where the files lie."""
    atoms_of: int | None = None
    """Atoms of each layer in the files, where the bundle stands for fewer of them."""

    @property
    def atoms(self) -> int | None:
        """Atoms of each layer, where the manifest tells."""
        return None if self.manifest.atoms is None else self.manifest.atoms.num_atoms

    def variant(self, name: str | None = None) -> Variant:
        """The variant called `name`, or the default one."""
        variants = self.manifest.variants
        if (name or self.manifest.default) not in variants:
            there = " or ".join(variants)
            raise invalid(
                self.path, "no such variant", there, shown(name), "choose one of these, or export it"
            )
        return variants[name or self.manifest.default]

    def graph(self, variant: str | None = None) -> Path | bytes:
        """The checked graph of a variant: its path where it is a file of its own, else its bytes."""
        name = self.variant(variant).file
        _check_self_contained(self.source, name, self.path)
        if self.atoms_of is not None:
            return self._cut(name)
        if path := self.source.path(name):
            self.check(name)
            return path
        return self.read(name)

    def size(self, variant: str | None = None) -> int:
        """Bytes of a variant's graph."""
        name = self.variant(variant).file
        return self.manifest.files[name][1] if self.atoms_of is None else len(self._cut(name))

    def read(self, name: str) -> bytes:
        """A whole file, checked against the manifest.

        Raises:
            BundleError: the manifest names no such file, or it is damaged.
        """
        if name not in self.manifest.files:
            known = ", ".join(self.manifest.files)
            raise invalid(self.path, "no such file", known, repr(name), "name one of these")
        return _checked(self.source, self.manifest, name, self.path)

    def check(self, name: str) -> None:
        """Compare a file with the manifest, in constant memory."""
        _check_digest(self.source.sha256(name), self.manifest, name, self.path)

    def check_all(self) -> None:
        """Compare all files with the manifest, in constant memory."""
        for name in self.manifest.files:
            self.check(name)

    def _cut(self, name: str) -> bytes:
        assert self.atoms_of is not None
        assert self.atoms is not None
        return cut(self.read(name), self.atoms_of, self.atoms, self.config, f"{self.path}: {name}")

    def save(self, target: str | Path) -> Path:
        """Write the same bundle, all atoms, byte for byte, as a folder or (`*.sdgm`) a single file."""
        whole = {MANIFEST: self.source.read(MANIFEST)} | {n: self.read(n) for n in self.manifest.files}
        return _write(Path(target), whole)


def read_bundle(path: str | Path) -> Bundle:
    """Read and check the bundle at `path`, a folder or a single file; "wikitext-2" is the one in the package.

    Raises:
        BundleError: whatever is wrong with it.
    """
    path = named(Path(path))
    return _load(open_source(path), path)


def write_bundle(
    target: str | Path,
    files: Mapping[str, bytes],
    *,
    name: str,
    default: str,
    variants: Mapping[str, Mapping[str, Any]],
    model_id: str,
    golden: Mapping[str, Any],
    made_with: Mapping[str, str],
    num_parameters: int | None = None,
    atoms: Mapping[str, Any] | None = None,
) -> Path:
    """Write a bundle as a folder, or as a single file where `target` ends in `.sdgm`.

    `files` are all files but the manifest, which is made here of the other arguments (`variants`: name →
    {"file", "parity", "accuracy"}; `golden`: {"prompt", "ids", "variants": {name: {"tokens", "logits"}}},
    where a row of logits may be cut to its first numbers; `atoms`: {"count", "state", "steps"} where they lie
    in the order of their strength, see `manifest.Atoms`). A bundle that is already there is replaced;
    anything else is left alone. The same arguments give the same bytes.

    Raises:
        BundleError: what was given makes no valid bundle, or it cannot be written.
    """
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "default": default,
        "variants": variants,
        "files": {n: {"sha256": hashlib.sha256(files[n]).hexdigest(), "bytes": len(files[n])} for n in files},
        "made_with": made_with,
        "model_id": model_id,
        "golden": golden,
        **({} if num_parameters is None else {"num_parameters": num_parameters}),
        **({} if atoms is None else {"atoms": atoms}),
    }
    whole = {MANIFEST: encode_json(manifest)} | {n: files[n] for n in sorted(files)}
    _load(InMemory(whole), Path(target))
    return _write(Path(target), whole)


def _load(source: Source, path: Path) -> Bundle:
    if MANIFEST not in source.sizes:
        is_run = (path / "checkpoints").is_dir()
        remedy = f"`sdgm-edge export {path}` makes one of it" if is_run else f"check the path, or {AGAIN}"
        raise BundleError(f"{path}: not a bundle: it has no {MANIFEST}; {remedy}")
    at = f"{path}: {MANIFEST}"
    manifest = parse_manifest(decode_json(_capped(source, MANIFEST, path), at), at)
    for name, (_, size) in manifest.files.items():
        if source.sizes.get(name) != size:
            raise invalid(path, f"{name} is cut or missing", f"{size} bytes", source.sizes.get(name, "none"))
    if not isinstance(source, Folder) and (extra := source.sizes.keys() - manifest.files.keys() - {MANIFEST}):
        raise invalid(path, "unknown file", "those that the manifest names", shown(min(extra)))

    def content(name: str) -> tuple[bytes, str]:
        return _checked(source, manifest, name, path), f"{path}: {name}"

    config = parse_config(decode_json(*content(CONFIG)), f"{path}: {CONFIG}")
    check_golden(manifest.golden, config.vocab_size, at)
    if manifest.atoms is not None:
        check_atoms(manifest.atoms, config, at)
    return Bundle(
        path=path,
        config=config,
        manifest=manifest,
        tokenizer=_tokenizer(*content(TOKENIZER), config.vocab_size),
        generation=parse_generation(
            decode_json(*content(GENERATION)), config.vocab_size, f"{path}: {GENERATION}"
        ),
        mixture=_mixture(*content(MIXTURE), config.mixing_size) if MIXTURE in manifest.files else None,
        source=source,
    )


def _capped(source: Source, name: str, where: object) -> bytes:
    cap = CAPS.get(name, GRAPH_CAP)
    if source.sizes[name] > cap:
        raise invalid(where, f"{name} is too large", f"at most {cap} bytes", source.sizes[name])
    return source.read(name)


def _checked(source: Source, manifest: Manifest, name: str, where: object) -> bytes:
    data = _capped(source, name, where)
    _check_digest(hashlib.sha256(data).hexdigest(), manifest, name, where)
    return data


def _check_digest(digest: str, manifest: Manifest, name: str, where: object) -> None:
    expected = manifest.files[name][0]
    if digest != expected:
        raise invalid(where, f"{name} is damaged", f"sha256 {expected[:16]}…", f"{digest[:16]}…")


def _check_self_contained(source: Source, name: str, where: object) -> None:
    """Refuse a graph that takes weights from other files, which no hash covers."""
    with source.open(name) as file:
        before = b""
        while block := file.read(_MB):
            if _EXTERNAL in before + block:
                remedy = "export it again with weights inside, and no name that holds the word"
                raise invalid(
                    where, f"{name} refers to other files", "all weights inside it", "a location", remedy
                )
            before = block[-len(_EXTERNAL) :]


def _tokenizer(data: bytes, where: str, vocab_size: int) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except BaseException as e:  # a bare Exception, or for a panic of its Rust code a bare BaseException
        if isinstance(e, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise invalid(where, "not readable", "a tokenizer", shown(str(e), 120)) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = set(tokenizer.get_vocab().values())
    if ids != set(range(vocab_size)):
        got = f"{len(ids)} tokens from {min(ids, default=0)} to {max(ids, default=0)}"
        expected = f"{vocab_size} tokens from 0 as in {CONFIG}"
        raise invalid(where, "the tokenizer of another model", expected, got)
    return tokenizer


def _mixture(data: bytes, where: str, mixing_size: int) -> Mixture:
    arrays = decode_arrays(data, where)
    if arrays.keys() != {"weights", "means", "variances"}:
        raise invalid(where, "other arrays", "weights, means and variances", shown(sorted(arrays)))
    try:
        mixture = Mixture(**arrays)
    except BundleError as e:
        raise BundleError(f"{where}: {e}") from None
    if mixture.size != mixing_size:
        raise invalid(where, "means", f"vectors of {mixing_size} numbers as in {CONFIG}", mixture.size)
    return mixture


def _write(target: Path, files: Mapping[str, bytes]) -> Path:
    """Put `files` at `target` by one rename of a temporary sibling."""
    if target.suffix == SUFFIX:
        with replacing(target, BundleError) as file:
            _clear(target)
            write_zip(file, files)
        return target
    with replacing_folder(target, BundleError) as folder:
        _clear(target)
        for name, data in files.items():
            (folder / name).write_bytes(data)
    return target


def _clear(target: Path) -> None:
    check_replaceable(target)
    sweep(target.parent, f".{glob.escape(target.name)}.*.partial")


def check_replaceable(target: Path) -> None:
    """Replace only a bundle, even a damaged one, or an empty folder, and no file that is not its own.

    Raises:
        BundleError: something else is there.
    """
    if not os.path.lexists(target):
        return
    marked, strangers = target, []
    if target.is_dir() and target.suffix != SUFFIX:
        if not (names := sorted(os.listdir(target))):
            return
        marked = target / MANIFEST
        strangers = [name for name in names if name not in CAPS and not GRAPH_NAME.fullmatch(name)]
    head = b""
    if marked.is_file():
        with open(marked, "rb") as file:
            head = file.read(CAPS[MANIFEST])
    if strangers or f'"{FORMAT}"'.encode() not in head:
        found = f"it also holds {shown(strangers[0])}" if strangers else "it is no bundle"
        raise BundleError(
            f"{target}: will not be replaced: {found}; choose another place, or remove it yourself"
        )
