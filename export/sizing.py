"""What the export of a model will weigh, before the model is trained: its own graph, of weights that are not.

Every matrix stands in as one random row repeated, which takes no memory, is quantized once, and goes through
the code that lays out trained ones. Written to a file, such a graph runs as fast as a trained one. (Zeros
would not do: products with them were measured to be quicker.)
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import torch

from sdgm_edge.models import SDGM, ModelConfig
from sdgm_edge.runtime import encode_arrays, encode_json, write_bundle
from sdgm_edge.tokenization import BEGIN_ID, train_bpe

from .builder import Array
from .graph import build_graph, matrix_names
from .screening import EXACT_WORDS, PREVIEW, Screen, is_large, rank_of
from .variants import CHUNK, Variant, build, bundle_config

NUM_COMPONENTS = 16
"""Of the mixture in a bundle, which is small."""
SYLLABLES = [start + end for start in ("br", *"dfgklmnprstvw", "st") for end in "aeiou"]


class _Unwritten(ir.Tensor):  # type: ignore[type-arg]
    """A tensor that is serialized without its numbers."""

    def tobytes(self) -> bytes:
        return b""


def num_parameters(config: ModelConfig) -> int:
    """Return how many numbers a model learns."""
    return _blank(config).num_parameters


def untrained_weights(config: ModelConfig) -> dict[str, Array]:
    """Return weights of a model's names and shapes."""
    state = _blank(config).state_dict()
    blank = {name: np.broadcast_to(np.float32(0), tuple(value.shape)) for name, value in state.items()}
    rng, repeated = np.random.default_rng(0), matrix_names(blank)

    def drawn(name: str, shape: tuple[int, ...]) -> Array:
        numbers = rng.standard_normal(shape[-1:] if name in repeated else shape, np.float32)
        return np.broadcast_to(numbers / np.float32(np.sqrt(shape[-1])), shape)

    return {name: drawn(name, array.shape) for name, array in blank.items()}


def untrained_screen(config: ModelConfig, variant: Variant, weights: Mapping[str, Array]) -> Screen | None:
    """Return the screen of a head that is large enough to have one."""
    if not is_large(config, variant.bits):
        return None
    rank, exact = rank_of(config.width), EXACT_WORDS[variant.embedding]
    row = weights["embedding.weight"][0, :rank]
    up = np.broadcast_to(row, (config.vocab_size, rank))
    down = np.broadcast_to(weights["embedding.weight"][0], (rank, config.width))
    return Screen(down, up, weights["bias"], min(exact, config.vocab_size // 4), PREVIEW[variant.embedding])


def untrained_graph(config: ModelConfig, variant: Variant) -> bytes:
    """Return the bytes of a model's graph before it is trained."""
    weights = untrained_weights(config)
    return build(config, weights, variant.plan(weights), untrained_screen(config, variant, weights))


class GraphSize(NamedTuple):
    """How large a graph is."""

    total: int
    """Its bytes."""
    read: int
    """What of them is read for each token: all but an embedding that a screen spares."""


@cache
def graph_size(config: ModelConfig, variant: Variant) -> GraphSize:
    """Return how many bytes the graph of a model takes, without making them.

    What is left unwritten of the tensors is added, and the lengths that stand before it, before its tensor
    and before the graph.
    """
    weights = untrained_weights(config)
    screen = untrained_screen(config, variant, weights)
    model = build_graph(config, weights, variant.plan(weights), CHUNK[config.layer], screen)
    unwritten = {}
    for name, value in model.graph.initializers.items():
        if (tensor := value.const_value) is not None:
            unwritten[name] = tensor.nbytes
            value.const_value = _Unwritten(
                tensor.numpy(), name=name, metadata_props=dict(tensor.metadata_props)
            )
    spared = sum(size for name, size in unwritten.items() if screen and name.startswith("embedding."))
    proto = ir.to_proto(model)
    missing = 0
    for tensor in proto.graph.initializer:
        count, written = unwritten[tensor.name], tensor.ByteSize()
        whole = written + count + _length(count) - 1
        missing += whole - written + _length(whole) - _length(written)
    graph: int = proto.graph.ByteSize()
    total: int = proto.ByteSize() + missing + _length(graph + missing) - _length(graph)
    return GraphSize(total, total - spared)


@cache
def stand_in_tokenizer(vocab_size: int) -> bytes:
    """Return a tokenizer.json of so many tokens, about as large as one that is learnt from a text.

    Raises:
        ConfigError: there is no tokenizer of that size.
    """
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 5, 2 * vocab_size)
    words = ["".join(SYLLABLES[i] for i in rng.integers(len(SYLLABLES), size=n)) for n in lengths]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        train_bpe([" ".join(words)] * 2, vocab_size).save(path)
        return path.read_bytes()


def small_files(config: ModelConfig, tokenizer_json: bytes) -> dict[str, bytes]:
    """Return the files that all variants of a bundle share, but for its card."""
    shape = NUM_COMPONENTS, config.mixing_size
    mixture = {
        "weights": np.full(NUM_COMPONENTS, 1 / NUM_COMPONENTS, np.float32),
        "means": np.zeros(shape, np.float32),
        "variances": np.ones(shape, np.float32),
    }
    generation = {"begin_token": BEGIN_ID, "end_tokens": [BEGIN_ID], "sampling": {}}
    return {
        "config.json": encode_json(bundle_config(config)._asdict()),
        "tokenizer.json": tokenizer_json,
        "generation_config.json": encode_json(generation),
        "gmm.npz": encode_arrays(mixture),
    }


def untrained_bundle(target: Path, config: ModelConfig, variant: Variant, tokenizer_json: bytes) -> Path:
    """Write a bundle of one variant as it would be exported, but for its card and its golden tokens."""
    return write_bundle(
        target,
        small_files(config, tokenizer_json) | {variant.file: untrained_graph(config, variant)},
        name=target.stem,
        default=variant.name,
        variants={variant.name: {"file": variant.file, "parity": None, "accuracy": None}},
        model_id="0" * 64,
        golden={"prompt": "", "ids": [], "variants": {}},
        made_with={},
        num_parameters=num_parameters(config),
    )


@lru_cache(maxsize=4)
def _blank(config: ModelConfig) -> SDGM:
    """Return a model without memory for its weights."""
    with torch.device("meta"):
        return SDGM(config)


def _length(size: int) -> int:
    """Return how many bytes protobuf takes to say a size: 7 bits in each."""
    return max(1, -(-size.bit_length() // 7))
