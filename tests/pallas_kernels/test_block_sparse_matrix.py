"""Topologies and block-sparse matrices: their metadata, conversions and reductions, against NumPy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_sparse import BlockSparseMatrix, Topology, expert_topology

MASK = np.array([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 1]], bool)


def check_metadata(topology, mask):
    """Compares every array of a topology with what its mask says."""
    rows, columns = np.nonzero(mask)
    n = rows.size
    assert topology.num_blocks == n
    np.testing.assert_array_equal(topology.row_indices[:n], rows)
    np.testing.assert_array_equal(topology.column_indices[:n], columns)
    assert np.all(topology.row_indices[n:] == mask.shape[0])
    assert np.all(topology.column_indices[n:] == mask.shape[1])
    np.testing.assert_array_equal(topology.row_offsets, np.cumsum([0, *mask.sum(1)]))
    np.testing.assert_array_equal(topology.column_offsets, np.cumsum([0, *mask.sum(0)]))
    order = np.lexsort((rows, columns))
    np.testing.assert_array_equal(topology.transposed_order[:n], order)
    assert sorted(topology.transposed_order.tolist()) == list(range(topology.max_num_blocks))
    np.testing.assert_array_equal(topology.row_lines.blocks[:n], np.stack([np.arange(n), columns], 1))
    np.testing.assert_array_equal(topology.column_lines.blocks[:n], np.stack([order, rows[order]], 1))
    for lines, counts in (topology.row_lines, mask.sum(1)), (topology.column_lines, mask.sum(0)):
        line, begin, end = np.asarray(lines.bounds).T
        np.testing.assert_array_equal(line, np.argsort(-counts, stable=True))
        np.testing.assert_array_equal(end - begin, counts[line])
        np.testing.assert_array_equal(begin, np.cumsum([0, *counts])[line])
    covered = []
    for number, row, column, size in np.asarray(topology.tiles)[: int(topology.num_tiles[0])]:
        assert 0 < size <= topology.blocks_per_tile
        for offset in range(size):
            assert (rows[number + offset], columns[number + offset]) == (row, column + offset)
            covered.append(number + offset)
    assert sorted(covered) == list(range(n))


@pytest.mark.sample(4)
@pytest.mark.parametrize("block", [64, 128, 512])
@pytest.mark.parametrize(
    "mask",
    [MASK, MASK.T, np.zeros((2, 3), bool), np.ones((20, 3), bool), np.random.default_rng(0).random((19, 17)) < 0.3],
    ids=["small", "transposed", "empty", "full", "random"],
)
def test_every_number_of_a_topology_is_what_its_mask_says(mask, block):
    check_metadata(Topology.from_mask(mask, block=block), mask)
    check_metadata(
        jax.jit(functools.partial(Topology.from_mask, block=block, num_blocks=int(mask.sum()) + 7))(mask), mask
    )


def test_topologies_come_from_indices_in_any_order_with_padding_anywhere():
    rows, columns = np.nonzero(MASK)
    order = np.random.default_rng(0).permutation(7)
    rows, columns = np.append(rows, [-1, 2])[order], np.append(columns, [1, 5])[order]

    @jax.jit
    def make(rows, columns):
        return Topology.from_indices(rows, columns, (12, 20), block=4)

    check_metadata(make(rows, columns), MASK)


def test_blocks_past_the_bound_are_left_out():
    kept = MASK.copy()
    kept[2, 4] = False
    check_metadata(jax.jit(lambda mask: Topology.from_mask(mask, num_blocks=4))(MASK), kept)


@pytest.mark.parametrize(
    ("sizes", "hidden", "num_rows"),
    [
        ([3, 0, 9, 4], [8, 4, 12, 4], 16),
        ([0, 0], [4, 4], 5),
        ([0, 17], [4, 8], 17),
        ([1, 1, 1], [4, 16, 8], 3),
        ([8], [8], 8),
        ([30, 0, 1], [20, 4, 4], 31),
        ([5, -3, 50], [4, 4, 4], 20),  # clipped to 5, 0, 15
        ([0], [8], 0),
        ([], [4], 3),
    ],
)
def test_expert_topologies_are_block_diagonal_for_any_sizes(sizes, hidden, num_rows):
    block = 4
    make = functools.partial(expert_topology, hidden_sizes=hidden, num_rows=num_rows, block=block)
    if not sizes:
        with pytest.raises(ValueError, match="as many of each"):
            make(jnp.zeros(0, jnp.int32))
        return
    topology = jax.jit(make)(jnp.array(sizes))
    mask = np.zeros((topology.shape[0] // block, sum(hidden) // block), bool)
    row = column = taken = 0
    for size, width in zip(sizes, hidden, strict=True):
        rows = min(max(size, 0), num_rows - taken)
        taken += rows
        height = -(-rows // block)
        mask[row : row + height, column : column + width // block] = True
        row, column = row + height, column + width // block
    check_metadata(topology, mask)


@pytest.mark.parametrize("seed", range(5))
def test_no_group_sizes_need_more_slots_than_an_expert_topology_has(seed):
    rng = np.random.default_rng(seed)
    hidden = (4 * rng.integers(1, 6, 5)).tolist()
    for _ in range(20):
        sizes = rng.multinomial(rng.integers(0, 60), rng.dirichlet(np.full(5, 0.3)))
        topology = expert_topology(jnp.array(sizes), hidden, num_rows=60, block=4)
        heights = -(-sizes // 4)
        assert heights.sum() * 4 <= topology.shape[0]
        assert topology.num_blocks == (heights * np.array(hidden) // 4).sum() <= topology.max_num_blocks


def test_matrices_come_from_dense_ones_and_go_back(normal):
    dense = np.where(np.repeat(np.repeat(MASK, 4, 0), 4, 1), normal(12, 20), 0)
    matrix = BlockSparseMatrix.from_dense(jnp.asarray(dense), block=4)
    assert matrix.values.shape == (5, 4, 4)
    traced = jax.jit(lambda x: BlockSparseMatrix.from_dense(x, block=4, num_blocks=9))(dense)
    assert traced.values.shape == (9, 4, 4)
    for m in (matrix, traced, traced.with_values(traced.values.at[5:].set(jnp.nan))):
        np.testing.assert_array_equal(m.to_dense(), dense)
        np.testing.assert_array_equal(m.T.to_dense(), dense.T)
        assert m == m.T.T
        assert (m.shape, m.T.shape) == ((12, 20), (20, 12))
        np.testing.assert_array_equal(m.T.row_indices, m.column_indices)
        np.testing.assert_allclose(m.sum(), dense.sum(), rtol=1e-5)
        for axis in (0, 1):
            np.testing.assert_allclose(jax.jit(m.sum, static_argnums=0)(axis), dense.sum(axis), rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(m.T.sum(axis), dense.T.sum(axis), rtol=1e-5, atol=1e-5)


def test_maps_apply_to_stored_blocks_only(normal):
    matrix = BlockSparseMatrix.select(normal(12, 20), Topology.from_mask(MASK, block=4, num_blocks=6))
    inside = np.repeat(np.repeat(MASK, 4, 0), 4, 1)
    dense = np.asarray(matrix.to_dense())
    np.testing.assert_allclose(matrix.map(jnp.exp).to_dense(), np.where(inside, np.exp(dense), 0), rtol=1e-6)
    np.testing.assert_allclose(matrix.T.map(jnp.multiply, matrix.T).to_dense(), (dense**2).T, rtol=1e-6)
    elsewhere = BlockSparseMatrix.select(normal(12, 20), Topology.from_mask(~MASK, block=4, num_blocks=10))
    for other in (matrix.T, elsewhere, BlockSparseMatrix.from_mask(MASK[:, ::-1].copy(), block=4, num_blocks=6)):
        with pytest.raises(ValueError, match="of the same"):
            matrix.map(jnp.add, other)


def test_the_matrix_of_a_mask_is_ones():
    matrix = jax.jit(lambda mask: BlockSparseMatrix.from_mask(mask, block=2, num_blocks=8, dtype=jnp.bfloat16))(MASK)
    np.testing.assert_array_equal(matrix.to_dense(), np.repeat(np.repeat(MASK, 2, 0), 2, 1))
    assert matrix.sum() == 20


@pytest.mark.parametrize(("sparsity", "blocks"), [(0.0, 12), (0.5, 6), (0.99, 1), (1.0, 1)])
def test_random_matrices_have_the_share_of_blocks_asked_for(sparsity, blocks):
    draw = jax.jit(lambda key: BlockSparseMatrix.random(key, (12, 16), sparsity=sparsity, block=4))
    matrices = [draw(jax.random.key(seed)) for seed in range(3)]
    for matrix in matrices:
        assert matrix.topology.num_blocks == matrix.values.shape[0] == blocks
        assert 0.7 < float(jnp.std(matrix.values)) < 1.4
    if 1 < blocks < 12:
        assert len({tuple(matrix.row_indices.tolist() + matrix.column_indices.tolist()) for matrix in matrices}) > 1


def test_gradients_reach_values_and_not_padding(normal):
    matrix = BlockSparseMatrix.select(normal(12, 20), Topology.from_mask(MASK, block=4, num_blocks=7))
    gradient = jax.grad(lambda values: jnp.sum(matrix.with_values(values).to_dense() ** 2) / 2)(matrix.values)
    np.testing.assert_allclose(gradient, matrix.values)
    np.testing.assert_array_equal(jax.grad(lambda values: matrix.with_values(values).sum())(matrix.values)[5:], 0)


def test_what_cannot_be_is_said(without_annotation_checks):
    with pytest.raises(ValueError, match="mask is traced and num_blocks is None"):
        jax.jit(lambda mask: Topology.from_mask(mask))(MASK)
    for num_blocks in (0, 4):
        with pytest.raises(ValueError, match=f"num_blocks is {num_blocks}; it must be at least 5"):
            Topology.from_mask(MASK, num_blocks=num_blocks)
    index = np.array([0, 2, 0])
    with pytest.raises(ValueError, match=r"the block \(0, 1\) twice"):
        Topology.from_indices(index, np.array([1, 1, 1]), (12, 20), block=4)
    with pytest.raises(ValueError, match=r"row_indices is int\d+\[3\] and column_indices int\d+\[2\]"):
        Topology.from_indices(index, index[:2], (12, 20), block=4)
    with pytest.raises(ValueError, match=r"shape is \(12, 21\)"):
        Topology.from_indices(index, index, (12, 21), block=4)
    no_sequence: Any = 64
    with pytest.raises(ValueError, match="hidden_sizes is 64; it must be a sequence of static integers"):
        expert_topology(jnp.array([1, 2]), no_sequence, num_rows=3)
    with pytest.raises(ValueError, match="block is 0"):
        Topology.from_mask(MASK, block=0)
    with pytest.raises(ValueError, match=r"must be a matrix of blocks of 4"):
        BlockSparseMatrix.from_dense(jnp.ones((6, 4)), block=4)
    with pytest.raises(ValueError, match="topology's shape"):
        BlockSparseMatrix.select(jnp.ones((6, 4)), Topology.from_mask(MASK))
    with pytest.raises(ValueError, match=r"shape is \(6, 4\)"):
        BlockSparseMatrix.random(jax.random.key(0), (6, 4), sparsity=0.5, block=4)
    with pytest.raises(ValueError, match=r"sparsity is 1\.5"):
        BlockSparseMatrix.random(jax.random.key(0), (4, 4), sparsity=1.5, block=4)
    with pytest.raises(ValueError, match="hidden_sizes has 6"):
        expert_topology(jnp.array([1, 2]), [4, 6], num_rows=3, block=4)
    with pytest.raises(ValueError, match="values are"):
        BlockSparseMatrix.from_mask(MASK, block=4).with_values(jnp.ones((1, 4, 4)))
