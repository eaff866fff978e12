"""Rows gathered by XLA, and their way back: sums without atomics, deterministic."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Integer, Shaped


def clip_index(index: Integer[Array, " M"], matrix: Shaped[Array, "*T"]) -> Integer[Array, " M"]:
    """Clips numbers to those of the rows that there are."""
    return jnp.clip(index, 0, max(matrix.shape[0] - 1, 0))


def take_rows(matrix: Shaped[Array, "*T"], index: Integer[Array, " M"] | None) -> Shaped[Array, "*_"]:
    """Copies rows by their clipped numbers; without any, the rows are those of the matrix."""
    return matrix if index is None else matrix[clip_index(index, matrix)]


def sum_rows(
    rows: Float[Array, "M N"],
    index: Int32[Array, " M"],
    num_sums: int,
    weight: Float[Array, " M"] | None = None,
) -> Float[Array, "num_sums N"]:
    """Sums the rows of each index: `out[n] = sum of weight[m] * rows[m] over all m with index[m] == n`.

    Adds the first rows of all sums, then the second ones, for as long as any sum has one more.

    Args:
        rows: [M, N].
        index: int32[M]; rows with one outside [0, num_sums) are left out, even where they hold NaN.
        num_sums: the rows of the result.
        weight: [M], or None for 1 everywhere.

    Returns:
        [num_sums, N] in float32 (float64 for float64), each sum taken in the order of its rows.
    """
    inside = (index >= 0) & (index < num_sums)
    index = jnp.where(inside, index, num_sums)
    _, by_sum = lax.sort((index, jnp.arange(index.size, dtype=jnp.int32)), num_keys=1, is_stable=True)
    count = jnp.zeros(num_sums, jnp.int32).at[index].add(1, mode="drop")
    start = jnp.cumsum(count) - count

    def add_next(k, total):
        row = by_sum.at[start + k].get(mode="clip")
        term = rows[row].astype(total.dtype)
        if weight is not None:
            term = weight[row][:, None] * term
        return total + jnp.where((k < count)[:, None], term, 0)

    total = jnp.zeros((num_sums, rows.shape[1]), jnp.promote_types(rows.dtype, jnp.float32))
    return lax.fori_loop(0, count.max(initial=0), add_next, total)
