"""Combine and group sums: the reductions of rows around grouped matmuls, deterministic, without atomics."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

import pallas_kernels
from jmoe.dispatch import Dispatch
from pallas_kernels import make_block_schedule
from pallas_kernels.rows import sum_rows


def combine(
    rows: Float[Array, "R D"],
    weight: Float[Array, "*_"] | None,
    dispatch: Dispatch,
    num_tokens: int,
    implementation: pallas_kernels.Implementation | None = None,
) -> Float[Array, "T D"]:
    """Sums the rows of each token, weighted: `y[t] = sum_k weight[t, k] * rows[position[t, k]]`.

    The sum is taken in float32 (float64 for float64 rows), a token's assignments in their order (from
    `Assignments`: in the order of their experts). Absent ones add nothing, even where their row or weight is
    NaN.

    Args:
        rows: [R, D], sorted by expert.
        weight: [T, K] or [R], by assignment; None for a plain sum.
        dispatch: where the rows are.
        num_tokens: T.
        implementation: that of the matmuls around. The combine's Hopper kernel takes fewer widths than theirs, so
            "mosaic_gpu" runs it where it can run; `Assignments` are combined by XLA.

    Returns:
        [T, D] in the dtype of `rows`.
    """
    if dispatch.position.ndim == 1:
        return _combine_flat(rows, weight, dispatch, num_tokens).astype(rows.dtype)
    implementation = None if implementation == "mosaic_gpu" else implementation
    return pallas_kernels.combine(
        rows, dispatch.position, weight, dispatch.group_sizes.sum(), implementation=implementation
    )


def _combine_flat(rows, weight, dispatch, num_tokens):
    in_group = jnp.arange(dispatch.token_index.size, dtype=jnp.int32) < dispatch.group_sizes.sum()
    token = jnp.where(in_group, dispatch.token_index, num_tokens)
    return sum_rows(rows, token, num_tokens, None if weight is None else dispatch.to_rows(weight))


def group_sum(rows: Float[Array, "R N"], group_sizes: Int32[Array, " E"]) -> Float[Array, "E N"]:
    """Sums the rows of each group, in float32 or better: the gradient of a bias.

    Rows past the last group never enter, even where they hold NaN.
    """
    dtype = jnp.promote_types(rows.dtype, jnp.float32)
    if not rows.shape[0]:
        return jnp.zeros((group_sizes.size, rows.shape[1]), dtype)
    block_rows = 128
    schedule = make_block_schedule(group_sizes, num_rows=rows.shape[0], block_rows=block_rows)
    offset = jnp.arange(block_rows, dtype=jnp.int32)
    block = rows.at[schedule.start[:, None] + offset].get(mode="clip").astype(dtype)
    in_block = offset < schedule.size[:, None]
    block_sum = jnp.where(in_block[:, :, None], block, 0).sum(axis=1)
    # Padding blocks sum to zero, whatever group they name. A selection, because NaN times zero would reach
    # all groups.
    in_group = schedule.group == jnp.arange(group_sizes.size, dtype=jnp.int32)[:, None]
    return jnp.where(in_group[:, :, None], block_sum, 0).sum(axis=1)
