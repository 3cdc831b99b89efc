"""A tiny bundle made by hand that obeys the graph contract: what the runtime's tests run on.

    h_t = tanh(decay · h_{t−1} + E[ids_t])       c_t = h_t       c ← (1 − η) · c + η · z
    logits_t = c_t · W                            next_state = [h_T | number of tokens so far]

with V = 300 tokens of a byte-level tokenizer trained here, M = 8, S = 9.
"""

import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from sdgm_edge.runtime import encode_arrays, encode_json, write_bundle

VOCAB, MIXING, STATE, CHUNK = 300, 8, 9, 16
TEXT = (
    "Once upon a time there was a small river that rang like a bell. The bell rang once, and the river "
    "answered it; the river rang twice, and the bell was still. Über café, naïve: 你好 – 🙂 once more.\n"
)


@functools.cache
def tokenizer_json() -> bytes:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[AddedToken("<|endoftext|>", special=True, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 8, trainer)
    assert tokenizer.get_vocab_size() == VOCAB
    return tokenizer.to_str().encode()


def graph(seed: int = 0, vocab: int = VOCAB, state: int = STATE, gain: float = 1.0) -> onnx.ModelProto:
    """The graph of the module's equations; `state` and `vocab` other than the config's make a wrong one."""
    rng = np.random.default_rng(seed)
    weights = {
        "embedding": rng.normal(size=(vocab, MIXING)),
        "decay": rng.uniform(0.5, 0.99, MIXING),
        "head": gain * rng.normal(size=(MIXING, vocab)),
        "one": np.array(1.0),
        "blend": np.array(0.0),
        "drawn": np.zeros((1, 1, MIXING)),
    }
    numbers = {
        "start": np.array(0), "axis": np.array([1]), "zero": np.array([0]), "end": np.array([2**62]),
        "size": np.array([MIXING]), "whole": np.array([state]),
    }  # fmt: skip

    def value(name: str, kind: int, shape: list[str | int] | None) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    f32, i64 = TensorProto.FLOAT, TensorProto.INT64
    body = helper.make_graph(
        [
            helper.make_node("Mul", ["h", "decay"], ["kept"]),
            helper.make_node("Add", ["kept", "x"], ["sum"]),
            helper.make_node("Tanh", ["sum"], ["h_next"]),
            helper.make_node("Identity", ["h_next"], ["c"]),
        ],
        "recurrence",
        [value("h", f32, ["batch", MIXING]), value("x", f32, ["batch", MIXING])],
        [value("h_next", f32, ["batch", MIXING]), value("c", f32, ["batch", MIXING])],
    )
    nodes = [
        helper.make_node("Gather", ["embedding", "ids"], ["x"]),
        helper.make_node("Slice", ["state", "zero", "size", "axis"], ["h"]),
        helper.make_node("Slice", ["state", "size", "whole", "axis"], ["count"]),
        helper.make_node(
            "Scan", ["h", "x"], ["h_last", "mixing"], body=body, num_scan_inputs=1, scan_input_axes=[1],
            scan_output_axes=[1],
        ),
        helper.make_node("Sub", ["one", "blend"], ["rest"]),
        helper.make_node("Mul", ["rest", "mixing"], ["own"]),
        helper.make_node("Mul", ["blend", "drawn"], ["given"]),
        helper.make_node("Add", ["own", "given"], ["blended"]),
        helper.make_node("Reshape", ["start", "axis"], ["from"]),
        helper.make_node("Slice", ["blended", "from", "end", "axis"], ["asked"]),
        helper.make_node("MatMul", ["asked", "head"], ["logits"]),
        helper.make_node("Shape", ["ids"], ["time"], start=1, end=2),
        helper.make_node("Cast", ["time"], ["added"], to=f32),
        helper.make_node("Add", ["count", "added"], ["counted"]),
        helper.make_node("Concat", ["h_last", "counted"], ["next_state"], axis=1),
    ]  # fmt: skip
    made = helper.make_graph(
        nodes,
        "tiny",
        [
            value("ids", i64, ["batch", "time"]), value("state", f32, ["batch", state]),
            value("start", i64, []), value("blend", f32, []), value("drawn", f32, ["draws", 1, MIXING]),
        ],
        [
            value("logits", f32, ["batch", "asked", vocab]), value("next_state", f32, ["batch", state]),
            value("mixing", f32, ["batch", "time", MIXING]),
        ],
        [numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items()]
        + [numpy_helper.from_array(w.astype(np.int64), n) for n, w in numbers.items()],
    )  # fmt: skip
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def mixture(seed: int = 0, components: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "weights": np.full(components, 1 / components, np.float32),
        "means": rng.normal(size=(components, MIXING)).astype(np.float32),
        "variances": rng.uniform(0.1, 1, (components, MIXING)).astype(np.float32),
    }


def files(**changes: bytes) -> dict[str, bytes]:
    """All files but the manifest; a change names a file by its stem."""
    made = {
        "config": encode_json(
            {
                "vocab_size": VOCAB,
                "state_size": STATE,
                "mixing_size": MIXING,
                "chunk": CHUNK,
                "model": {"a": 1},
            }
        ),
        "tokenizer": tokenizer_json(),
        "generation_config": encode_json({"begin_token": 0, "end_tokens": [0], "sampling": {"top_p": 0.95}}),
        "gmm": encode_arrays(mixture()),
        "README": b"# tiny\n",
        "model": graph().SerializeToString(deterministic=True),
        "model_int8": graph(seed=1).SerializeToString(deterministic=True),
    } | changes
    suffix = {"gmm": ".npz", "README": ".md", "model": ".onnx", "model_int8": ".onnx"}
    return {stem + suffix.get(stem, ".json"): data for stem, data in made.items() if data}


def fields(**changes: Any) -> dict[str, Any]:
    """The arguments of `write_bundle` beside the files."""
    prompt = "Once upon"
    ids = Tokenizer.from_buffer(tokenizer_json()).encode(prompt).ids
    rows = {name: reference(ids, seed) for name, seed in (("fp32", 0), ("int8", 1))}
    return {
        "name": "tiny",
        "default": "fp32",
        "variants": {
            "fp32": {"file": "model.onnx", "parity": {"max": 0.0}, "accuracy": None},
            "int8": {"file": "model_int8.onnx", "parity": None, "accuracy": {"loss": 0.1}},
        },
        "model_id": hashlib.sha256(b"tiny").hexdigest(),
        "golden": {
            "prompt": prompt,
            "ids": ids,
            "variants": {
                name: {"tokens": tokens, "logits": [row[:5].tolist() for row in logits]}
                for name, (tokens, logits) in rows.items()
            },
        },
        "made_with": {"onnx": onnx.__version__},
    } | changes


def reference(ids: list[int], seed: int = 0, count: int = 4) -> tuple[list[int], list[np.ndarray]]:
    """Greedy tokens after the begin token and `ids`, and the logits of each, in numpy alone."""
    weights = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in graph(seed).graph.initializer}
    h = np.zeros(MIXING)
    tokens: list[int] = []
    rows: list[np.ndarray] = []
    for token in [0, *ids]:
        h = np.tanh(weights["decay"] * h + weights["embedding"][token])
    for _ in range(count):
        rows.append(h @ weights["head"])
        tokens.append(int(rows[-1].argmax()))
        h = np.tanh(weights["decay"] * h + weights["embedding"][tokens[-1]])
    return tokens, rows


def write(target: Path, changes: dict[str, bytes] | None = None, **field_changes: Any) -> Path:
    """Write the tiny bundle to `target`."""
    return write_bundle(target, files(**(changes or {})), **fields(**field_changes))
