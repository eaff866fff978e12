"""Grouped matmuls for any platform: a loop over the blocks that have rows, one dense matmul each.

Time follows the number of real blocks, and nothing larger than the operands, the result and one block is made:
no [G, M, K], [M, K, N] or [B, K, N] array.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Integer

from pallas_kernels.rows import clip_index, take_rows
from pallas_kernels.schedule import group_bounds, make_block_schedule


def _block_rows(num_rows: int, num_groups: int) -> int:
    # A block is multiplied whole, so the last one of each group wastes half a block on average: an eighth of the
    # work when a group is four blocks. Below 32 rows the loop's own cost outweighs that; above 512 nothing is gained.
    quarter_group = max(1, num_rows // (4 * num_groups))
    return min(num_rows, max(32, min(512, 1 << (quarter_group.bit_length() - 1))))


def _window(
    start: Int32[Array, ""], size: Int32[Array, ""], height: int, num_rows: int
) -> tuple[Array, Bool[Array, "_ 1"]]:
    """The first of `height` rows that hold a block and lie inside the array, and which of them are the block's."""
    first = jnp.minimum(start, num_rows - height)
    row = first + jnp.arange(height)
    return first, ((row >= start) & (row < start + size))[:, None]


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
    """Multiplies each block of rows with its group's matrix."""
    lhs = take_rows(lhs, lhs_index)
    num_rows = lhs.shape[0]
    height = _block_rows(num_rows, group_sizes.size)
    schedule = make_block_schedule(group_sizes, num_rows=num_rows, block_rows=height)
    matrix = schedule.group if rhs_index is None else take_rows(clip_index(rhs_index, rhs), schedule.group)
    contract_rhs = 1 if transpose_rhs else 0

    def multiply_block(b, out):
        first, member = _window(schedule.start[b], schedule.size[b], height, num_rows)
        product = lax.dot_general(
            lax.dynamic_slice_in_dim(lhs, first, height),
            lax.dynamic_index_in_dim(rhs, matrix[b], keepdims=False),
            (((1,), (contract_rhs,)), ((), ())),
            precision=precision,
            preferred_element_type=accumulator_dtype,
        ).astype(out_dtype)
        others = lax.dynamic_slice_in_dim(out, first, height)
        return lax.dynamic_update_slice_in_dim(out, jnp.where(member, product, others), first, axis=0)

    num_columns = rhs.shape[1 if transpose_rhs else 2]
    out = jnp.zeros((num_rows, num_columns), out_dtype)
    return lax.fori_loop(0, schedule.num_used, multiply_block, out)


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
    """Sums over the blocks of each group the products of their rows."""
    lhs, out_grad = take_rows(lhs, lhs_index), take_rows(out_grad, out_grad_index)
    num_rows = lhs.shape[0]
    height = _block_rows(num_rows, group_sizes.size)

    def gradient_of_group(bounds: tuple[Array, Array]) -> Float[Array, "K N"]:
        group_start, group_end = bounds

        def add_block(b, total):
            start = group_start + b * height
            first, member = _window(start, jnp.minimum(height, group_end - start), height, num_rows)
            return total + lax.dot_general(
                jnp.where(member, lax.dynamic_slice_in_dim(lhs, first, height), 0),
                jnp.where(member, lax.dynamic_slice_in_dim(out_grad, first, height), 0),
                (((0,), (0,)), ((), ())),
                precision=precision,
                preferred_element_type=accumulator_dtype,
            )

        total = jnp.zeros((lhs.shape[1], out_grad.shape[1]), accumulator_dtype)
        num_blocks = -(-(group_end - group_start) // height)
        return lax.fori_loop(0, num_blocks, add_block, total).astype(out_dtype)

    return jax.lax.map(gradient_of_group, group_bounds(group_sizes, num_rows))
