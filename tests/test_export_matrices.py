import numpy as np
import onnx_ir as ir
import pytest
import trained
from hypothesis import given
from hypothesis import strategies as st
from sdgm_edge.export.builder import Builder
from sdgm_edge.export.matrices import (
    BITS,
    BLOCKS,
    SCALE_COST,
    Matrix,
    as_held,
    block_size,
    dequantize_blocks,
    quantize_blocks,
    quantize_columns,
)

PRECISIONS = ("fp32", "fp16", "int8", "rows8", "q8", "q4", "rows4")
BY_ROWS = tuple(p for p in PRECISIONS if p != "int8")


def weight(rows, columns, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def session(build, *inputs):
    """A session of the graph whose inputs are named x0, x1, …, and whose output is `build` of them."""
    import onnxruntime as ort

    g = Builder()
    values = [g.input(f"x{i}", dtype, shape) for i, (dtype, shape) in enumerate(inputs)]
    out = build(g, *values)
    g.output("y", out, ir.DataType.FLOAT, ("batch", "time", "width"))
    data = ir.to_proto(ir.Model(g.graph("test"), ir_version=11)).SerializeToString()
    return ort.InferenceSession(data, providers=["CPUExecutionProvider"])


def test_columns_are_rounded_to_half_a_step():
    codes, scales = quantize_columns(weight(32, 7))
    assert codes.dtype == np.int8
    assert (np.abs(codes * scales - weight(32, 7)) <= scales / 2 + 1e-6).all()


def test_a_column_without_loud_pairs_reaches_as_far_as_codes_do():
    matrix = np.array([[4.0], [-4.0], [4.0]], np.float32)
    codes, scales = quantize_columns(matrix)
    np.testing.assert_array_equal(codes, [[127], [-127], [127]])
    np.testing.assert_allclose(scales, 4 / 127, rtol=1e-6)


@given(st.integers(1, 40), st.sampled_from([0.0, 1.0, -1.0]), st.integers(0, 2**32 - 1))
def test_no_pair_of_codes_overflows_16_bits_with_activations_of_255(rows, shift, seed):
    matrix = weight(rows, 30, seed % 1000) + shift
    matrix[seed % rows] = 3 * shift
    codes, _ = quantize_columns(matrix)
    pairs = np.pad(codes.astype(np.int64), ((0, rows % 2), (0, 0))).reshape(-1, 2, 30)
    for quiet_or_loud in ((255, 255), (255, 0), (0, 255)):
        sums = (pairs * np.array(quiet_or_loud)[:, None]).sum(axis=1)
        assert -32768 <= sums.min() <= sums.max() <= 32767


@pytest.mark.parametrize("precision", ["int8", "rows8"])
@pytest.mark.parametrize("columns", [127, 128])
def test_the_loudest_product_is_exact_on_every_processor(precision, columns):
    made = session(
        lambda g, x: Matrix(g, "m", np.ones((16, columns), np.float32), precision).product(x),
        (ir.DataType.FLOAT, ("batch", "time", columns)),
    )
    for rows in (1, 5):
        got = made.run(None, {"x0": np.ones((1, rows, columns), np.float32)})[0]
        np.testing.assert_allclose(got, columns, rtol=1e-2)


def test_the_loudest_mean_of_rows_is_exact_on_every_processor():
    made = session(
        lambda g, shares, indices, chosen, places: Matrix(
            g, "m", np.eye(20, 8, dtype=np.float32) + 1, "rows8", rows=True
        ).mean_of_rows(shares, indices, chosen, places),
        (ir.DataType.FLOAT, ("batch", "positions", "places")),
        (ir.DataType.INT64, ("batch", "words")),
        (ir.DataType.INT64, ("batch", "positions", "places")),
        (ir.DataType.INT64, ("positions", "places")),
    )
    indices = np.arange(8, 16)[None]
    shares, chosen, places = np.ones((1, 1, 8), np.float32), indices[:, None], np.arange(8)[None]
    got = made.run(None, {"x0": shares, "x1": indices, "x2": chosen, "x3": places})[0]
    np.testing.assert_allclose(got, 8, rtol=1e-2)


def test_zeros_stay_zeros():
    for precision in PRECISIONS:
        np.testing.assert_array_equal(as_held(np.zeros((3, 20), np.float32), precision), np.zeros((3, 20)))


@pytest.mark.parametrize("precision", BITS)
@pytest.mark.parametrize("columns", [1, 16, 20, 64, 130])
def test_blocks_hold_a_matrix_of_any_width(precision, columns):
    blocks = quantize_blocks(weight(5, columns), precision)
    size = block_size(columns, precision)
    assert blocks.packed.shape == (5, -(-columns // size), size * BITS[precision] // 8)
    held = dequantize_blocks(blocks, columns)
    step = np.abs(weight(5, columns)).max() / 2 ** (BITS[precision] - 1)
    assert np.abs(held - weight(5, columns)).max() <= 2 * step


@given(st.integers(1, 3000), st.sampled_from(sorted(BITS)))
def test_no_other_block_size_is_quicker(columns, precision):
    size = block_size(columns, precision)
    assert size in BLOCKS[precision]
    blocks = -(-columns // size)
    for other in BLOCKS[precision]:
        assert blocks * (size + SCALE_COST) <= -(-columns // other) * (other + SCALE_COST)


@pytest.mark.parametrize(
    ("columns", "q4", "rows4"),
    [(1, 16, 16), (20, 32, 32), (64, 64, 32), (160, 32, 32), (352, 128, 32), (416, 64, 32), (640, 128, 32)],
)
def test_a_scale_is_shared_by_as_many_weights_as_is_worth_the_zeros(columns, q4, rows4):
    assert (block_size(columns, "q4"), block_size(columns, "rows4")) == (q4, rows4)


def test_searched_scales_lose_less_than_full_range():
    matrix = weight(64, 128)
    blocks = matrix.reshape(64, -1, block_size(128, "q4"))
    scale = np.abs(blocks).max(-1, keepdims=True) / 7
    plain = np.clip(np.rint(blocks / scale), -8, 7) * scale
    searched = as_held(matrix, "q4").reshape(blocks.shape)
    assert np.square(searched - blocks).sum() < 0.85 * np.square(plain - blocks).sum()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("columns", [20, 128])
@pytest.mark.parametrize("biased", [True, False])
def test_a_product_is_that_with_the_matrix_as_held(precision, columns, biased):
    matrix, bias = weight(48, columns), weight(1, 48, seed=1)[0] if biased else None
    made = session(
        lambda g, x: Matrix(g, "m", matrix, precision).product(x, bias),
        (ir.DataType.FLOAT, ("batch", "time", columns)),
    )
    x = weight(6, columns, seed=2).reshape(2, 3, columns)
    expected = x @ as_held(matrix, precision).T + (0 if bias is None else bias)
    got = made.run(None, {"x0": x})[0]
    error = np.abs(got - expected).max() / np.abs(expected).max()
    assert error < {"fp32": 1e-6, "fp16": 2e-3}.get(precision, 2e-2)


@pytest.mark.parametrize("precision", BY_ROWS)
@pytest.mark.parametrize("columns", [20, 128])
def test_rows_are_those_of_the_matrix_as_held(precision, columns):
    matrix = weight(9, columns)
    made = session(
        lambda g, ids: Matrix(g, "m", matrix, precision, rows=True).rows(ids),
        (ir.DataType.INT64, ("batch", "time")),
    )
    ids = np.array([[0, 8, 3], [8, 1, 1]])
    np.testing.assert_allclose(made.run(None, {"x0": ids})[0], as_held(matrix, precision)[ids], rtol=1e-6)


@pytest.mark.parametrize("precision", BY_ROWS)
@pytest.mark.parametrize("columns", [20, 128, 320])
def test_many_rows_are_bit_for_bit_those_looked_up_one_by_one(precision, columns):
    matrix, ids = weight(50, columns), np.random.default_rng(0).integers(0, 50, (2, 40))
    few, many = (
        session(
            lambda g, ids, many=many: Matrix(g, "m", matrix, precision, rows=True).rows(ids, many=many),
            (ir.DataType.INT64, ("batch", "time")),
        ).run(None, {"x0": ids})[0]
        for many in (False, True)
    )
    np.testing.assert_array_equal(many, few)


@pytest.mark.parametrize("precision", BY_ROWS)
def test_rows_and_product_share_one_matrix(precision):
    matrix = weight(40, 32)

    def both(g, ids):
        shared = Matrix(g, "m", matrix, precision, rows=True)
        return shared.product(shared.rows(ids))

    held = as_held(matrix, precision)
    ids = np.array([[3, 39]])
    got = session(both, (ir.DataType.INT64, ("batch", "time"))).run(None, {"x0": ids})[0]
    expected = held[ids] @ held.T
    assert np.abs(got - expected).max() < 2e-2 * np.abs(expected).max()


@pytest.mark.parametrize("precision", ["fp32", "rows8", "rows4"])
@pytest.mark.parametrize(("rows", "columns"), [(48, 20), (300, 128), (65, 512)])
@pytest.mark.parametrize("by_rows", [False, True])
def test_rows_do_not_see_each_other(precision, rows, columns, by_rows):
    """Bit for bit: what drafts are checked with is what is computed without them."""
    trained.needs_rows_alone(precision)
    matrix, bias = weight(rows, columns), weight(1, rows, seed=1)[0]
    made = session(
        lambda g, x: Matrix(g, "m", matrix, precision, rows=by_rows).product(x, bias),
        (ir.DataType.FLOAT, ("batch", "time", columns)),
    )
    x = weight(40, columns, seed=2)[None] * np.exp(weight(40, 1, seed=3))
    whole = made.run(None, {"x0": x})[0]
    for begin, end in ((0, 1), (1, 3), (3, 6), (6, 11), (11, 27), (27, 40), (0, 17)):
        alone = made.run(None, {"x0": np.ascontiguousarray(x[:, begin:end])})[0]
        np.testing.assert_array_equal(alone, whole[:, begin:end])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_of_zeros_gives_the_bias(precision):
    made = session(
        lambda g, x: Matrix(g, "m", weight(48, 32), precision).product(x, np.ones(48, np.float32)),
        (ir.DataType.FLOAT, ("batch", "time", 32)),
    )
    np.testing.assert_array_equal(made.run(None, {"x0": np.zeros((1, 2, 32), np.float32)})[0], 1)


def test_columns_cannot_be_looked_up_by_rows():
    with pytest.raises(ValueError, match="m is looked up by rows: give it precision q8 or rows8 instead"):
        Matrix(Builder(), "m", weight(4, 16), "int8", rows=True)


def test_the_largest_number_of_a_row_decides_what_is_lost_of_it():
    """A token with large activations, of which any text has some, takes nothing from the others."""
    matrix, x = weight(48, 128), weight(2, 128, seed=2)[None]
    x[0, 0, 3] = 1e4
    made = session(
        lambda g, x: Matrix(g, "m", matrix, "rows8").product(x), (ir.DataType.FLOAT, ("batch", "time", 128))
    )
    expected = x @ as_held(matrix, "rows8").T
    error = np.abs(made.run(None, {"x0": x})[0] - expected).max(-1) / np.abs(expected).max(-1)
    assert error.max() < 2e-2


@pytest.mark.parametrize("precision", BY_ROWS)
def test_rows_are_averaged_in_windows_each_as_if_alone(precision):
    places, window = 6, 4
    matrix = weight(50, 24)
    made = session(
        lambda g, shares, indices, chosen, places: Matrix(g, "m", matrix, precision, rows=True).mean_of_rows(
            shares, indices, chosen, places
        ),
        (ir.DataType.FLOAT, ("batch", "asked", window)),
        (ir.DataType.INT64, ("batch", "all")),
        (ir.DataType.INT64, ("batch", "asked", window)),
        (ir.DataType.INT64, ("asked", window)),
    )
    shares = np.abs(weight(2 * places, window, seed=1)).reshape(2, places, window)
    indices = np.random.default_rng(2).integers(-1, 50, (2, places + window - 1))
    at = np.arange(places)[:, None] + np.arange(window)

    def run(only):
        return made.run(
            None, {"x0": shares[:, only], "x1": indices, "x2": indices[:, at[only]], "x3": at[only]}
        )[0]

    together = run(slice(None))
    expected = np.einsum("buw,buwk->buk", shares, as_held(matrix, precision)[indices[:, at]])
    assert (
        np.abs(together - expected).max() < (1e-2 if precision == "rows8" else 1e-5) * np.abs(expected).max()
    )
    for place in range(places):
        np.testing.assert_array_equal(run(slice(place, place + 1)), together[:, place : place + 1])


def test_steps_of_one_size_reach_so_far_and_no_further():
    matrix, x = weight(48, 128), weight(3, 128, seed=2)[None].clip(-2, 2)
    made = session(
        lambda g, x: Matrix(g, "m", matrix, "rows8", reach=2.0).product(x, np.ones(48, np.float32)),
        (ir.DataType.FLOAT, ("batch", "time", 128)),
    )
    expected = x @ as_held(matrix, "rows8").T + 1
    got = made.run(None, {"x0": x})[0]
    assert np.abs(got - expected).max() < 2e-2 * np.abs(expected).max()
    x[0, 0] *= 1e6
    cut = made.run(None, {"x0": x})[0]
    np.testing.assert_array_equal(cut[:, 1:], got[:, 1:])
    clipped = x.clip(-128 / 127 * 2, 2) @ as_held(matrix, "rows8").T + 1
    assert np.abs(cut - clipped).max() < 2e-2 * np.abs(clipped).max()
