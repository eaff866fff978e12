"""The up-projection as a grouped matmul and an activation: for any platform, and the oracle of the kernel."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.implementations import Implementation


def up_projection(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "G K H"],
    group_sizes: Integer[Array, " G"],
    activation: Callable[..., Array],
    *,
    num_parts: int,
    implementation: Implementation | None,
) -> tuple[Float[Array, "M H"], Float[Array, "M F"]]:
    """Computes one after the other. The activation sees the pre-activations as they are stored."""
    h = grouped_matmul(lhs, rhs, group_sizes, implementation=implementation)
    parts = jnp.split(h.astype(jnp.promote_types(h.dtype, jnp.float32)), num_parts, axis=1)
    return h, activation(*parts).astype(h.dtype)
