"""Products of block-sparse matrices for any platform: a loop over the blocks that there are, one dense matmul each.

Time follows the number of real blocks, and nothing larger than the operands and the result is made.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.block_sparse.topology import Topology


def sdd(
    lhs: Float[Array, "_ _"],
    rhs: Float[Array, "_ _"],
    topology: Topology,
    *,
    transpose_lhs: bool,
    transpose_rhs: bool,
    precision: lax.PrecisionLike,
    accumulator_dtype: jnp.dtype,
    out_dtype: jnp.dtype,
) -> Float[Array, "B block block"]:
    """Multiplies for each block its rows of `lhs` with its columns of `rhs`."""
    block = topology.block

    def multiply_block(b, values):
        rows = lax.dynamic_slice_in_dim(lhs, topology.row_indices[b] * block, block, axis=int(transpose_lhs))
        columns = lax.dynamic_slice_in_dim(rhs, topology.column_indices[b] * block, block, axis=int(not transpose_rhs))
        product = lax.dot_general(
            rows,
            columns,
            (((int(not transpose_lhs),), (int(transpose_rhs),)), ((), ())),
            precision=precision,
            preferred_element_type=accumulator_dtype,
        )
        return lax.dynamic_update_index_in_dim(values, product.astype(out_dtype), b, axis=0)

    values = jnp.zeros((topology.max_num_blocks, block, block), out_dtype)
    return lax.fori_loop(0, topology.num_blocks, multiply_block, values)


def dsd(
    values: Float[Array, "B block block"],
    dense: Float[Array, "_ _"],
    topology: Topology,
    *,
    transpose_sparse: bool,
    transpose_dense: bool,
    transpose_out: bool,
    precision: lax.PrecisionLike,
    accumulator_dtype: jnp.dtype,
    out_dtype: jnp.dtype,
) -> Float[Array, "_ _"]:
    """Sums over the blocks of each block row their products with the rows of `dense` that they meet."""
    block = topology.block
    lines = topology.column_lines if transpose_sparse else topology.row_lines
    width = dense.shape[0 if transpose_dense else 1]

    def multiply_line(bounds: tuple[Array, Array]) -> Float[Array, "_ _"]:
        def add_block(i, total):
            number, place = lines.blocks[i]
            rows = lax.dynamic_slice_in_dim(dense, place * block, block, axis=int(transpose_dense))
            return total + lax.dot_general(
                values[number],
                rows,
                (((0 if transpose_sparse else 1,), (int(transpose_dense),)), ((), ())),
                precision=precision,
                preferred_element_type=accumulator_dtype,
            )

        total = lax.fori_loop(*bounds, add_block, jnp.zeros((block, width), accumulator_dtype))
        return total.astype(out_dtype)

    offsets = topology.column_offsets if transpose_sparse else topology.row_offsets
    out = jax.lax.map(multiply_line, (offsets[:-1], offsets[1:])).reshape(-1, width)
    return out.T if transpose_out else out
