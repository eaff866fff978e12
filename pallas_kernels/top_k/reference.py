"""The k largest entries of each row as plain array expressions: also their portable form."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32


def top_k(x: Float[Array, "M N"], k: int) -> tuple[Float[Array, "M k"], Int32[Array, "M k"]]:
    """Sorts by XLA, which takes NaN for the largest, but one whose sign is set for the smallest."""
    largest, column = lax.top_k(jnp.where(jnp.isnan(x), jnp.nan, x), k)
    return largest, column
