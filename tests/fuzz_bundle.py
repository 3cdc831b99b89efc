"""Damage bundles and state files in every way that comes to mind; only an SdgmError may come of it.

    python tests/fuzz_bundle.py --seconds 20 [--seed 0]

Prints how many inputs were tried and how many were refused; exits with 1 at the first other exception, and
keeps the input that caused it. Many inputs get their hashes right again, so that the parsers behind the
hashes are tried and not the hashes alone.
"""

import argparse
import hashlib
import io
import json
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import zipfile
from pathlib import Path
from typing import Any

import tiny

from sdgm_edge.runtime import Generator, SdgmError, read_bundle

ODD: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e308, "", "../x", "/etc/passwd", "a" * 300, "\0", [], {},
    [[]], {"a": 1}, [1, "x"], 0.5, "model.onnx", "fp32", "é", "\ud800",
]  # fmt: skip
PARSED = ("manifest.json", "config.json", "tokenizer.json", "generation_config.json", "gmm.npz", "model.onnx")


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut, flip, overwrite, insert, repeat or swap."""
    place = rng.randrange(len(data)) if data else 0
    length = min(rng.choice([1, 2, 4, 8, 64, 1024]), len(data) - place)
    match rng.randrange(7):
        case 0:
            return data[:place]
        case 1:
            return (
                data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
                if data
                else b"\0"
            )
        case 2:
            return data[:place] + rng.randbytes(length) + data[place + length :]
        case 3:
            return data[:place] + rng.randbytes(length) + data[place:]
        case 4:
            return data[:place] + data[place + length :]
        case 5:
            return data[:place] + rng.choice([b"\0", b"\xff"]) * length + data[place + length :]
        case _:
            return data + data[place:]


def damage_json(data: bytes, rng: random.Random) -> bytes:
    """Replace, remove, rename or add one value somewhere in a JSON document."""
    value = json.loads(data)
    holder: Any = value
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            break
        key = rng.choice(keys)
        if isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.7:
            holder = holder[key]
            continue
        match rng.randrange(4):
            case 0:
                holder[key] = rng.choice(ODD)
            case 1:
                del holder[key]
            case 2 if isinstance(holder, dict):
                holder[str(rng.choice(ODD))] = holder.pop(key)
            case _ if isinstance(holder, dict):
                holder[str(rng.choice(ODD))] = rng.choice(ODD)
            case _:
                holder.append(rng.choice(ODD))
        break
    return json.dumps(value).encode("utf-8", "surrogatepass")


def seal(files: dict[str, bytes]) -> dict[str, bytes]:
    """Make sizes and hashes in the manifest right again."""
    manifest = json.loads(files["manifest.json"])
    for name in manifest["files"]:
        if name in files:
            digest = hashlib.sha256(files[name]).hexdigest()
            manifest["files"][name] = {"sha256": digest, "bytes": len(files[name])}
    return files | {"manifest.json": json.dumps(manifest).encode()}


def pack(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


class Fuzzer:
    """One damaged input after another; the same seed gives the same inputs."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.whole = tiny.write(folder / "whole.sdgm").read_bytes()
        bundle = read_bundle(folder / "whole.sdgm")
        self.files = {name: bundle.source.read(name) for name in bundle.source.sizes}
        self.generator = Generator.load(folder / "whole.sdgm", providers="cpu")
        session = self.generator.session()
        session.feed("Once upon a time")
        session.save(folder / "whole.state")
        self.state = (folder / "whole.state").read_bytes()
        self.tried = self.refused = 0

    def one(self) -> None:
        """Try one input; raises what is no SdgmError."""
        kind = self.rng.choice(["zip", "folder", "sealed", "sealed", "state"])
        self.tried += 1
        try:
            if kind == "state":
                self._state()
            elif kind == "zip":
                self._bundle(damage_bytes(self.whole, self.rng))
            else:
                self._files(sealed=kind == "sealed")
        except SdgmError as e:
            if not str(e) or "\n" in str(e):
                raise AssertionError("expected a message of one line") from e
            self.refused += 1

    def _state(self) -> None:
        path = self.folder / "damaged.state"
        data = damage_bytes(self.state, self.rng)
        if self.rng.random() < 0.5:
            data = data[:-32] + hashlib.sha256(data[:-32]).digest()
        path.write_bytes(data)
        session = self.generator.load_session(path)
        session.push(1)
        assert session.logits.shape == (tiny.VOCAB,)

    def _files(self, *, sealed: bool) -> None:
        files, rng = dict(self.files), self.rng
        name = rng.choice(PARSED if sealed else sorted(files))
        json_file = name.endswith(".json")
        files[name] = (damage_json if json_file and rng.random() < 0.7 else damage_bytes)(files[name], rng)
        if sealed and name != "manifest.json":
            files = seal(files)
        if rng.random() < 0.8:
            self._bundle(pack(files))
            return
        path = self.folder / "damaged"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        for name, data in files.items():
            (path / name).write_bytes(data)
        self._open(path)

    def _bundle(self, data: bytes) -> None:
        path = self.folder / "damaged.sdgm"
        path.write_bytes(data)
        self._open(path)

    def _open(self, path: Path) -> None:
        read_bundle(path).check_all()
        generator = Generator.load(path, providers="cpu")
        generator.generate("Once", max_new_tokens=2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    seed = random.randrange(2**32) if arguments.seed is None else arguments.seed
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder), seed)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        end = time.monotonic() + arguments.seconds
        while time.monotonic() < end:
            try:
                fuzzer.one()
            except Exception:  # noqa: BLE001  whatever it is, it is what is looked for
                traceback.print_exc()
                kept = Path(tempfile.mkdtemp(prefix="sdgm-fuzz-")) / "inputs"
                shutil.copytree(folder, kept)
                sys.stderr.write(f"seed {seed}, input {fuzzer.tried}: no SdgmError; the input is in {kept}\n")
                return 1
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    sys.stdout.write(
        f"{fuzzer.tried} inputs tried, {fuzzer.refused} refused, the others harmless; "
        f"seed {seed}, peak memory grew by {grown:.0f} MB\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
