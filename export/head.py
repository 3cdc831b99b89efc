"""The head as a graph: logits of the vocabulary, and the pointer that copies recent tokens.

The copy changes the logits of at most M + T words, so only those are computed anew. With a_tj the attention
on place j, every place takes the share of its word, Σ_i a_ti [w_i = w_j], one product with the matrix of
equal words, and log p = logaddexp(log g + log p_vocabulary, log (1 − g) + log share) takes the place of the
word's entry. Two places of one word write the same number.

Shapes: B batch, T time, U positions whose logits are asked for, D width, P key width, M window, J = M + T.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from .builder import floats, ints
from .layers import TO_THE_END, Trace, asked
from .matrices import Matrix
from .screening import Screen, screened_scores


def logits(t: Trace, embedding: Matrix, hidden: ir.Value, screen: Screen | None = None) -> ir.Value:
    """Return logits (B, U, V) from the last hidden vectors: (B, T, D) with a pointer, (B, U, D) without.

    A head that points is read whole: its mixture is of probabilities, which need the exact sum.
    """
    g = t.g
    if not t.config.copy_window:
        if screen is not None:
            return screened_scores(t, embedding, hidden, screen)
        return embedding.product(hidden, t.weights["bias"])
    hidden_U = asked(t, hidden)
    with g.at("pointer"):
        attention, words = _attend(t, hidden, hidden_U)
        with g.at("context"):
            context = g.op("MatMul", attention, embedding.rows(words))
            both = g.op("Concat", hidden_U, context, axis=-1)
        with g.at("gate"):
            gate = g.op("MatMul", both, t.weights["pointer.gate.weight"].T)
            gate = g.op("Add", gate, t.weight("pointer.gate.bias"))
            log_copy = g.op("Neg", g.op("Softplus", gate))  # log (1 − sigmoid)
            log_say = g.op("Add", gate, log_copy)
        with g.at("merge"):
            merged = t.matrix("pointer.merge.weight").product(both)
    said = g.op("LogSoftmax", embedding.product(merged, t.weights["bias"]), axis=-1)
    with g.at("pointer", "mixture"):
        said = g.op("Add", said, log_say)
        same = g.op("Equal", g.op("Unsqueeze", words, ints(1)), g.op("Unsqueeze", words, ints(2)))
        share = g.op("MatMul", attention, g.op("Cast", same, to=ir.DataType.FLOAT))
        copied = g.op("Add", g.op("Log", share), log_copy)  # −∞ where nothing is copied
        places = g.op("Expand", g.op("Unsqueeze", words, ints(1)), g.op("Shape", attention))
        spoken = g.op("GatherElements", said, places, axis=2)
        mixed = g.op("Add", spoken, g.op("Softplus", g.op("Sub", copied, spoken)))
        return g.op("ScatterElements", said, places, mixed, axis=2)


def _attend(t: Trace, hidden: ir.Value, hidden_U: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return attention (B, U, J) over the last M tokens and the words in its places (B, J)."""
    g, M = t.g, t.config.copy_window
    with g.at("key"):
        new = t.matrix("pointer.key.weight").product(hidden)
        keys = g.op("Concat", t.state["copy.keys"], t.state["copy.last_key"], new, axis=1)  # M + 1 + T
        t.state["copy.last_key"] = g.op("Slice", keys, ints(-1), ints(TO_THE_END), ints(1))
        t.state["copy.keys"] = g.op("Slice", keys, ints(-1 - M), ints(-1), ints(1))
        keys = g.op("Slice", keys, ints(0), ints(-1), ints(1))
    with g.at("ids"):
        now = g.op("Add", g.op("Cast", t.ids, to=ir.DataType.FLOAT), floats(1))
        marks = g.op("Concat", t.state["copy.ids"], now, axis=1)  # token + 1, 0 in an empty place
        t.state["copy.ids"] = g.op("Slice", marks, ints(-M), ints(TO_THE_END), ints(1))
        words = g.op("Cast", g.op("Max", g.op("Sub", marks, floats(1)), floats(0)), to=ir.DataType.INT64)
    with g.at("query"):
        query = t.matrix("pointer.query.weight").product(hidden_U)
        scores = g.op("MatMul", query, g.op("Transpose", keys, perm=(0, 2, 1)))
        scores = g.op("Mul", scores, floats(1 / math.sqrt(t.config.copy_width)))
    with g.at("seen"):
        end = g.op("Add", t.num_steps, ints(M))
        one = np.int64(1)
        scalars = (g.op("Squeeze", value, ints(0)) for value in (t.start, t.num_steps, end))
        first, num_steps, num_places = scalars
        query_at = g.op("Unsqueeze", g.op("Range", first, num_steps, one), ints(1))
        place = g.op("Range", np.int64(0), num_places, one)
        behind = g.op("Sub", g.op("Add", query_at, np.int64(M)), place)  # (U, J), 0 for the token's own place
        near = g.op("And", g.op("GreaterOrEqual", behind, np.int64(0)), g.op("Less", behind, np.int64(M)))
        filled = g.op("Unsqueeze", g.op("Greater", marks, floats(0)), ints(1))
        scores = g.op("Where", g.op("And", near, filled), scores, floats(-np.inf))
    return g.op("Softmax", scores, axis=-1), words
