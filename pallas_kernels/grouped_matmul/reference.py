"""Grouped matmuls as plain array expressions: slow, memory-hungry, right for every dtype. The oracle of the kernels."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Integer

from pallas_kernels.rows import take_rows
from pallas_kernels.schedule import group_bounds


def _rows_of_groups(group_sizes: Integer[Array, " G"], num_rows: int) -> Bool[Array, "G M"]:
    start, end = group_bounds(group_sizes, num_rows)
    row = jnp.arange(num_rows)
    return (row >= start[:, None]) & (row < end[:, None])


def grouped_matmul(
    lhs: Float[Array, "_ K"],
    rhs: Float[Array, "_ _ _"],
    group_sizes: Integer[Array, " G"],
    lhs_index: Int32[Array, " M"] | None,
    rhs_index: Int32[Array, " G"] | None,
    *,
    transpose_rhs: bool,
    precision: lax.PrecisionLike,
    accumulator_dtype: jnp.dtype,
    out_dtype: jnp.dtype,
) -> Float[Array, "M N"]:
    """Computes every row times every group's matrix and selects the group's own."""
    lhs, rhs = take_rows(lhs, lhs_index), take_rows(rhs, rhs_index)
    member = _rows_of_groups(group_sizes, lhs.shape[0])
    products = jnp.einsum(
        "mk,gnk->gmn" if transpose_rhs else "mk,gkn->gmn",
        lhs,
        rhs,
        precision=precision,
        preferred_element_type=accumulator_dtype,
    )
    return jnp.where(member[:, :, None], products, 0).sum(axis=0).astype(out_dtype)


def grouped_weight_gradient(
    lhs: Float[Array, "_ K"],
    out_grad: Float[Array, "_ N"],
    group_sizes: Integer[Array, " G"],
    lhs_index: Int32[Array, " M"] | None,
    out_grad_index: Int32[Array, " M"] | None,
    *,
    precision: lax.PrecisionLike,
    accumulator_dtype: jnp.dtype,
    out_dtype: jnp.dtype,
) -> Float[Array, "G K N"]:
    """Computes one product for each group, of operands whose other rows are zero."""
    lhs, out_grad = take_rows(lhs, lhs_index), take_rows(out_grad, out_grad_index)
    member = _rows_of_groups(group_sizes, lhs.shape[0])[:, :, None]
    return jnp.einsum(
        "gmk,gmn->gkn",
        jnp.where(member, lhs, 0),
        jnp.where(member, out_grad, 0),
        precision=precision,
        preferred_element_type=accumulator_dtype,
    ).astype(out_dtype)
