"""The head as a graph: logits of the vocabulary, and the pointer that copies recent tokens.

Every position attends to a window of its own, the last M tokens, taken out of what is remembered and what
came in this call. So each is computed as a single token would be, and several at once give, bit for bit, what
they give one by one (`matrices.py` tells with which products). For the same end windows are filled up to
whole vectors of 16 places, and the gate is a softmax of two: ONNX Runtime takes logarithms of many numbers
side by side as vectors, and those that are left over otherwise.

The copy changes the logits of at most M words, so only those are computed anew: the attention on the places
of a word is summed up at its entry, and log p = logaddexp(log g + log p_vocabulary, log (1 − g) + log share)
is written there, by every place of the word the same number. A place that is still empty has no weight, and
the word −1, which is the last of the vocabulary.

Shapes: B batch, T time, U positions whose logits are asked for, D width, P key width, M window, W window in
whole vectors.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from .builder import CONTRIB, floats, ints
from .layers import TO_THE_END, Trace, asked
from .matrices import Matrix
from .screening import Screen, screened_scores

VECTOR = 16
"""Numbers of the largest vector of a processor."""
UNSEEN = np.float32(1e30)
"""What is taken off the score of a place that is empty or no part of a window: it then weighs nothing."""


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
        attention, words, context = _attend(t, embedding, hidden, hidden_U)
        both = g.op("Concat", hidden_U, context, axis=-1)
        with g.at("gate"):
            weight = np.pad(t.weights["pointer.gate.weight"], ((0, 1), (0, 0)))  # the other one is 0
            gate = g.op("Add", g.op("MatMul", both, weight.T), np.pad(t.weights["pointer.gate.bias"], (0, 1)))
            log_say, log_copy = g.ops(2, "Split", g.op("LogSoftmax", gate, axis=-1), axis=-1, num_outputs=2)
        with g.at("merge"):
            merged = t.matrix("pointer.merge.weight").product(both)
    said = g.op("LogSoftmax", embedding.product(merged, t.weights["bias"]), axis=-1)
    with g.at("pointer", "mixture"):
        said = g.op("Add", said, log_say)
        nothing = g.op("ConstantOfShape", g.op("Shape", said))
        share = g.op("ScatterElements", nothing, words, attention, axis=2, reduction="add")
        share = g.op("GatherElements", share, words, axis=2)
        copied = g.op("Add", g.op("Log", share), log_copy)  # −∞ where nothing is copied
        spoken = g.op("GatherElements", said, words, axis=2)
        mixed = g.op("Add", spoken, g.op("Softplus", g.op("Sub", copied, spoken)))
        return g.op("ScatterElements", said, words, mixed, axis=2)


def _attend(
    t: Trace, embedding: Matrix, hidden: ir.Value, hidden_U: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Return attention on the places of each window and their words, (B, U, W), and the context (B, U, D)."""
    g, M, P = t.g, t.config.copy_window, t.config.copy_width
    with g.at("window"):  # the table is folded when the graph is loaded
        fill = -M % VECTOR
        table = g.op("Add", np.arange(1, t.chunk + 1)[:, None], np.maximum(np.arange(-fill, M), 0))
        places_UW = g.op("Slice", table, t.start, t.num_steps)
    with g.at("key"):
        new = t.matrix("pointer.key.weight").product(hidden)
        keys = g.op("Concat", t.state["copy.keys"], t.state["copy.last_key"], new, axis=1)  # M + 1 + T
        t.state["copy.last_key"] = g.op("Slice", new, ints(-1), ints(TO_THE_END), ints(1))
        t.state["copy.keys"] = g.op("Slice", keys, ints(-1 - M), ints(-1), ints(1))
    with g.at("ids"):
        now = g.op("Add", g.op("Cast", t.ids, to=ir.DataType.FLOAT), floats(1))
        marks = g.op("Concat", t.state["copy.ids"], now, axis=1)  # token + 1, 0 in an empty place
        t.state["copy.ids"] = g.op("Slice", marks, ints(-M), ints(TO_THE_END), ints(1))
        tokens = g.op("Sub", marks, floats(1))
        words = g.op("Cast", tokens, to=ir.DataType.INT64)
        words_UW = g.op("Gather", words, places_UW, axis=1)
    with g.at("query"):
        scaled = t.weights["pointer.query.weight"] / np.float32(math.sqrt(P))
        query = g.op("Unsqueeze", t.matrix("pointer.query.weight", scaled).product(hidden_U), ints(2))
        keys_UW = g.op("Gather", keys, places_UW, axis=1)
        scores = g.op("FusedMatMul", query, keys_UW, domain=CONTRIB, transB=1)
        empty = g.op("Mul", g.op("Min", tokens, floats(0)), UNSEEN)
        scores = g.op("Add", g.op("Squeeze", scores, ints(2)), g.op("Gather", empty, places_UW, axis=1))
        if fill:
            scores = g.op("Add", scores, np.where(np.arange(-fill, M) < 0, -UNSEEN, np.float32(0)))
        if t.config.copy_context:
            scores = g.op("Add", scores, _agreement(t, marks, fill))
        attention = g.op("Softmax", scores, axis=-1)
    with g.at("context"):
        return attention, words_UW, embedding.mean_of_rows(attention, words, words_UW, places_UW)


def _agreement(t: Trace, marks: ir.Value, fill: int) -> ir.Value:
    """Return what places gain before which the last tokens stand, (B, U, W)."""
    g, M, N = t.g, t.config.copy_window, t.config.copy_context
    with g.at("agreement"):
        back, place = np.arange(N)[:, None], np.arange(-fill, M)
        remembered = place >= back  # the past of the oldest places is forgotten, and gains nothing
        before, last = np.where(remembered, place - back, 0), np.maximum(M - back, 0)
        read = np.hstack([before, last]).astype(np.int32)
        table = g.op("Add", np.arange(t.chunk, dtype=np.int32)[:, None, None], read)
        tokens = g.op("Gather", marks, g.op("Slice", table, t.start, t.num_steps), axis=1)
        agrees = g.op("Equal", *g.ops(2, "Split", tokens, ints(fill + M, 1), axis=-1))
        agrees_N = g.ops(N, "Split", agrees, axis=2, num_outputs=N)
        worth_NW = np.cumsum(t.weights["pointer.agreement"][:, None] * remembered, axis=0, dtype=np.float32)
        gain, less = g.constant(worth_NW[-1]), [np.zeros(1, np.float32), *worth_NW[:-1]]
        for n in reversed(range(N)):
            gain = g.op("Where", agrees_N[n], gain, less[n])
        return g.op("Squeeze", gain, ints(2))
