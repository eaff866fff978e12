"""Grouped matmuls of gathered rows: their meaning, derivatives, the Hopper kernels in the interpreter and lowered."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import grouped_matmul, grouped_weight_gradient
from pallas_kernels.grouped_matmul import mosaic_gpu, mosaic_gpu_weight_gradient
from pallas_kernels.row_copies import RowCopies
from pallas_kernels.rows import sum_rows

SIZES = [101, 0, 77, 50]  # of 250 rows
UNROUTED = 60  # of the 61 rows that are gathered from; it holds NaN, and rows past the groups name it
BFLOAT16_TOLERANCE = 4e-3


def draw_index(num_rows=250, sizes=SIZES):
    index = np.random.default_rng(0).integers(0, UNROUTED, num_rows).astype(np.int32)
    index[sum(sizes) :] = UNROUTED
    return index


@pytest.fixture
def sources(normal):
    def draw(columns, dtype=jnp.bfloat16):
        return normal(UNROUTED + 1, columns, dtype=dtype).at[UNROUTED].set(jnp.nan)

    return draw


@pytest.mark.parametrize("implementation", [None, "xla", "reference"])
@pytest.mark.parametrize("transpose_rhs", [False, True])
def test_product_and_gradients_are_those_of_the_rows_gathered_before(implementation, transpose_rhs, normal):
    x, rhs, sizes = normal(7, 5), normal(3, *((4, 5) if transpose_rhs else (5, 4))), jnp.array([4, 0, 5])
    index = jnp.array([6, 0, 0, 3, 5, 6, 6, 1, 0, 2, 2])  # the last two past the groups
    out_grad = normal(11, 4, seed=1)
    multiply = functools.partial(
        grouped_matmul, group_sizes=sizes, transpose_rhs=transpose_rhs, implementation=implementation
    )

    def run(multiply):
        out, pull_back = jax.vjp(multiply, x, rhs)
        return out, *pull_back(out_grad)

    fused = run(lambda x, rhs: multiply(x, rhs, lhs_index=index))
    before = run(lambda x, rhs: multiply(x[index], rhs))
    for actual, expected in zip(fused, before, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", [None, "xla", "reference"])
@pytest.mark.parametrize("gathered", [("lhs",), ("out_grad",), ("lhs", "out_grad")])
def test_weight_gradient_and_its_gradients_are_those_of_the_rows_gathered_before(implementation, gathered, normal):
    sizes, grad = jnp.array([4, 0, 5]), normal(3, 5, 4, seed=2)
    index = {"lhs": jnp.array([6, 0, 0, 3, 5, 6, 6, 1, 0, 2]), "out_grad": jnp.array([1, 6, 2, 2, 4, 0, 0, 3, 5, 5])}
    columns = {"lhs": 5, "out_grad": 4}
    operands = {name: normal(7 if name in gathered else 10, columns[name]) for name in columns}

    def run(gather_before):
        def compute(operands):
            operands, indices = dict(operands), {}
            for name in gathered:
                if gather_before:
                    operands[name] = operands[name][index[name]]
                else:
                    indices[f"{name}_index"] = index[name]
            return grouped_weight_gradient(
                operands["lhs"], operands["out_grad"], sizes, implementation=implementation, **indices
            )

        out, pull_back = jax.vjp(compute, operands)
        return out, pull_back(grad)

    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), run(False), run(True))


def test_numbers_outside_are_clipped_forward_and_backward_whatever_their_dtype(normal):
    x, rhs, sizes = normal(4, 5), normal(1, 5, 3), jnp.array([3])

    def run(index):
        out, pull_back = jax.vjp(lambda x: grouped_matmul(x, rhs, sizes, lhs_index=index), x)
        return out, *pull_back(jnp.ones_like(out))

    expected = run(jnp.array([0, 3, 3]))
    for index in (jnp.array([-1, 4, 99]), jnp.array([-7, 3, 2**31 - 1]), jnp.array([0, 2**31 + 5, 9], jnp.uint32)):
        jax.tree.map(np.testing.assert_array_equal, run(index), expected)


def test_vmap_gives_each_element_its_own_index(normal):
    x, rhs, sizes = normal(2, 4, 5), normal(2, 3, 5, 6), jnp.array([[2, 1, 3], [0, 6, 0]])
    index = jnp.array([[3, 0, 0, 1, 2, 3], [1, 1, 2, 0, 3, 3]])
    batched = jax.vmap(lambda *arrays: grouped_matmul(*arrays[:3], lhs_index=arrays[3]))(x, rhs, sizes, index)
    for i in range(2):
        np.testing.assert_array_equal(batched[i], grouped_matmul(x[i], rhs[i], sizes[i], lhs_index=index[i]))


def test_no_rows_and_no_columns_give_zeros_of_the_right_shape():
    rhs, sizes = jnp.ones((2, 3, 5)), jnp.array([1, 1])
    assert grouped_matmul(jnp.ones((4, 3)), rhs, sizes, lhs_index=jnp.zeros(0, int)).shape == (0, 5)
    assert grouped_weight_gradient(jnp.ones((4, 3)), jnp.ones((0, 5)), sizes, lhs_index=jnp.zeros(0, int)).shape == (
        2,
        3,
        5,
    )


@pytest.mark.parametrize("implementation", [None, "xla", "reference"])
@pytest.mark.parametrize("transpose_rhs", [False, True])
def test_groups_may_name_their_matrices(implementation, transpose_rhs, normal):
    lhs, sizes, index = normal(9, 5), jnp.array([2, 0, 3, 1]), jnp.array([1, 0, 1, 7])  # the last one is clipped
    rhs = normal(3, *((4, 5) if transpose_rhs else (5, 4)))
    multiply = functools.partial(
        grouped_matmul, group_sizes=sizes, transpose_rhs=transpose_rhs, implementation=implementation
    )

    def run(multiply):
        out, pull_back = jax.vjp(multiply, lhs, rhs)
        return out, *pull_back(normal(9, 4, seed=1))

    fused = run(lambda lhs, rhs: multiply(lhs, rhs, rhs_index=index))
    before = run(lambda lhs, rhs: multiply(lhs, rhs[jnp.array([1, 0, 1, 2])]))
    for actual, expected in zip(fused, before, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("without_annotation_checks")
def test_numbers_of_matrices_are_one_for_each_group():
    with pytest.raises(ValueError, match="rhs_index has 3 groups and group_sizes 2; they must agree"):
        grouped_matmul(jnp.ones((4, 3)), jnp.ones((5, 3, 2)), jnp.array([1, 3]), rhs_index=jnp.zeros(3, int))


@pytest.mark.usefixtures("without_annotation_checks")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lhs_index": jnp.zeros(3)}, r"lhs_index is float32\[3\]; it must be a vector of integers, \[M\]"),
        ({"lhs_index": jnp.zeros((3, 1), int)}, r"lhs_index is int32\[3, 1\]; it must be a vector"),
        ({"lhs": jnp.ones((0, 3)), "lhs_index": jnp.zeros(2, int)}, "lhs has no rows and lhs_index 2; there must be"),
        ({"out_grad_index": jnp.zeros(2)}, r"out_grad_index is float32\[2\]; it must be a vector"),
        ({"lhs_index": jnp.zeros(5, int)}, "lhs has 5 rows and out_grad 4; they must agree"),
    ],
)
def test_a_bad_index_is_a_value_error_that_names_it(arguments, message):
    operands = {"lhs": jnp.ones((4, 3)), "out_grad": jnp.ones((4, 5)), "group_sizes": jnp.array([1, 3])}
    with pytest.raises(ValueError, match=message):
        grouped_weight_gradient(**operands | arguments)


@pytest.mark.parametrize("weighted", [False, True])
def test_rows_are_summed_in_float32_by_index_and_those_outside_are_left_out(weighted, normal, relative_error):
    rows, index = normal(50, 6, dtype=jnp.bfloat16), np.random.default_rng(1).integers(-1, 9, 50).astype(np.int32)
    rows = rows.at[(index < 0) | (index >= 7)].set(jnp.nan)
    weight = normal(50, seed=3) if weighted else None
    expected = np.zeros((7, 6))
    for m in range(50):
        if 0 <= index[m] < 7:
            expected[index[m]] += np.asarray(rows[m], np.float64) * (1 if weight is None else float(weight[m]))
    out = sum_rows(rows, jnp.asarray(index), 7, weight)
    assert out.dtype == jnp.float32
    assert relative_error(out, expected) < 1e-6


@dataclasses.dataclass(frozen=True)
class InterpretedRowCopies(RowCopies):
    """Stands in for device code that cannot be interpreted: one arrival for a tile, rows by loads and stores."""

    @staticmethod
    def scratch(num_slots):
        return plgpu.Barrier(num_arrivals=1, num_barriers=num_slots)

    def prepare(self):
        pass

    def read(self, first, num_rows):
        last = self.index.shape[0] - 1
        return jnp.stack([self.index[jnp.minimum(first + row, last)] for row in range(num_rows)])

    def locate(self, rows, first, begin, end, num_rows):
        place = first + jnp.arange(num_rows)
        return jnp.where((place >= begin) & (place < end), jnp.clip(rows, 0, self.source.shape[0] - 1), -1)

    def copy(self, pieces, column, tile, slot):
        num_rows, columns = tile.shape
        width, line = self.source.shape[1], 64

        def copy_row(row, carry):
            origin = jnp.sum(jnp.where(jnp.arange(num_rows) == row, pieces, 0))
            for before in range(0, columns, line):
                inside = (origin >= 0) & (column + before < width)
                values = self.source[jnp.maximum(origin, 0), pl.ds(jnp.minimum(column + before, width - line), line)]
                tile[row, before : before + line] = jnp.where(inside, values, 0)
            return carry

        lax.fori_loop(0, num_rows, copy_row, jnp.int32(0))
        plgpu.barrier_arrive(self.arrived.at[slot])

    def wait(self, step):
        plgpu.barrier_wait(self.arrived.at[step % self.num_slots])


def options_of(config, **fields):
    return {
        "precision": None,
        "accumulator_dtype": jnp.dtype(jnp.float32),
        "out_dtype": jnp.dtype(jnp.bfloat16),
        "config": config(**{"block_n": 128, "num_stages": 3} | fields),
        "copies": InterpretedRowCopies,
    }


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("k", "n", "sizes", "transpose_rhs", "fields"),
    [
        (128, 128, SIZES, False, {}),
        (192, 192, SIZES, True, {}),
        (64, 256, [0, 250, 0], False, {"block_n": 256}),
        (64, 64, SIZES, False, {"block_n": 64}),
    ],
)
def test_the_interpreted_kernel_multiplies_gathered_rows(
    k, n, sizes, transpose_rhs, fields, interpret, sources, normal, loop_matmul, relative_error
):
    x, index = sources(k), draw_index(sizes=sizes)
    rhs = normal(len(sizes), *((n, k) if transpose_rhs else (k, n)), dtype=jnp.bfloat16)
    run = functools.partial(
        mosaic_gpu.grouped_matmul,
        *(x, rhs, jnp.array(sizes, jnp.int32), jnp.asarray(index), None),
        transpose_rhs=transpose_rhs,
        **options_of(mosaic_gpu.Config, **fields),
    )
    out = interpret(run, detect_races=True)
    expected = loop_matmul(np.asarray(x, np.float64)[index], rhs, sizes, transpose_rhs=transpose_rhs)
    assert relative_error(out, expected) < BFLOAT16_TOLERANCE
    assert np.all(out[sum(sizes) :] == 0)


def zero_rows(tile, first, last):
    """Stands in for the weight gradient's device code."""
    row = lax.broadcasted_iota(jnp.int32, tile.shape, 0)
    tile[...] = jnp.where((row >= first) & (row < last), tile[...], 0)


