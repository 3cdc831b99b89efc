"""Products with constant matrices, in the precisions that a variant may give them.

| precision | kernel                                    | weights                        | activations      |
|-----------|-------------------------------------------|--------------------------------|------------------|
| fp32      | MatMul                                    | float32                        | float32          |
| fp16      | MatMul                                    | float16                        | float16          |
| int8      | DynamicQuantizeMatMul                     | int8, a scale for each column  | uint8, a tensor  |
| rows8     | MatMulIntegerToFloat                      | int8, a scale for each column  | uint8, a row     |
| q8, q4    | MatMulNBits, accuracy level 4             | 8 or 4 bits, a scale per block | int8, a block    |
| rows4     | the same                                  | 4 bits, blocks of 32 at most   | int8, a block    |

`int8` is the quickest where many tokens come at once, and close to the quickest for one. `q8` is the
quickest for one, twice as slow for many, and holds its rows together, which an embedding needs; `q4` reads
half as much. Levels 0 to 3 of MatMulNBits compute in float and lose everything that was gained.

In fp32 and rows8, and in rows4 where there is AVX-512 VNNI, rows do not see each other: what a token gives
does not depend, bit for bit, on how many others are computed at once, and so a draft can be checked exactly.
`int8` has one scale for all rows; q8 and q4 compute one row and several in different orders. `rows8` is as
quick as `int8` for many and loses less. It takes six nodes instead of one, which a single token of a small
model feels; where all rows are about equally loud, the step of their rounding may be the same for all
(`reach.py`), and two nodes do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import onnx_ir as ir

from .builder import CONTRIB, Array, Builder, Input, ints, mark_atoms

Precision: TypeAlias = Literal["fp32", "fp16", "int8", "rows8", "q8", "q4", "rows4"]
Plan: TypeAlias = Mapping[str, Precision]
"""Precision of every matrix, by its name in the model."""

COLUMNS = ("int8", "rows8")
BITS = {"q8": 8, "q4": 4, "rows4": 4}
BLOCKS = {"q8": (16, 32, 64, 128), "q4": (16, 32, 64, 128), "rows4": (16, 32)}
"""How many weights may share a scale."""
SCALE_COST = 16
"""What a scale adds to the time of its block, in weights (`benchmarks/graph.py` times the whole)."""
SCALE_CANDIDATES = np.linspace(0.7, 1.0, 16, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix (N, K) quantized in blocks along K, as MatMulNBits reads it."""

    packed: Array
    """uint8 (N, blocks, bytes of a block)."""
    scales: Array
    """float32 (N, blocks)."""
    bits: int
    size: int
    """Weights in a block; K is padded with zeros to a multiple of it."""


def quantize_columns(weight_KN: Array) -> tuple[Array, Array]:
    """Return int8 weights and a scale for each column: symmetric, no zero point.

    A processor without VNNI multiplies bytes in pairs along K, and keeps the sum of a pair in 16 bits: it
    stops at 32767, where activations go up to 255. So the codes of a pair sum up to 128 at most, and a scale
    is found by the largest weight or by the largest sum of a pair, whichever is larger.
    """
    pairs_K2N = np.pad(weight_KN, ((0, len(weight_KN) % 2), (0, 0))).reshape(-1, 2, weight_KN.shape[1])
    reach_N = np.maximum(np.abs(weight_KN).max(axis=0), np.abs(pairs_K2N.sum(axis=1)).max(axis=0))
    scale_N = np.maximum(reach_N, np.finfo(np.float32).tiny) / np.float32(127)
    return np.rint(weight_KN / scale_N).astype(np.int8), scale_N


