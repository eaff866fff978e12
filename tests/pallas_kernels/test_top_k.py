"""Top-k: against sorting in NumPy, in the interpreter, and lowered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import top_k
from pallas_kernels.top_k import mosaic_gpu


def sort_rows(x, k):
    """Stable, descending, NaN first."""
    x = np.asarray(x, np.float64)
    is_nan = np.isnan(x)
    column = np.lexsort((-np.where(is_nan, 0, x), ~is_nan), axis=1)[:, :k]
    return np.take_along_axis(x, column, axis=1), column


@pytest.fixture
def rows_with_ties():
    """Small whole numbers, some of which are infinite or NaN of either sign."""

    def draw(rows, columns):
        rng = np.random.default_rng([rows, columns])
        x = rng.integers(-3, 4, (rows, columns)).astype(np.float32)
        special = np.array([np.nan, np.copysign(np.nan, -1), np.inf, -np.inf], np.float32)
        x = np.where(rng.random(x.shape) < 0.1, rng.choice(special, x.shape), x)
        x[0] = -np.inf
        return jnp.asarray(x + 0.0)

    return draw


@pytest.mark.parametrize(("rows", "columns", "k"), [(40, 64, 8), (1, 8, 2), (7, 5, 5), (0, 4, 2), (3, 4, 0)])
def test_entries_and_columns_are_those_of_a_stable_sort(rows, columns, k, rows_with_ties):
    x = rows_with_ties(max(rows, 1), columns)[:rows]
    for result, expected in zip(top_k(x, k), sort_rows(x, k), strict=True):
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(
    ("rows", "columns", "k"),
    [(16, 64, 8), (13, 32, 3), (1, 8, 2), (9, 40, 40 - 8), (8, 128, 1), (5, 3, 3)],
)
def test_the_kernel_finds_the_same(rows, columns, k, rows_with_ties, interpret):
    x = rows_with_ties(rows, columns)
    results = interpret(lambda: mosaic_gpu.top_k(x, k), detect_races=rows % mosaic_gpu.BLOCK_ROWS == 0)
    for result, expected in zip(results, sort_rows(x, k), strict=True):
        np.testing.assert_array_equal(result, expected)


def test_other_dtypes_keep_theirs():
    largest, column = top_k(jnp.array([[1, 3, 2]], jnp.bfloat16), 2)
    assert (largest.dtype, column.dtype) == (jnp.bfloat16, jnp.int32)
    with jax.enable_x64(True):
        assert top_k(jnp.array([[1.0, 2.0]]), 1)[0].dtype == jnp.float64


def test_the_gradient_goes_to_the_chosen_entries(normal):
    x, weight = normal(6, 9), normal(6, 3, seed=1)
    gradient = jax.grad(lambda x: jnp.sum(weight * top_k(x, 3)[0]))(x)
    expected = np.zeros((6, 9), np.float32)
    np.put_along_axis(expected, sort_rows(x, 3)[1], np.asarray(weight), axis=1)
    np.testing.assert_array_equal(gradient, expected)


def test_vmap_gives_what_each_element_gives(normal):
    x = normal(2, 5, 8)
    for results, expected in zip(jax.vmap(lambda x: top_k(x, 2))(x), top_k(x[1], 2), strict=True):
        np.testing.assert_array_equal(results[1], expected)


@pytest.mark.parametrize(("shape", "k"), [((32768, 64), 8), ((24576, 128), 8), ((1, 512), 10), ((4096, 8), 2)])
def test_the_kernel_is_chosen_and_lowers(shape, k, lower_for_cuda):
    assert "mosaic_gpu" in lower_for_cuda(lambda x: top_k(x, k), (shape, jnp.float32))
    gradient = jax.grad(lambda x: top_k(x, k)[0].sum())
    assert "mosaic_gpu" in lower_for_cuda(gradient, (shape, jnp.float32))


@pytest.mark.parametrize(("shape", "dtype", "k"), [((64, 64), jnp.bfloat16, 8), ((64, 2048), jnp.float32, 8)])
def test_what_the_kernel_does_not_take_runs_on_xla(shape, dtype, k, lower_for_cuda):
    assert "mosaic_gpu" not in lower_for_cuda(lambda x: top_k(x, k), (shape, dtype))


@pytest.mark.usefixtures("without_annotation_checks")
@pytest.mark.parametrize(
    ("x", "k", "implementation", "message"),
    [
        (jnp.ones(3), 1, None, r"x is float32\[3\]; it must be a floating-point matrix \[M, N\]"),
        (jnp.ones((2, 3), jnp.int32), 1, None, r"x is int32\[2, 3\]"),
        (jnp.ones((2, 3)), 4, None, r"k is 4; it must be between 0 and the number of columns, 3"),
        (jnp.ones((2, 3)), 1, "mosaic_gpu", r"needs a Hopper GPU"),
    ],
)
def test_a_bad_argument_is_a_value_error_that_names_it(x, k, implementation, message):
    with pytest.raises(ValueError, match=message):
        top_k(x, k, implementation=implementation)