@pytest.mark.sample(5)
@pytest.mark.parametrize("gathered", ["lhs", "out_grad"])
@pytest.mark.parametrize(("k", "n", "sizes"), [(128, 128, SIZES), (192, 192, SIZES), (64, 64, [0, 250, 0])])
def test_the_interpreted_weight_gradient_gathers_one_operand(
    gathered, k, n, sizes, interpret, sources, normal, loop_weight_gradient, relative_error
):
    index = draw_index(sizes=sizes)
    columns = {"lhs": k, "out_grad": n}
    operands = {
        name: normal(250, columns[name], dtype=jnp.bfloat16, seed=1).at[sum(sizes) :].set(jnp.nan) for name in columns
    }
    operands[gathered] = sources(columns[gathered])
    indices = [jnp.asarray(index) if name == gathered else None for name in columns]
    run = functools.partial(
        mosaic_gpu_weight_gradient.grouped_weight_gradient,
        *(*operands.values(), jnp.array(sizes, jnp.int32), *indices),
        zero_rows=zero_rows,
        **options_of(mosaic_gpu_weight_gradient.Config),
    )
    out = interpret(run, detect_races=True)
    rows = operands | {gathered: np.asarray(operands[gathered], np.float64)[index]}
    assert relative_error(out, loop_weight_gradient(rows["lhs"], rows["out_grad"], sizes)) < BFLOAT16_TOLERANCE
    assert np.all(out[np.array(sizes) == 0] == 0)


