"""Weighted sums of chosen rows: against loops in NumPy, in the interpreter, and lowered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pallas_kernels import combine
from pallas_kernels.combine import mosaic_gpu


def loop(rows, index, weight, num_rows):
    rows, index = np.asarray(rows, np.float64), np.asarray(index)
    out = np.zeros((index.shape[0], rows.shape[1]))
    for (t, k), number in np.ndenumerate(index):
        if 0 <= number < min(num_rows, rows.shape[0]):
            out[t] += rows[number] if weight is None else float(weight[t, k]) * rows[number]
    return out


@pytest.fixture
def problem(normal):
    """Rows of which some do not count and hold NaN, numbers of which some are none, weights that are NaN there."""

    def draw(num_rows, columns, num_sums, num_terms, dtype=jnp.float32):
        rows = normal(num_rows + 3, columns, dtype=dtype).at[num_rows:].set(jnp.nan)
        index = np.random.default_rng(0).integers(-2, num_rows + 5, (num_sums, num_terms)).astype(np.int32)
        weight = jnp.where((index >= 0) & (index < num_rows), normal(num_sums, num_terms, seed=1), jnp.nan)
        return rows, jnp.asarray(index), weight

    return draw


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [(20, 6, 9, 3), (1, 4, 5, 2), (7, 3, 0, 2), (7, 3, 4, 0)])
def test_sums_are_those_of_a_loop(shape, weighted, problem, relative_error):
    rows, index, weight = problem(*shape)
    weight = weight if weighted else None
    result = combine(rows, index, weight, shape[0])
    assert relative_error(result, loop(rows, index, weight, shape[0])) < 1e-6


def test_all_rows_count_by_default(normal, relative_error):
    rows, index = normal(6, 4), jnp.array([[5, 6], [0, 5]])
    assert relative_error(combine(rows, index), loop(rows, index, None, 6)) < 1e-6
    assert relative_error(combine(rows, index, None, 100), loop(rows, index, None, 6)) < 1e-6


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((20, 128, 6, 3), jnp.bfloat16),
        ((9, 384, 3, 2), jnp.float32),
        ((9, 512, 2, 8), jnp.float16),
        ((5, 2176, 2, 1), jnp.bfloat16),  # 17 chunks of 128
    ],
)
def test_the_kernel_gives_the_same(shape, dtype, weighted, problem, interpret, relative_error):
    rows, index, weight = problem(*shape, dtype)
    weight = weight if weighted else None
    count = jnp.int32(shape[0])
    result = interpret(lambda: mosaic_gpu.combine(rows, index, weight, count), detect_races=True)
    assert result.dtype == dtype
    tolerance = 1e-6 if dtype == jnp.float32 else float(jnp.finfo(dtype).eps) / 2
    assert relative_error(result, loop(rows, index, weight, shape[0])) < tolerance


def test_derivatives_are_those_of_finite_differences(normal):
    index = jnp.array([[0, 3], [3, 9]])

    def sums(*arrays):
        rows, weight = map(jnp.asarray, arrays)
        return combine(rows, index, weight)

    check_grads(sums, (normal(4, 3), normal(2, 2)), order=2, rtol=1e-2)


def test_numbers_of_another_dtype_do_not_wrap_around(normal):
    rows = normal(300, 2)
    with jax.enable_x64(True):
        result = combine(rows, jnp.array([[2**32, 299]], jnp.int64))
    np.testing.assert_array_equal(result, rows[299:])
    np.testing.assert_array_equal(combine(rows, jnp.array([[7]], jnp.uint8)), rows[7:8])


def test_vmap_gives_what_each_element_gives(normal):
    rows, index, weight = normal(2, 5, 4), jnp.array([[[0, 1]], [[2, 4]]]), normal(2, 1, 2, seed=1)
    result = jax.vmap(combine)(rows, index, weight)
    np.testing.assert_array_equal(result[1], combine(rows[1], index[1], weight[1]))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("columns", "num_terms"), [(2048, 8), (1536, 8), (4096, 2), (2880, 4), (128, 1)])
def test_the_kernel_is_chosen_and_lowers(columns, num_terms, weighted, lower_for_cuda):
    fits = columns % 128 == 0
    weight = [((100, num_terms), jnp.float32)] if weighted else []
    arrays = ((1000, columns), jnp.bfloat16), ((100, num_terms), jnp.int32), *weight
    assert ("mosaic_gpu" in lower_for_cuda(combine, *arrays)) == fits


@pytest.mark.usefixtures("without_annotation_checks")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": jnp.ones(3)}, r"rows is float32\[3\]; it must be a floating-point matrix \[M, N\]"),
        ({"index": jnp.ones((4, 2))}, r"index is float32\[4, 2\]; it must be an integer matrix \[T, K\]"),
        ({"weight": jnp.ones((4, 3))}, r"weight is float32\[4, 3\]; it must be floating-point \[T, K\] = \[4, 2\]"),
        ({"implementation": "mosaic_gpu"}, r"needs a Hopper GPU"),
    ],
)
def test_a_bad_argument_is_a_value_error_that_names_it(change, message):
    arguments = {"rows": jnp.ones((3, 128)), "index": jnp.zeros((4, 2), jnp.int32), "weight": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match=message):
        combine(**arguments | change)
