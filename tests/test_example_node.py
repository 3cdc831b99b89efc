"""examples/node, where Node and the packages it needs are at hand."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import trained

from sdgm_edge.export import export_run, pipeline
from sdgm_edge.runtime import Generator

EXAMPLE = Path(__file__).parents[1] / "examples/node"
MODULES = Path(os.environ.get("SDGM_EDGE_NODE_MODULES", EXAMPLE / "node_modules"))
TEXT = "the bell rang and the old man"


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The example in a folder of its own, and a bundle; calling it gives what it prints."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    if not (MODULES / "onnxruntime-node").is_dir():
        pytest.skip(f"onnxruntime-node is not in {MODULES}: npm install there, or set SDGM_EDGE_NODE_MODULES")
    folder = tmp_path_factory.mktemp("node")
    for name in ("generate.js", "package.json"):
        shutil.copy(EXAMPLE / name, folder)
    (folder / "node_modules").symlink_to(MODULES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "load_run", lambda path: trained.run())
        patch.setattr(pipeline, "SPEED_SECONDS", 0.001)
        export_run("runs/tale", folder / "bundle", (8,), loop=True)

    def call(*arguments):
        command = ["node", "generate.js", "bundle", *arguments]
        return subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", check=True).stdout

    call.bundle = folder / "bundle"
    return call


@pytest.mark.parametrize("prompt", [TEXT, f"{TEXT} " * 40, ""])
def test_greedy_is_what_the_runtime_generates(example, prompt):
    generator = Generator.load(example.bundle)
    expected = generator.generate(prompt or None, max_new_tokens=24, temperature=0).tokens
    assert json.loads(example(prompt, "--count", "24", "--ids")) == expected


def test_text_comes_out_and_seeds_matter(example):
    def text(seed):
        return example(TEXT, "--count", "12", "--temperature", "9", "--top-k", "0", "--seed", str(seed))

    first = text(1)
    assert first.startswith(TEXT)
    assert first == text(1)
    assert first != text(2)