def test_the_interpreter_sees_rows_that_are_read_before_they_arrive(interpret, sources, normal, monkeypatch):
    monkeypatch.setattr(InterpretedRowCopies, "wait", lambda copies, step: None)
    rhs = normal(4, 128, 128, dtype=jnp.bfloat16)
    run = functools.partial(
        mosaic_gpu.grouped_matmul,
        *(sources(128), rhs, jnp.array(SIZES, jnp.int32), jnp.asarray(draw_index()), None),
        transpose_rhs=False,
        **options_of(mosaic_gpu.Config),
    )
    # What it sees first is a matter of time: a race, or a barrier that nobody has waited for.
    with pytest.raises((AssertionError, RuntimeError)):
        interpret(run, detect_races=True)


@pytest.mark.parametrize(("t", "k", "n", "g"), [(32768, 2048, 1536, 128), (5, 64, 192, 3), (100, 320, 1088, 7)])
def test_the_kernels_lower_and_make_no_array_of_gathered_rows(t, k, n, g, lower_for_cuda):
    m, sizes = 8 * t, ((g,), jnp.int32)
    index = (m,), jnp.int32
    x, wide = ((t, k), jnp.bfloat16), ((t, n), jnp.bfloat16)

    def transposed(lhs, rhs, sizes, index):
        return grouped_matmul(lhs, rhs, sizes, transpose_rhs=True, lhs_index=index)

    def gather_out_grad(lhs, out_grad, sizes, index):
        return grouped_weight_gradient(lhs, out_grad, sizes, out_grad_index=index)

    def gather_lhs(lhs, out_grad, sizes, index):
        return grouped_weight_gradient(lhs, out_grad, sizes, lhs_index=index)

    def forward(lhs, rhs, sizes, index):
        return grouped_matmul(lhs, rhs, sizes, lhs_index=index)

    for width, function, *arrays in (
        (k, forward, x, ((g, k, n), jnp.bfloat16)),
        (k, transposed, x, ((g, n, k), jnp.bfloat16)),
        (k, gather_lhs, x, ((m, n), jnp.bfloat16)),
        (n, gather_out_grad, ((m, k), jnp.bfloat16), wide),
    ):
        program = lower_for_cuda(function, *arrays, sizes, index)
        assert program.count("custom_call @mosaic_gpu") == 1
        assert not re.search(rf"tensor<{m}x{width}xbf16>.*gather|gather.*tensor<{m}x{width}xbf16>", program)


