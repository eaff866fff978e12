"""Sums of rows that belong to the same place, deterministic, without atomics."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32


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