def quantize_blocks(weight_NK: Array, precision: Precision) -> Blocks:
    """Return the matrix in symmetric blocks, each with the scale that loses least of it in the square."""
    bits = BITS[precision]
    num_rows, num_columns = weight_NK.shape
    size = block_size(num_columns, precision)
    blocks = np.pad(weight_NK, ((0, 0), (0, -num_columns % size))).reshape(num_rows, -1, size)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    # The lowest code reaches one step further than the highest: the sign of a scale says which side gets it.
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    full = np.where(extreme == 0, np.float32(1), extreme / low)
    best_error = np.full(full.shape, np.inf, np.float32)
    scales, codes = full, np.zeros_like(blocks)
    for candidate in SCALE_CANDIDATES if bits == 4 else SCALE_CANDIDATES[-1:]:
        scale = full * candidate
        code = np.clip(np.rint(blocks / scale), low, high)
        error = np.square(code * scale - blocks).sum(-1, keepdims=True)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        scales, codes = np.where(better, scale, scales), np.where(better, code, codes)
    packed = (codes - low).astype(np.uint8)
    if bits == 4:
        packed = packed[..., 0::2] | (packed[..., 1::2] << 4)
    return Blocks(packed, scales[..., 0].astype(np.float32), bits, size)


def block_size(num_columns: int, precision: Precision) -> int:
    """Return how many weights share a scale: what takes least time, filled up with zeros as it must be."""
    return min(BLOCKS[precision], key=lambda size: -(-num_columns // size) * (size + SCALE_COST))


def dequantize_blocks(blocks: Blocks, num_columns: int) -> Array:
    """Return the matrix (N, K) that the blocks stand for."""
    codes = blocks.packed
    if blocks.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1)
    values = (codes.astype(np.float32) - 2 ** (blocks.bits - 1)) * blocks.scales[..., None]
    dense: Array = values.reshape(len(codes), -1)[:, :num_columns]
    return dense


def as_held(weight_NK: Array, precision: Precision) -> Array:
    """Return the float32 matrix that the variant's numbers stand for."""
    if precision in COLUMNS:
        codes, scales = quantize_columns(np.ascontiguousarray(weight_NK.T))
        return np.ascontiguousarray((codes * scales).T)
    if precision in BITS:
        return dequantize_blocks(quantize_blocks(weight_NK, precision), weight_NK.shape[1])
    return weight_NK.astype(np.float16).astype(np.float32) if precision == "fp16" else weight_NK


class Matrix:
    """A constant matrix (N, K) of the graph, held once, in one precision: y = x Wᵀ + b, or rows of W."""

    def __init__(
        self,
        g: Builder,
        name: str,
        weight_NK: Array,
        precision: Precision,
        *,
        rows: bool = False,
        reach: float | None = None,
        atoms: tuple[int, int] | None = None,
    ) -> None:
        """Add the matrix; `rows` where its rows are looked up too, so that it must lie row by row.

        `atoms`: the axis of (N, K) along which all atoms lie, and how many times.
        `reach`: of rows8, the largest number that is expected in x; larger ones are cut off. Without it, each
        row of x has a step of its own. A matrix that is one row repeated (`np.broadcast_to`) is held as one,
        and takes no memory here.
        """
        self.g, self.precision = g, precision
        self.num_rows, self.num_columns = weight_NK.shape
        self._by_rows, self._reach, self._atoms = rows, reach, atoms
        if weight_NK.strides[0] == 0:
            weight_NK = weight_NK[:1]
        if precision in BITS:
            self._blocks = quantize_blocks(weight_NK, precision)
            self._weight = self._constant(f"{name}.weight_{precision}", self._blocks.packed)
            self._scales = self._constant(f"{name}.scales", self._blocks.scales)
            if rows:
                self._scales_of_rows = g.op("Unsqueeze", self._scales, ints(2))  # folded on loading
        elif precision in COLUMNS:
            if rows and precision == "int8":
                raise ValueError(
                    f"{name} is looked up by rows: give it precision q8 or rows8 instead of int8"
                )
            codes, scales = quantize_columns(np.ascontiguousarray(weight_NK.T))
            codes, axis = (np.ascontiguousarray(codes.T), 0) if rows else (codes, 1)
            self._weight = self._constant(f"{name}.weight_int8", codes, axis=axis)
            self._scales = self._constant(f"{name}.scales", scales)
        else:
            dtype = np.float16 if precision == "fp16" else np.float32
            weight = weight_NK if rows else np.ascontiguousarray(weight_NK.T)
            self._weight = self._constant(f"{name}.weight", weight.astype(dtype), axis=0 if rows else 1)

    def _constant(self, name: str, array: Array, *, axis: int = 0) -> ir.Value:
        """Add an array that has N, or one number for all of them, along an axis of the first two."""
        shape = (*array.shape[:axis], self.num_rows, *array.shape[axis + 1 :])
        atoms: tuple[int, ...] = ()
        if self._atoms is not None:
            along, times = self._atoms
            place = 1 - axis if along else axis
            if place < array.ndim:
                atoms = place, times, self._blocks.size if along and self.precision in BITS else 1
        return self.g.constant(np.broadcast_to(array, shape), name, atoms=atoms)

    def product(self, x: ir.Value, bias: Array | ir.Value | None = None) -> ir.Value:
        """Return x Wᵀ + b for x (..., K) in float32."""
        g = self.g
        if self.precision in BITS:
            shape = {
                "K": self.num_columns,
                "N": self.num_rows,
                "bits": self._blocks.bits,
                "block_size": self._blocks.size,
            }
            extra: tuple[Input, ...] = () if bias is None else (None, None, bias)
            y = g.op(
                "MatMulNBits",
                x,
                self._weight,
                self._scales,
                *extra,
                domain=CONTRIB,
                accuracy_level=4,
                **shape,
            )
            if self._atoms is not None and (node := y.producer()) is not None:
                mark_atoms(node, ("NK"[self._atoms[0]], self._atoms[1]))
            return y
        if self.precision == "int8":
            extra = () if bias is None else (None, bias)
            return g.op("DynamicQuantizeMatMul", x, self._weight, self._scales, *extra, domain=CONTRIB)
        if self.precision == "rows8":
            return self._product_rows8(x, bias)
        half = self.precision == "fp16"
        y = g.op("Cast", x, to=ir.DataType.FLOAT16) if half else x
        if self._by_rows:
            y = g.op("FusedMatMul", y, self._weight, domain=CONTRIB, transB=1)
        else:
            y = g.op("MatMul", y, self._weight)
        y = g.op("Cast", y, to=ir.DataType.FLOAT) if half else y
        return y if bias is None else g.op("Add", y, bias)

    def _product_rows8(self, x: ir.Value, bias: Array | ir.Value | None) -> ir.Value:
        """Round x to 127 steps on either side of 0; the sums are of integers, and exact.

        In a row of zeros what is divided by zero becomes some code, and is multiplied by zero.
        """
        g, zero = self.g, np.uint8(128)
        # Folded when the graph is loaded.
        weight = g.op("Transpose", self._weight, perm=(1, 0)) if self._by_rows else self._weight
        if self._reach is not None:
            step = np.float32(self._reach / 127)
            codes = _quantized(g, x, step, zero)
            extra: tuple[Input, ...] = () if bias is None else (None, bias)
            return g.op(
                "MatMulIntegerToFloat", codes, weight, step, self._scales, zero, *extra, domain=CONTRIB
            )
        step = np.float32(1 / 127)
        largest = g.op("ReduceMax", g.op("Abs", x), ints(-1), keepdims=1)
        codes = _quantized(g, g.op("Div", x, largest), step, zero)
        y = g.op("MatMulIntegerToFloat", codes, weight, step, self._scales, zero, domain=CONTRIB)
        y = g.op("Mul", y, largest)
        return y if bias is None else g.op("Add", y, bias)

    def mean_of_rows(
        self, shares_UW: ir.Value, indices: ir.Value, indices_UW: ir.Value, places_UW: ir.Value
    ) -> ir.Value:
        """Return Σ_w share_w · row(index_w) for each of U positions, (B, U, K).

        Shares, none below 0, and indices are (B, U, W): of `indices` (B, J) those in `places_UW` (U, W). What
        a position gives does not depend, bit for bit, on how many there are. In rows8, the products of shares
        and scales are rounded to 129 steps: a pair of such, with any two weights, fits in 16 bits. Otherwise
        a `Scan` takes one position after another, so that memory does not grow with U.
        """
        g = self.g
        if self.precision == "rows8":
            step, zero = np.float32(1 / 129), np.uint8(0)
            shares = g.op("Mul", shares_UW, g.op("Gather", self._scales, indices_UW, axis=0))
            largest = g.op("ReduceMax", shares, ints(-1), keepdims=1)
            codes = g.op("Unsqueeze", _quantized(g, g.op("Div", shares, largest), step, zero), ints(2))
            rows = g.op("Gather", self._weight, indices_UW, axis=0)
            y = g.op("MatMulIntegerToFloat", codes, rows, step, np.float32(1), zero, domain=CONTRIB)
            return g.op("Mul", g.op("Squeeze", y, ints(2)), largest)
        rows, body = self.rows(indices), g.branch()
        shares_W = body.input("shares", ir.DataType.FLOAT, ("batch", "places"))
        places_W = body.input("places", ir.DataType.INT64, ("places",))
        mean = body.op(
            "MatMul", body.op("Unsqueeze", shares_W, ints(1)), body.op("Gather", rows, places_W, axis=1)
        )
        mean = body.op("Squeeze", mean, ints(1))
        body.output(mean.name or "", mean, ir.DataType.FLOAT, ("batch", self.num_columns))
        return g.scan(body, shares_UW, places_UW, axes=(1, 0))

    def rows(self, indices: ir.Value, g: Builder | None = None, *, many: bool = False) -> ir.Value:
        """Return rows of W, (..., K) in float32 for indices (...) of two dimensions.

        `g` where they are looked up in a branch of the graph. `many`: quicker, in more nodes; the same rows.
        """
        g = g or self.g
        if self.precision not in BITS:
            out = g.op("Gather", self._weight, indices, axis=0)
            if self.precision == "rows8":
                scales = g.op("Unsqueeze", g.op("Gather", self._scales, indices, axis=0), ints(-1))
                return g.op("Mul", g.op("Cast", out, to=ir.DataType.FLOAT), scales)
            return g.op("Cast", out, to=ir.DataType.FLOAT) if self.precision == "fp16" else out
        blocks = self._blocks
        if many and blocks.bits == 8:
            # A third of the time of GatherBlockQuantized, which takes one weight after another.
            codes = g.op("Reshape", g.op("Gather", self._weight, indices, axis=0), ints(-1, blocks.size))
            scales = g.op("Reshape", g.op("Gather", self._scales, indices, axis=0), ints(-1))
            zeros = g.op("Expand", np.uint8(128), g.op("Shape", scales))
            out = g.op("DequantizeLinear", codes, scales, zeros, domain=CONTRIB, axis=0)
            out = g.op("Reshape", out, g.op("Concat", g.op("Shape", indices), ints(-1), axis=0))
        else:
            out = g.op(
                "GatherBlockQuantized", self._weight, indices, self._scales_of_rows, domain=CONTRIB,
                bits=blocks.bits, block_size=blocks.size, gather_axis=0, quantize_axis=2,
            )  # fmt: skip
            out = g.op("Reshape", out, ints(0, 0, -1))
        if self.num_columns % blocks.size:
            out = g.op("Slice", out, ints(0), ints(self.num_columns), ints(2))
        return out


def _quantized(g: Builder, x: ir.Value, step: np.float32, zero: np.uint8) -> ir.Value:
    """Return the codes of x, by a node of ONNX Runtime's: 1.23 lacks that of opset 23 on a processor."""
    return g.op("QuantizeLinear", x, step, zero, domain=CONTRIB)
