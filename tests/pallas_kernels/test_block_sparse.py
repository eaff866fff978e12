"""Block-sparse products against dense NumPy ones: every transpose, gradients, any topology, NaN in padding."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_sparse
from pallas_kernels.block_sparse import BlockSparseMatrix, Topology, dds, dsd, sdd

# STK's: rows, contracted, columns, share of zero blocks.
SHAPES = [
    (128, 128, 128, 0.0),
    (256, 256, 256, 0.5),
    (2048, 1024, 512, 0.8),
    (512, 128, 128, 0.0),
    (128, 128, 512, 0.0),
    (1024, 512, 512, 0.0),
    (1024, 512, 512, 0.5),
    (1024, 512, 512, 0.75),
    (512, 512, 1024, 0.0),
    (512, 512, 1024, 0.5),
    (512, 512, 1024, 0.75),
    (1024, 1024, 1024, 0.0),
    (1024, 1024, 1024, 0.5),
    (1024, 1024, 1024, 0.75),
]
TOLERANCE = {jnp.bfloat16: 4e-3, jnp.float16: 5e-4, jnp.float32: 1e-6}
FLAGS = list(itertools.product([False, True], repeat=2))


@functools.cache
def random_mask(rows, columns, sparsity, seed=0):
    count = max(round((1 - sparsity) * rows * columns), 1)
    mask = np.zeros(rows * columns, bool)
    mask[np.random.default_rng([seed, rows, columns]).permutation(mask.size)[:count]] = True
    return mask.reshape(rows, columns)


def wide(array):
    return np.asarray(array, np.float32)


def expand(mask, block):
    return np.repeat(np.repeat(mask, block, 0), block, 1)


def make_topology(mask, padding=0):
    """In one compilation."""
    return jax.jit(functools.partial(Topology.from_mask, num_blocks=int(mask.sum()) + padding))(mask)


@jax.jit
def select_with_nan(dense, topology):
    values = BlockSparseMatrix.select(dense, topology).values
    return jnp.where(topology.is_block[:, None, None], values, jnp.nan)


@pytest.mark.sample(5)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize(("m", "k", "n", "sparsity"), SHAPES)
def test_sdd_and_its_gradients_match_masked_dense_products(m, k, n, sparsity, dtype, normal, relative_error):
    mask = random_mask(m // 128, n // 128, sparsity)
    lhs, rhs, grad = normal(m, k, dtype=dtype), normal(k, n, dtype=dtype, seed=1), normal(m, n, dtype=dtype, seed=2)
    topology = make_topology(mask)
    masked_grad = wide(grad) * expand(mask, 128)
    expected = wide(lhs) @ wide(rhs) * expand(mask, 128), masked_grad @ wide(rhs).T, wide(lhs).T @ masked_grad

    @functools.partial(jax.jit, static_argnums=(2, 3))
    def run(lhs, rhs, transpose_lhs, transpose_rhs):
        def multiply(lhs, rhs):
            options = {"transpose_lhs": transpose_lhs, "transpose_rhs": transpose_rhs}
            return sdd(lhs, rhs, topology, **options).values

        values, pull_back = jax.vjp(multiply, lhs, rhs)
        return BlockSparseMatrix(values, topology).to_dense(), *pull_back(
            BlockSparseMatrix.select(grad, topology).values
        )

    for transpose_lhs, transpose_rhs in FLAGS:
        out, lhs_grad, rhs_grad = run(
            lhs.T if transpose_lhs else lhs, rhs.T if transpose_rhs else rhs, transpose_lhs, transpose_rhs
        )
        results = out, lhs_grad.T if transpose_lhs else lhs_grad, rhs_grad.T if transpose_rhs else rhs_grad
        for result, value in zip(results, expected, strict=True):
            assert result.dtype == dtype
            assert relative_error(result, value) < TOLERANCE[dtype]


@pytest.mark.sample(9)
@pytest.mark.parametrize("operation", [dsd, dds])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize(("m", "k", "n", "sparsity"), SHAPES)
def test_sparse_operands_match_dense_ones_with_nan_in_padding(
    m, k, n, sparsity, dtype, operation, normal, relative_error
):
    """`m` and `k` are those of the sparse operand, which has 3 slots more than blocks."""
    mask = random_mask(m // 128, k // 128, sparsity)
    topology = make_topology(mask, padding=3)
    stored = normal(m, k, dtype=dtype)
    sparse_wide = wide(stored) * expand(mask, 128)
    values = select_with_nan(stored, topology)

    @functools.partial(jax.jit, static_argnums=(3, 4))
    def run(values, dense, grad, transpose_sparse, transpose_dense):
        def multiply(values, dense):
            sparse = BlockSparseMatrix(values, topology, transpose_sparse)
            if operation is dsd:
                return dsd(sparse, dense, transpose_rhs=transpose_dense)
            return dds(dense, sparse, transpose_lhs=transpose_dense)

        out, pull_back = jax.vjp(multiply, values, dense)
        values_grad, dense_grad = pull_back(grad)
        return out, BlockSparseMatrix(values_grad, topology).to_dense(), dense_grad

    for transpose_sparse, transpose_dense in FLAGS:
        matrix = sparse_wide.T if transpose_sparse else sparse_wide
        if operation is dsd:
            dense, grad = normal(matrix.shape[1], n, dtype=dtype), normal(matrix.shape[0], n, dtype=dtype, seed=1)
            expected = matrix @ wide(dense), wide(grad) @ wide(dense).T, matrix.T @ wide(grad)
        else:
            dense, grad = normal(n, matrix.shape[0], dtype=dtype), normal(n, matrix.shape[1], dtype=dtype, seed=1)
            expected = wide(dense) @ matrix, wide(dense).T @ wide(grad), wide(grad) @ matrix.T
        out, matrix_grad, dense_grad = run(
            values, dense.T if transpose_dense else dense, grad, transpose_sparse, transpose_dense
        )
        expected_grad = (expected[1].T if transpose_sparse else expected[1]) * expand(mask, 128)
        assert out.dtype == dtype
        assert relative_error(out, expected[0]) < TOLERANCE[dtype]
        assert relative_error(matrix_grad, expected_grad) < TOLERANCE[dtype]
        assert relative_error(dense_grad.T if transpose_dense else dense_grad, expected[2]) < TOLERANCE[dtype]


MASKS = {
    "empty": np.zeros((3, 2), bool),
    "one block": np.array([[0, 0, 0], [0, 0, 1]], bool),
    "an empty row and an empty column": np.array([[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1]], bool),
    "a full row and a full column": np.array([[0, 0, 1], [1, 1, 1], [0, 0, 1], [0, 0, 1]], bool),
    "full": np.ones((3, 5), bool),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_any_topology_is_traced_and_multiplied(mask, implementation, normal, relative_error):
    block, width = 8, 12
    rows, columns = (size * block for size in mask.shape)
    lhs, rhs, dense = normal(rows, width), normal(width, columns), normal(columns, width, seed=1)
    multiply = {"implementation": implementation}

    @jax.jit
    def run(mask, lhs, rhs, dense):
        topology = Topology.from_mask(mask, block=block, num_blocks=20)
        product = sdd(lhs, rhs, topology, **multiply)
        poisoned = product.with_values(jnp.where(topology.is_block[:, None, None], product.values, jnp.nan))
        return product, dsd(poisoned, dense, **multiply), dds(lhs.T, poisoned, **multiply)

    product, right, left = run(mask, lhs, rhs, dense)
    expected = wide(lhs) @ wide(rhs) * expand(mask, block)
    assert relative_error(product.to_dense(), expected) < 1e-6
    assert not jnp.any(product.values[int(mask.sum()) :])
    assert relative_error(right, expected @ wide(dense)) < 1e-6
    assert relative_error(left, wide(lhs).T @ expected) < 1e-6
    assert not np.any(right[~expand(mask, block).any(1)])


def test_a_product_takes_the_topology_of_a_transposed_matrix(normal, relative_error):
    mask = random_mask(3, 5, 0.5)
    like = BlockSparseMatrix.from_mask(mask, block=4).T
    lhs, rhs = normal(6, 20), normal(12, 6)
    product = sdd(lhs, rhs, like, transpose_lhs=True, transpose_rhs=True)
    assert product.shape == (20, 12)
    expected = (wide(lhs).T @ wide(rhs).T) * expand(mask.T, 4)
    assert relative_error(product.to_dense(), expected) < 1e-6


def test_float32_results_of_16_bit_operands_are_not_rounded(normal, relative_error):
    mask = random_mask(2, 3, 0.3)
    lhs, rhs = normal(16, 32, dtype=jnp.bfloat16), normal(32, 24, dtype=jnp.bfloat16)
    topology = Topology.from_mask(mask, block=8)
    product = sdd(lhs, rhs, topology, preferred_element_type=jnp.float32)
    assert product.dtype == jnp.float32
    assert relative_error(product.to_dense(), wide(lhs) @ wide(rhs) * expand(mask, 8)) < 1e-6


def test_second_derivatives_match_those_of_dense_products(normal, relative_error):
    mask = random_mask(2, 3, 0.5)
    lhs, rhs, dense = normal(8, 6), normal(6, 12), normal(12, 5)
    topology = Topology.from_mask(mask, block=4)

    def sparse_norm(lhs, rhs, dense):
        return jnp.sum(jnp.tanh(dsd(sdd(lhs, rhs, topology).map(jnp.tanh), dense)))

    def dense_norm(lhs, rhs, dense):
        return jnp.sum(jnp.tanh(jnp.where(expand(mask, 4), jnp.tanh(lhs @ rhs), 0) @ dense))

    def second(function):
        def squared_gradient(*arrays):
            return sum(jnp.sum(g**2) for g in jax.grad(function, (0, 1, 2))(*arrays))

        return jax.jit(jax.grad(squared_gradient, (0, 1, 2)))(lhs, rhs, dense)

    for actual, expected in zip(second(sparse_norm), second(dense_norm), strict=True):
        assert relative_error(actual, expected) < 1e-5


def test_a_batch_gives_the_products_of_its_elements(normal, relative_error):
    masks = np.stack([random_mask(3, 2, 0.5, seed) for seed in range(3)])
    lhs, rhs = normal(3, 12, 6), normal(6, 8)

    def multiply(mask, lhs):
        return dsd(sdd(lhs, rhs, Topology.from_mask(mask, block=4, num_blocks=4)), rhs, transpose_rhs=True)

    out = jax.jit(jax.vmap(multiply))(masks, lhs)
    for i in range(3):
        expected = (wide(lhs[i]) @ wide(rhs) * expand(masks[i], 4)) @ wide(rhs).T
        assert relative_error(out[i], expected) < 1e-6


def test_what_does_not_fit_is_said(without_annotation_checks):
    topology = Topology.from_mask(np.ones((2, 3), bool), block=4)
    matrix = BlockSparseMatrix(jnp.ones((6, 4, 4)), topology)
    with pytest.raises(ValueError, match=r"lhs is \[8, 5\] .* must exist and have the topology's shape, \(8, 12\)"):
        sdd(jnp.ones((8, 5)), jnp.ones((6, 12)), topology)
    with pytest.raises(ValueError, match="topology's shape"):
        sdd(jnp.ones((8, 5)), jnp.ones((5, 8)), topology)
    with pytest.raises(ValueError, match=r"sparse is \(8, 12\) and dense \[8, 3\]"):
        dsd(matrix, jnp.ones((8, 3)))
    with pytest.raises(ValueError, match=r"dense is \[3, 12\] .* and sparse \(8, 12\)"):
        dds(jnp.ones((3, 12)), matrix)
    dense_first: Any = jnp.ones((8, 12)), matrix
    mask: Any = np.ones((2, 3), bool)
    with pytest.raises(ValueError, match="sparse is a ArrayImpl; it must be a BlockSparseMatrix"):
        dsd(*dense_first)
    with pytest.raises(ValueError, match="sparse is a ArrayImpl; it must be a BlockSparseMatrix"):
        dds(*reversed(dense_first))
    with pytest.raises(ValueError, match="topology is a ndarray; it must be a Topology"):
        sdd(jnp.ones((8, 5)), jnp.ones((5, 12)), mask)
    with pytest.raises(ValueError, match="needs a Hopper GPU"):
        dsd(matrix, jnp.ones((12, 64)), implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="preferred_element_type is int32"):
        dsd(matrix, jnp.ones((12, 64)), preferred_element_type=jnp.int32)
    assert block_sparse.dsd(matrix, jnp.ones((12, 0))).shape == (8, 0)
