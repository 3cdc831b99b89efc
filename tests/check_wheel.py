"""Build the wheel from the tree and use it as a device would: in a clean environment, outside the checkout.

`make wheel` runs this. It is no pytest module, because it builds an environment of its own.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

TRIAL = """
import importlib, importlib.util, pkgutil, sys
import sdgm_edge.runtime
for module in pkgutil.iter_modules(sdgm_edge.runtime.__path__, "sdgm_edge.runtime."):
    importlib.import_module(module.name)
heavy = {"torch", "sklearn", "onnx", "onnx_ir", "matplotlib"} & set(sys.modules)
assert not heavy, f"the runtime imports {sorted(heavy)}"
leaked = [name for name in ("export", "runtime", "models", "cli") if importlib.util.find_spec(name)]
assert not leaked, f"top-level modules in site-packages: {leaked}"
assert "site-packages" in sdgm_edge.__file__, f"imported from {sdgm_edge.__file__}"
"""


def main() -> None:
    """Build, compare, install, try; stop at the first thing that is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(Path(folder))
        compare(wheel, Path(folder) / "tree")
        try_out(wheel, Path(folder))
        (ROOT / "dist").mkdir(exist_ok=True)
        kept = shutil.copy(wheel, ROOT / "dist")
    sys.stdout.write(f"{os.path.relpath(kept)} is complete, and runs without torch\n")


def build(folder: Path) -> Path:
    """The wheel, built from a copy of the tree, so that no stale build folder takes part."""
    ignored = shutil.ignore_patterns(".*", "build", "dist", "runs", "bundles", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "tree", ignore=ignored)
    run([sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(folder / "tree")], folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def compare(wheel: Path, tree: Path) -> None:
    """The wheel holds each file of the mapped folders, in its place, and nothing else but its metadata."""
    mapping = tomllib.loads((tree / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    expected = {
        f"{package.replace('.', '/')}/{path.relative_to(tree / folder).as_posix()}"
        for package, folder in mapping.items()
        for path in (tree / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyi" and path.name != "ruff.toml"
    }
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if not name.startswith("sdgm_edge-")}
    if found != expected:
        sys.exit(
            f"{wheel.name} lacks {sorted(expected - found)} of the tree, and has {sorted(found - expected)} "
            "beyond it; mend packages or package-data of [tool.setuptools] in pyproject.toml"
        )


def try_out(wheel: Path, folder: Path) -> None:
    """Install with the extra of a device, import the runtime, call the command line."""
    environment = folder / "environment"
    venv.create(environment, with_pip=True)
    bin_folder = environment / ("Scripts" if os.name == "nt" else "bin")
    python = str(bin_folder / "python")
    run([python, "-m", "pip", "install", "--quiet", f"{wheel}[cpu]"], folder)
    run([python, "-m", "pip", "check"], folder)
    run([python, "-I", "-W", "error", "-c", TRIAL], folder)
    command = str(bin_folder / "sdgm-edge")
    assert "Usage: sdgm-edge" in run([command, "--help"], folder)
    assert run([command, "--version"], folder).startswith("sdgm-edge ")


def run(command: Sequence[str], folder: Path) -> str:
    """What a command prints; its failure ends the check with all that it said."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}exit code {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    main()
