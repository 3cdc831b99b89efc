"""What the exporter is tested on: tiny models with random weights in every part, and a run of one."""

import atexit
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch

from sdgm_edge.models import SDGM, ModelConfig
from sdgm_edge.run import Run

VOCAB = tiny.VOCAB

CONFIGS: dict[str, dict[str, Any]] = {
    "ringing": {"num_layers": 2, "width": 24, "num_atoms": 10, "glu_width": 20},
    "ringing with pointer": {"width": 16, "num_atoms": 5, "copy_window": 7, "copy_width": 6},
    "ringing with pointer that goes on": {
        "width": 16, "num_atoms": 5, "copy_window": 20, "copy_width": 6, "copy_context": 2,
    },
    "ringing, one tap": {"width": 17, "num_atoms": 3, "conv_width": 1, "activation": "gelu"},
    "ringing, bare": {"width": 16, "num_atoms": 4, "residual": False, "activation": "identity"},
    "clock": {
        "layer": "clock", "width": 16, "num_atoms": 6, "window": 11, "residual": False, "activation": "tanh",
    },
    "clock with pointer": {
        "layer": "clock", "num_layers": 2, "width": 12, "num_atoms": 6, "window": 37, "glu_width": 8,
        "copy_window": 20, "copy_width": 4, "activation": "softmax",
    },
}  # fmt: skip


@functools.cache
def model(name: str = "ringing", seed: int = 0) -> SDGM:
    """A model whose every weight matters: biases, gains and taps that begin as constants are random too."""
    torch.manual_seed(seed)
    made = SDGM(ModelConfig(vocab_size=VOCAB, **CONFIGS[name]))
    with torch.no_grad():
        for path, parameter in made.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif path.endswith("conv.weight"):
                parameter.add_(torch.randn_like(parameter) * 0.5)
            else:
                parameter.mul_(2)
    return made.eval()


def rows_are_alone(precision: str) -> bool:
    """Whether this processor's kernels must give one row what they give it among several, as drafts need.

    Without AVX-512 VNNI, ONNX Runtime sums a single row in 4 bits in another order, in blocks of any size:
    `Generator` then refuses to draft.
    """
    info = Path("/proc/cpuinfo")
    return not precision.startswith(("q4", "rows4")) or (info.exists() and " avx512_vnni" in info.read_text())


def needs_rows_alone(precision: str) -> None:
    """Skip the test where they need not."""
    if not rows_are_alone(precision):
        pytest.skip("without AVX-512 VNNI one row in 4 bits is not summed as several are")


def run(name: str = "ringing", *, prior: bool = True) -> Run:
    """A run of that model; its text is the tiny tokenizer's."""
    made = model(name)
    size = made.config.mixing_size
    mixture = {
        "weights": np.full(2, 0.5, np.float32),
        "means": np.zeros((2, size), np.float32),
        "variances": np.ones((2, size), np.float32),
    }
    return Run(
        Path("runs/tale"), made.config, made, tokenizer_path(), mixture if prior else None, tiny.TEXT * 3
    )


@functools.cache
def tokenizer_path() -> Path:
    """A file of the tiny tokenizer, which is gone when this process ends."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    path = Path(folder.name) / "tokenizer.json"
    path.write_bytes(tiny.tokenizer_json())
    return path


def operators(graph: onnx.GraphProto) -> Iterator[str]:
    """The kinds of the nodes of a graph, those inside of branches and loops included."""
    for node in graph.node:
        yield node.op_type
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from operators(attribute.g)
