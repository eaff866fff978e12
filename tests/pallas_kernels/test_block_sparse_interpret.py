"""The Hopper kernels of block-sparse products in Pallas's interpreter of Mosaic GPU, and lowered for CUDA."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper
from pallas_kernels.block_sparse import BlockSparseMatrix, Topology, dds, dsd, expert_topology, mosaic_gpu, sdd

TOLERANCE = {jnp.bfloat16: 4e-3, jnp.float16: 5e-4, jnp.float32: 1e-6}
FLAGS = list(itertools.product([False, True], repeat=2))
MASKS = {
    "an empty row and an empty column": [[0, 1, 0], [0, 0, 0], [1, 1, 0]],
    "empty": [[0, 0], [0, 0]],
    "rows of many lengths": [[1, 1, 1], [0, 0, 1], [1, 0, 1]],
}
_WITH_RACE_DETECTION = ("experts", "an empty row and an empty column")


def static(out_dtype):
    return {"precision": None, "accumulator_dtype": jnp.dtype(jnp.float32), "out_dtype": jnp.dtype(out_dtype)}


def expand(topology):
    rows, columns = (size // topology.block for size in topology.shape)
    mask = np.zeros((rows + 1, columns + 1), bool)
    mask[topology.row_indices, topology.column_indices] = True
    return np.repeat(np.repeat(mask[:rows, :columns], topology.block, 0), topology.block, 1)


def make_topology(name, block=128):
    if name == "experts":  # a tile of two blocks of 128 (four of 64), one of one (two), an expert without rows
        return expert_topology(jnp.array([130, 0, 100]), [384, 128, 256], num_rows=256, block=block)
    mask = np.array(MASKS[name], bool)
    return Topology.from_mask(mask, num_blocks=int(mask.sum()) + 2, block=block)


def wide(array):
    return np.asarray(array, np.float32)


def transposed(array, flag):
    return array.T if flag else array


CASES = [
    ("experts", 128, True, True, jnp.bfloat16, jnp.float32),
    ("an empty row and an empty column", 128, False, False, jnp.bfloat16, jnp.bfloat16),
    ("rows of many lengths", 128, True, False, jnp.float16, jnp.float16),
    ("experts", 128, False, False, jnp.bfloat16, jnp.bfloat16),
    ("experts", 64, True, True, jnp.bfloat16, jnp.float32),
    ("rows of many lengths", 64, False, False, jnp.bfloat16, jnp.bfloat16),
    ("empty", 128, False, True, jnp.bfloat16, jnp.bfloat16),
]


@pytest.mark.sample(2)
@pytest.mark.parametrize(("name", "block", "transpose_lhs", "transpose_rhs", "dtype", "out_dtype"), CASES)
def test_the_kernel_of_sparse_results_matches_dense_products_and_clears_padding(
    name, block, transpose_lhs, transpose_rhs, dtype, out_dtype, interpret, normal, relative_error
):
    topology = make_topology(name, block)
    rows, columns = topology.shape
    lhs, rhs = normal(rows, 192, dtype=dtype), normal(192, columns, dtype=dtype)
    run = functools.partial(
        mosaic_gpu.sdd,
        transposed(lhs, transpose_lhs),
        transposed(rhs, transpose_rhs),
        topology,
        transpose_lhs=transpose_lhs,
        transpose_rhs=transpose_rhs,
        config=mosaic_gpu.Config(num_stages=3),
        **static(out_dtype),
    )
    values = interpret(run, detect_races=name in _WITH_RACE_DETECTION)
    assert values.dtype == out_dtype
    assert not np.any(values[int(topology.num_blocks) :])
    product = BlockSparseMatrix(jnp.asarray(values), topology).to_dense()
    assert relative_error(product, wide(lhs) @ wide(rhs) * expand(topology)) < TOLERANCE[out_dtype]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("name", "block", "transpose_sparse", "transpose_dense", "transpose_out", "dtype", "out_dtype"),
    [
        ("an empty row and an empty column", 128, False, False, False, jnp.bfloat16, jnp.bfloat16),
        ("an empty row and an empty column", 128, True, True, True, jnp.bfloat16, jnp.bfloat16),
        ("experts", 64, False, False, True, jnp.bfloat16, jnp.float32),
        ("rows of many lengths", 64, True, True, False, jnp.bfloat16, jnp.bfloat16),
        ("rows of many lengths", 128, False, True, True, jnp.float16, jnp.float32),
        ("rows of many lengths", 128, True, False, False, jnp.float16, jnp.float16),
        ("experts", 128, True, False, True, jnp.bfloat16, jnp.bfloat16),
        ("experts", 128, False, False, False, jnp.bfloat16, jnp.float32),
        ("empty", 128, False, True, False, jnp.bfloat16, jnp.bfloat16),
    ],
)
def test_the_kernel_of_sparse_operands_matches_dense_products_with_nan_in_padding(
    name, block, transpose_sparse, transpose_dense, transpose_out, dtype, out_dtype, interpret, normal, relative_error
):
    topology = make_topology(name, block)
    stored = BlockSparseMatrix.select(normal(*topology.shape, dtype=dtype), topology)
    sparse = wide(transposed(stored.to_dense(), transpose_sparse))
    width = 320 if block == 128 else 384  # more than a tile; of 64 rows, but not of both warpgroups' halves
    dense = normal(sparse.shape[1], width, dtype=dtype)
    run = functools.partial(
        mosaic_gpu.dsd,
        jnp.where(topology.is_block[:, None, None], stored.values, jnp.nan),
        transposed(dense, transpose_dense),
        topology,
        transpose_sparse=transpose_sparse,
        transpose_dense=transpose_dense,
        transpose_out=transpose_out,
        config=mosaic_gpu.Config(block_n=256, num_stages=3, band_rows=2),
        **static(out_dtype),
    )
    out = interpret(run, num_sms=3, detect_races=name in _WITH_RACE_DETECTION)
    assert out.dtype == out_dtype
    expected = transposed(sparse @ wide(dense), transpose_out)
    assert relative_error(out, expected) < TOLERANCE[out_dtype]
    assert not np.any(out[expected == 0])


def test_the_interpreter_sees_a_ring_that_is_filled_before_it_is_read(interpret, normal, monkeypatch):
    for name in ("wait_for_room", "drain", "release"):
        monkeypatch.setattr(hopper.Ring, name, lambda ring, step: None)
    topology = Topology.from_mask(np.ones((1, 4), bool))
    run = functools.partial(
        mosaic_gpu.dsd,
        normal(4, 128, 128, dtype=jnp.bfloat16),
        normal(512, 128, dtype=jnp.bfloat16),
        topology,
        transpose_sparse=False,
        transpose_dense=False,
        transpose_out=False,
        config=mosaic_gpu.Config(block_n=128, num_stages=3),
        **static(jnp.bfloat16),
    )
    with pytest.raises((AssertionError, RuntimeError)):
        interpret(run, detect_races=True)


# The shapes that MegaBlocks was measured on: rows, contracted, columns of an expert, experts.
SHAPES = [(65536, 512, 2048, 64), (32768, 768, 3072, 64), (8192, 1024, 4096, 64), (8192, 4096, 16384, 4)]


def expert_shapes(rows, columns, experts, block):
    make = functools.partial(expert_topology, hidden_sizes=[columns] * experts, num_rows=rows, block=block)
    return jax.eval_shape(make, jax.ShapeDtypeStruct((experts,), jnp.int32))


def lower(function, *arrays, h100):
    with h100():
        arrays = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays)
        return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("shape", "flags", "block"),
    [
        *((SHAPES[0], flags, 128) for flags in FLAGS),
        *zip(SHAPES[1:], FLAGS, (128, 64, 64), strict=False),
    ],
    ids=str,
)
def test_products_and_gradients_lower_to_the_kernels(shape, flags, block, h100):
    num_rows, contracted, columns, experts = shape
    topology = expert_shapes(num_rows, columns, experts, block)
    transpose_lhs, transpose_rhs = flags
    rows, all_columns = topology.shape
    dtype = jnp.bfloat16

    def array(*shape, flip=False):
        return jax.ShapeDtypeStruct(shape[::-1] if flip else shape, dtype)

    def of_dense(lhs, rhs, topology):
        def multiply(lhs, rhs):
            return sdd(lhs, rhs, topology, transpose_lhs=transpose_lhs, transpose_rhs=transpose_rhs).values

        values, pull_back = jax.vjp(multiply, lhs, rhs)
        return values, pull_back(values)

    lhs, rhs = array(rows, contracted, flip=transpose_lhs), array(contracted, all_columns, flip=transpose_rhs)
    assert lower(of_dense, lhs, rhs, topology, h100=h100).count("custom_call @mosaic_gpu") == 3

    def of_sparse(operation, values, dense, topology):
        def multiply(values, dense):
            sparse = BlockSparseMatrix(values, topology, transpose_lhs)
            if operation is dsd:
                return dsd(sparse, dense, transpose_rhs=transpose_rhs)
            return dds(dense, sparse, transpose_lhs=transpose_rhs)

        out, pull_back = jax.vjp(multiply, values, dense)
        return out, pull_back(out)

    values = array(topology.max_num_blocks, block, block)
    for operation in (dsd, dds):
        meets = topology.shape[(operation is dsd) != transpose_lhs]
        dense = array(meets, contracted) if operation is dsd else array(contracted, meets)
        if transpose_rhs:
            dense = array(*dense.shape[::-1])
        program = lower(functools.partial(of_sparse, operation), values, dense, topology, h100=h100)
        assert program.count("custom_call @mosaic_gpu") == 3


@pytest.mark.parametrize(
    ("block", "width", "dtype", "reason"),
    [
        (32, 128, jnp.bfloat16, "its blocks are of 32"),
        (64, 96, jnp.bfloat16, "a width of 96"),
        (128, 96, jnp.bfloat16, "a width of 96"),
        (128, 128, jnp.float32, "its operands are float32"),
    ],
)
def test_what_the_kernels_cannot_run_is_said_or_runs_elsewhere(block, width, dtype, reason, h100):
    topology = Topology.from_mask(np.ones((2, 2), bool), block=block)
    lhs, rhs = jnp.ones((2 * block, width), dtype), jnp.ones((width, 2 * block), dtype)
    assert "mosaic_gpu" not in lower(lambda lhs, rhs: sdd(lhs, rhs, topology).values, lhs, rhs, h100=h100)
    with pytest.raises(ValueError, match=reason):
        lower(lambda lhs, rhs: sdd(lhs, rhs, topology, implementation="mosaic_gpu").values, lhs, rhs, h100=h100)
