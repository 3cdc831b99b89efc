"""The whole decoding loop as one graph, for hosts other than Python: prompt in, tokens out.

    ids (1, T), state (1, S), count (), temperature (), top_k (), seed (), end (E)
        → tokens (n,), next_state (1, S)

A `Loop` runs a variant's graph, chooses a token and feeds it, until there are `count` tokens or one is among
`end`. The state that comes out is the one before the last token, which the next call begins with; so a prompt
longer than a chunk is read by calls with a count of 1, whose tokens nobody needs.

The token is argmax (s + temperature · gumbel) over the `top_k` largest logits s (0 takes all), which draws
from softmax (s / temperature), and at temperature 0 takes the likeliest. The noise is made of integers that
are hashed from seed, step and rank: ONNX's own random numbers have no seed that could be given.

No input has a default: the bindings of other languages do not let one be overridden.

The weights stay where they are, in the variant's file: tensors of this one name its bytes. Neither file may
be used with another version of the other; the manifest has the hashes of both.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from sdgm_edge.runtime import BundleConfig, ParityError, open_graph

from .builder import IR_VERSION, Array, Builder, floats, ints

LOOP = "generate.onnx"
LARGE = 1024
"""Bytes from which on a tensor is left where it is."""
WORD = np.int64(2**32 - 1)
FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL


def loop_graph(graph: bytes, file: str) -> bytes:
    """Return a graph that generates with the one given, whose weights lie in `file` beside it."""
    step = ir.from_proto(onnx.load_from_string(graph)).graph
    vocab_size, state_size = _width(step.outputs[0]), _width(step.outputs[1])
    _leave_weights(step, graph, file)
    g = Builder()
    g.reserve([*step.initializers, *(value.name or "" for node in step for value in node.outputs)])
    ids = g.input("ids", INT64, (1, "time"))
    state = g.input("state", FLOAT, (1, state_size))
    count = g.input("count", INT64, ())
    temperature = g.input("temperature", FLOAT, ())
    top_k, seed = g.input("top_k", INT64, ()), g.input("seed", INT64, ())
    end = g.input("end", INT64, ("ends",))
    with g.at("generate"):
        words = np.int64(vocab_size)
        some = g.op("Where", g.op("Greater", top_k, np.int64(0)), g.op("Min", top_k, words), words)
        ranks = _hashed(g, g.op("Range", np.int64(0), some, np.int64(1)))
        begin = _hashed(g, g.op("BitwiseAnd", seed, WORD))
        body = _body(g.branch(), step, temperature, g.op("Reshape", some, ints(1)), ranks, begin, end)
        _, next_state, tokens = g.ops(3, "Loop", count, np.bool_(True), ids, state, body=body)
    g.output("tokens", tokens, INT64, ("tokens",))
    g.output("next_state", next_state, FLOAT, (1, state_size))
    made = ir.Model(g.graph("generate"), ir_version=IR_VERSION, producer_name="sdgm-edge")
    data: bytes = ir.to_proto(made).SerializeToString(deterministic=True)
    return data


def _width(value: ir.Value) -> int:
    """Return the last dimension, which is a number."""
    width = None if value.shape is None else value.shape[-1]
    assert isinstance(width, int)
    return width


def _body(
    g: Builder,
    step: ir.Graph,
    temperature: ir.Value,
    some: ir.Value,
    ranks: ir.Value,
    begin: ir.Value,
    end: ir.Value,
) -> ir.Graph:
    """Return the body of the loop: one call of the graph `step`, which it takes apart, and one choice."""
    ids, state, start, *_ = step.inputs
    logits, next_state, _ = step.outputs
    number, alive = g.input("number", INT64, ()), g.input("alive", BOOL, ())
    with g.at("last"):
        length = g.op("Squeeze", g.op("Shape", ids, start=1, end=2), ints(0))
        last = g.op("Sub", length, np.int64(1))
    step.initializers.pop(start.name or "")
    start.replace_all_uses_with(last)
    initializers, nodes = list(step.initializers.values()), list(step)
    step.remove(nodes)
    for values in (step.initializers, step.inputs, step.outputs):
        values.clear()
    g.take(nodes, initializers)
    for i, value in enumerate((ids, state), 1):
        value.name = f"{value.name}:{i}"
        g.inputs.append(value)
    with g.at("choose"):
        likeliest, places = g.ops(2, "TopK", g.op("Reshape", logits, ints(-1)), some)
        now = g.op("Add", begin, g.op("Mul", number, np.int64(0x9E3779B)))
        noise = _hashed(g, g.op("BitwiseXor", _hashed(g, g.op("BitwiseAnd", now, WORD)), ranks))
        noise = g.op("Cast", g.op("Div", noise, np.int64(2**9)), to=FLOAT)  # 23 bits: below 1 in float32
        uniform = g.op("Mul", g.op("Add", noise, floats(0.5)), floats(2.0**-23))
        gumbel = g.op("Neg", g.op("Log", g.op("Neg", g.op("Log", uniform))))
        scores = g.op("Add", likeliest, g.op("Mul", gumbel, temperature))
        token = g.op("Gather", places, g.op("ArgMax", scores, axis=0, keepdims=0), axis=0)
    with g.at("end"):
        hits = g.op("ReduceSum", g.op("Cast", g.op("Equal", end, token), to=INT64), keepdims=0)
        going = g.op("And", alive, g.op("Equal", hits, np.int64(0)))
    following = g.op("Reshape", token, ints(1, 1))
    for value, dtype, shape in (
        (going, BOOL, ()),
        (following, INT64, (1, "time")),
        (next_state, FLOAT, (1, _width(next_state))),
        (token, INT64, ()),
    ):
        g.output(value.name or "", value, dtype, shape)
    return g.graph("token")


def _hashed(g: Builder, x: ir.Value) -> ir.Value:
    """Mix the lower 32 bits of whole numbers: no product here passes 2⁵⁹."""
    for _ in range(2):
        x = g.op("BitwiseXor", x, g.op("Div", x, np.int64(2**16)))
        x = g.op("BitwiseAnd", g.op("Mul", x, np.int64(0x45D9F3B)), WORD)
    return g.op("BitwiseXor", x, g.op("Div", x, np.int64(2**16)))


def _leave_weights(step: ir.Graph, graph: bytes, file: str) -> None:
    """Let large tensors name their bytes in the file of the graph; equal ones may name the same."""
    for name, value in step.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= LARGE:
            offset = graph.index(tensor.tobytes())
            shape = ir.Shape(tensor.shape.numpy())
            value.const_value = ir.ExternalTensor(
                file, offset, tensor.nbytes, tensor.dtype, shape=shape, name=name
            )


class Looped:
    """The graph in a session, as a host uses it."""

    def __init__(self, path: Path, config: BundleConfig) -> None:
        self._session = open_graph(path, path, providers="cpu").session
        self._config = config

    def generate(
        self,
        ids: Sequence[int],
        count: int,
        state_S: Array | None = None,
        *,
        temperature: float = 0,
        top_k: int = 0,
        seed: int = 0,
        end: Sequence[int] = (),
    ) -> tuple[list[int], Array]:
        """Return the tokens that follow, and the state before the last of them."""
        size, chunk = self._config.state_size, self._config.chunk
        state = np.zeros((1, size), np.float32) if state_S is None else state_S.reshape(1, -1)
        options = {"top_k": top_k, "seed": seed, "end": end}
        fixed: dict[str, Array] = {name: np.array(value, np.int64) for name, value in options.items()}
        fixed["temperature"] = np.array(temperature, np.float32)

        def run(ids: Sequence[int], count: int) -> list[Array]:
            feeds = {"ids": np.array([ids], np.int64), "state": state, "count": np.array(count, np.int64)}
            return self._session.run(["tokens", "next_state"], feeds | fixed)  # type: ignore[no-any-return]

        for at in range(0, len(ids), chunk):
            tokens, state = run(ids[at : at + chunk], count if at + chunk >= len(ids) else 1)
        return tokens.tolist(), state[0]


def checked_loop(
    graph: bytes, file: str, config: BundleConfig, ids: Sequence[int], expected: Sequence[int]
) -> bytes:
    """Return the loop of a graph, which takes greedily the tokens expected after `ids`.

    Raises:
        ParityError: it takes others.
    """
    loop = loop_graph(graph, file)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / file).write_bytes(graph)
        (Path(folder) / LOOP).write_bytes(loop)
        tokens, _ = Looped(Path(folder) / LOOP, config).generate(ids, len(expected))
    if tokens != list(expected):
        raise ParityError(
            f"{LOOP}: the loop does not take the tokens that {file} gives: expected {list(expected)}, got "
            f"{tokens}; leave --loop out, and report it"
        )
    return loop
