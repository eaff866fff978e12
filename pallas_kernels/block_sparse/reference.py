"""Products of block-sparse matrices as dense ones: slow, memory-hungry, right for every dtype. The kernels' oracle."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.block_sparse.matrix import BlockSparseMatrix
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
    """Computes the whole product and selects the topology's blocks."""
    lhs, rhs = (lhs.T if transpose_lhs else lhs), (rhs.T if transpose_rhs else rhs)
    product = jnp.dot(lhs, rhs, precision=precision, preferred_element_type=accumulator_dtype)
    return BlockSparseMatrix.select(product.astype(out_dtype), topology).values


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
    """Multiplies the matrix with its zeros."""
    sparse = BlockSparseMatrix(values, topology, transpose_sparse).to_dense()
    dense = dense.T if transpose_dense else dense
    out = jnp.dot(sparse, dense, precision=precision, preferred_element_type=accumulator_dtype).astype(out_dtype)
    return out.T if transpose_out else out
