"""Weighted sums of chosen rows as plain array expressions: also their portable form."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def combine(
    rows: Float[Array, "M N"],
    index: Int32[Array, "T K"],
    weight: Float[Array, "T K"] | None,
    num_rows: Int32[Array, ""],
) -> Float[Array, "T N"]:
    """Adds the terms one after the other, which compiles to one pass over the rows and makes no [T, K, N]."""
    present = (index >= 0) & (index < jnp.minimum(num_rows, rows.shape[0]))
    total = jnp.zeros((index.shape[0], rows.shape[1]), jnp.promote_types(rows.dtype, jnp.float32))
    for k in range(index.shape[1]):
        term = rows.at[index[:, k]].get(mode="clip").astype(total.dtype)
        if weight is not None:
            term = weight[:, k, None].astype(total.dtype) * term
        total += jnp.where(present[:, k, None], term, 0)
    return total.astype(rows.dtype)
