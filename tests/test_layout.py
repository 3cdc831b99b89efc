"""The shape of the project: what is packaged, and what may import what (docs/architecture.md)."""

import ast
import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"sdgm_edge": "sdgm_edge", "export": "sdgm_edge.export", "runtime": "sdgm_edge.runtime",
           "models": "sdgm_edge.models"}  # fmt: skip

RUNTIME_TOOLS = {"numpy", "onnxruntime", "tokenizers"}
MAY_IMPORT = {
    "runtime": RUNTIME_TOOLS,
    "models": {"torch"},
    "sdgm_edge": RUNTIME_TOOLS
    | {"torch", "sklearn", "safetensors", "matplotlib", "tensorboard", "typer", "rich"}
    | {"sdgm_edge", "sdgm_edge.models", "sdgm_edge.runtime"},
    "export": RUNTIME_TOOLS
    | {"torch", "onnx", "onnx_ir"}
    | {"sdgm_edge", "sdgm_edge.models", "sdgm_edge.runtime"},
}
OURS = ("sdgm_edge", *(name for name in FOLDERS.values()))


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """The absolute names that a module imports, and whether that is inside a function."""
    tree = ast.parse(path.read_text("utf-8"))
    inside = {
        inner
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module is not None
            if node.module == "sdgm_edge":  # what it brings may be a folder
                names = [f"sdgm_edge.{alias.name}" for alias in node.names]
                yield from ((name if name in OURS else "sdgm_edge", node in inside) for name in names)
            else:
                yield node.module, node in inside


def owner(name: str) -> str:
    """The folder of ours that a name belongs to, or its top-level package."""
    folders = [folder for folder in OURS if name == folder or name.startswith(f"{folder}.")]
    return max(folders, key=len) if folders else name.partition(".")[0]


def foreign(folder: str, path: Path) -> list[str]:
    """The imports that a module of `folder` must not have."""
    allowed = MAY_IMPORT[folder] | sys.stdlib_module_names
    if path.parent == ROOT / "sdgm_edge" and path.name.startswith(("cli.", "commands_")):
        allowed |= set(OURS)
    return [name for name, _ in imports(path) if owner(name) not in allowed]


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_follow_the_table(folder: str) -> None:
    found = {
        str(path.relative_to(ROOT)): names for path in modules(folder) if (names := foreign(folder, path))
    }
    assert not found


@pytest.mark.parametrize("folder", FOLDERS)
def test_other_folders_are_imported_from_their_root(folder: str) -> None:
    deep = [
        f"{path.name}: {name}"
        for path in modules(folder)
        for name, _ in imports(path)
        if owner(name) in {"sdgm_edge.export", "sdgm_edge.runtime", "sdgm_edge.models"}
        and name != owner(name)
    ]
    assert not deep


@pytest.mark.parametrize(
    ("folder", "line", "name"),
    [
        ("runtime", "import torch.nn", "torch.nn"),
        ("runtime", "from sdgm_edge import models", "sdgm_edge.models"),
        ("runtime", "def f():\n    from sdgm_edge.models import SDGM", "sdgm_edge.models"),
        ("models", "import numpy", "numpy"),
        ("sdgm_edge", "from sdgm_edge.export import x", "sdgm_edge.export"),
        ("export", "import sklearn", "sklearn"),
    ],
)
def test_a_foreign_import_is_found(tmp_path: Path, folder: str, line: str, name: str) -> None:
    (tmp_path / "module.py").write_text(f"import json\n{line}\n")
    assert foreign(folder, tmp_path / "module.py") == [name]


def test_command_line_imports_what_is_heavy_inside_its_commands() -> None:
    light = sys.stdlib_module_names | {"typer", "rich", "sdgm_edge"}
    heavy = [
        name for name, inside in imports(ROOT / "sdgm_edge/cli.py") if not inside and owner(name) not in light
    ]
    assert not heavy


def test_package_itself_imports_nothing() -> None:
    assert list(imports(ROOT / "sdgm_edge/__init__.py")) == []


def test_runtime_loads_no_training_tool() -> None:
    code = "import sys, sdgm_edge.runtime as r\nfor n in r.__all__: getattr(r, n)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"torch", "sklearn", "onnx", "onnx_ir", "typer", "rich", "matplotlib"}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    declared = {re.split(r"[^\w-]", line)[0] for line in lines} - {"sdgm-edge"}
    sources = [path for folder in (*FOLDERS, "tests", "benchmarks", "examples") for path in modules(folder)]
    ours = {*OURS, *(path.stem for path in sources)}
    found = {owner(name) for path in sources for name, _ in imports(path)} - ours - sys.stdlib_module_names
    named = {"sklearn": "scikit-learn", "onnx_ir": "onnx-ir"}
    tools = {"build", "mypy", "pre-commit", "pytest-xdist", "ruff", "setuptools"}
    behind_others = {"onnxruntime-gpu", "tensorboard"}  # imported as onnxruntime, and by torch
    assert {named.get(name, name) for name in found} == declared - tools - behind_others


def test_packages_are_the_folders() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    assert tools["package-dir"] == {package: folder for folder, package in FOLDERS.items()}
    on_disk = {
        ".".join([package, *path.parent.relative_to(ROOT / folder).parts])
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
        and not any(part.startswith((".", "__pycache__")) for part in path.relative_to(ROOT).parts)
    }
    assert set(tools["packages"]) == on_disk, "folders of data are packages too"
    orphans = [
        path for folder in FOLDERS for path in modules(folder) if not (path.parent / "__init__.py").exists()
    ]
    assert not orphans


def test_version_is_told_once() -> None:
    import sdgm_edge

    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert sdgm_edge.__version__ == version
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text("utf-8")


def test_checkout_command_line_is_four_lines() -> None:
    lines = [line for line in (ROOT / "cli.py").read_text("utf-8").splitlines() if line]
    assert len(lines) <= 4
    assert {name for name, _ in imports(ROOT / "cli.py")} == {"sdgm_edge.cli"}


@pytest.mark.parametrize("folder", ["export", "models", "runtime"])
def test_bridge_for_type_checkers(folder: str) -> None:
    assert (ROOT / "sdgm_edge" / f"{folder}.pyi").read_text("utf-8") == f"from {folder} import *\n"
    tree = ast.parse((ROOT / folder / "__init__.py").read_text("utf-8"))
    names = {target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets
             if isinstance(target, ast.Name)}  # fmt: skip
    assert (
        "__all__" in names or len(tree.body) == 1
    )  # what the bridge passes on is said, unless there is nothing


@pytest.mark.parametrize("folder", FOLDERS)
def test_modules_stay_small(folder: str) -> None:
    long = {
        path.name: lines for path in modules(folder) if (lines := len(path.read_text().splitlines())) > 600
    }
    assert not long


def test_no_place_of_one_machine_is_named() -> None:
    places = ["/" + place for place in ("work/", "root/", "home/", "Users/")]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    found = [
        f"{name}: {place}"
        for name in listed.stdout.splitlines()
        if (ROOT / name).suffix in {".py", ".pyi", ".md", ".toml", ".sh", ".cff", ".yaml", ".csv", ".json"}
        and (ROOT / name).exists()
        for place in places
        if place in (ROOT / name).read_text("utf-8")
    ]
    assert not found