def test_sources_too_large_for_the_kernels_numbers_are_gathered_before(lower_for_cuda, monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "MAX_BYTES", 2 * 50 * 128 - 1)
    arrays = ((50, 128), jnp.bfloat16), ((4, 128, 64), jnp.bfloat16), ((4,), jnp.int32), ((400,), jnp.int32)
    program = lower_for_cuda(lambda lhs, rhs, sizes, i: grouped_matmul(lhs, rhs, sizes, lhs_index=i), *arrays)
    assert re.search(r"gather.*tensor<400x128xbf16>", program)
    assert program.count("custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize("too_large", [False, True])
def test_the_weight_gradient_gathers_the_second_of_two_operands_before_and_both_if_they_are_too_large(
    too_large, lower_for_cuda, monkeypatch
):
    if too_large:
        monkeypatch.setattr(mosaic_gpu_weight_gradient, "MAX_BYTES", 1)
    arrays = ((50, 128), jnp.bfloat16), ((60, 64), jnp.bfloat16), ((4,), jnp.int32), *[((400,), jnp.int32)] * 2

    def gradient(lhs, out_grad, sizes, lhs_index, out_grad_index):
        return grouped_weight_gradient(lhs, out_grad, sizes, lhs_index=lhs_index, out_grad_index=out_grad_index)

    program = lower_for_cuda(gradient, *arrays)
    assert program.count("custom_call @mosaic_gpu") == 1
    assert re.search(r"gather.*-> tensor<400x64xbf16>", program)
    assert bool(re.search(r"gather.*-> tensor<400x128xbf16>", program)) == too_large
