"""Rows copied to several places: the meaning, the derivative, the Hopper kernel in the interpreter and lowered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gather_rows
from pallas_kernels.gather_rows import mosaic_gpu


@pytest.fixture
def row_map():
    """A random map of n rows to c places each: `index` and `position`."""

    def draw(n, c, seed=0):
        position = np.random.default_rng(seed).permutation(n * c).astype(np.int32)
        index = np.empty_like(position)
        index[position] = np.arange(n * c) // max(c, 1)
        return jnp.asarray(index), jnp.asarray(position.reshape(n, c))

    return draw


@pytest.mark.parametrize("implementation", [None, "xla", "reference"])
@pytest.mark.parametrize(("n", "c"), [(7, 3), (1, 1), (5, 1), (0, 2), (4, 0)])
def test_each_row_is_in_each_of_its_places(n, c, implementation, normal, row_map):
    x, (index, position) = normal(n, 6), row_map(n, c)
    out = np.asarray(gather_rows(x, index, position, implementation=implementation))
    expected = np.zeros((n * c, 6), np.float32)
    for row in range(n):
        for place in range(c):
            expected[position[row, place]] = x[row]
    np.testing.assert_array_equal(out, expected)


def test_the_gradient_of_a_row_sums_its_copies_in_float32(normal, row_map, relative_error):
    x, (index, position) = normal(9, 4, dtype=jnp.bfloat16), row_map(9, 5)
    out_grad = normal(45, 4, dtype=jnp.bfloat16, seed=1)
    _, pull_back = jax.vjp(lambda x: gather_rows(x, index, position), x)
    (gradient,) = pull_back(out_grad)
    expected = np.zeros((9, 4))
    np.add.at(expected, np.asarray(index), np.asarray(out_grad, np.float64))
    assert gradient.dtype == jnp.bfloat16
    assert relative_error(gradient, expected) < 4e-3


def test_vmap_gives_each_element_its_own_map(normal, row_map):
    x = normal(2, 6, 3)
    maps = [row_map(6, 2, seed) for seed in range(2)]
    index, position = (jnp.stack(arrays) for arrays in zip(*maps, strict=True))
    out = jax.vmap(gather_rows)(x, index, position)
    for i in range(2):
        np.testing.assert_array_equal(out[i], gather_rows(x[i], *maps[i]))


@pytest.mark.parametrize(
    ("n", "c", "d", "config"),
    [
        (37, 3, 192, {}),
        (50, 2, 128, {"slot_bytes": 1024, "num_slots": 2}),  # several steps of each block, the last one in part
        (1, 4, 64, {}),
        (9, 17, 64, {"slot_bytes": 256, "num_slots": 3}),  # more copies than are unrolled
        (5, 2, 320, {"slot_bytes": 1}),  # a row is wider than a slot: five parts
        (3, 3, 768, {"slot_bytes": 1024}),  # two chunks would fit, and three are the row: three parts
    ],
)
def test_the_kernel_copies_every_row_and_nothing_races(n, c, d, config, normal, row_map, interpret):
    x, (index, position) = normal(n, d, dtype=jnp.bfloat16), row_map(n, c)
    call = functools.partial(mosaic_gpu.gather_rows, x, index, position, config=mosaic_gpu.Config(**config))
    np.testing.assert_array_equal(interpret(call, detect_races=True), np.asarray(x[index]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("n", "c", "d"),
    [
        (32768, 8, 2048),
        (8192, 2, 4096),
        (24576, 8, 1536),
        (7, 1, 64),
        (1, 3, 192),
        (100, 20, 14336),
        (2, 2, 64 * 257),
        (2, 2, 131072),
    ],
)
def test_the_kernel_is_chosen_and_lowers_for_every_shape(n, c, d, dtype, lower_for_cuda):
    arrays = ((n, d), dtype), ((n * c,), jnp.int32), ((n, c), jnp.int32)
    assert "mosaic_gpu" in lower_for_cuda(gather_rows, *arrays)


@pytest.mark.usefixtures("without_annotation_checks")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones(6)}, r"x is float32\[6\]; it must be a floating-point matrix \[N, D\]"),
        ({"x": jnp.ones((6, 2), jnp.int32)}, r"x is int32\[6, 2\]"),
        ({"position": jnp.zeros((5, 2), jnp.int32)}, r"position is int32\[5, 2\]; .* N = 6"),
        ({"position": jnp.zeros((6, 2))}, r"position is float32\[6, 2\]"),
        ({"index": jnp.zeros(6, jnp.int32)}, r"index is int32\[6\]; it must be integers \[N \* C\] = \[12\]"),
        ({"implementation": "cuda"}, r"implementation is 'cuda'"),
        ({"implementation": "mosaic_gpu"}, r"needs a Hopper GPU"),
    ],
)
def test_a_bad_argument_is_a_value_error_that_names_it(change, message, row_map):
    index, position = row_map(6, 2)
    arguments = {"x": jnp.ones((6, 2)), "index": index, "position": position} | change
    with pytest.raises(ValueError, match=message):
        gather_rows(**arguments)
