"""Experts without parameters, which a router may choose besides the E that compute."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jmoe.routing import Routing


def split_zero_experts(
    routing: Routing, num_experts: int, *, num_identity: int = 0
) -> tuple[Routing, Float[Array, " T"]]:
    """Splits the assignments to experts without parameters from those to the E experts that compute.

    A router with logits for E experts, then `num_identity` identity experts, then any number of zero experts,
    spends less on tokens that need less: an identity expert returns its input, a zero expert nothing. Both are
    absent assignments for `jmoe.moe_mlp`, so they cost no row:

    `y = moe_mlp(x, ..., computed) + identity_weight[:, None] * x`.

    Args:
        routing: of a router over all of these experts.
        num_experts: E, the experts that compute; indices [0, E).
        num_identity: the identity experts; indices [E, E + num_identity). All after these are zero experts.

    Returns:
        computed: the routing to the E experts, others absent.
        identity_weight: [T], the sum of each token's weights of identity experts.

    Raises:
        ValueError: `num_experts` is not positive or `num_identity` is negative.

    Source: Jin et al. (MoE++), arXiv 2410.07348, section 3.1 (zero and copy experts); Meituan (LongCat-Flash),
    arXiv 2509.01322, section 2.1 (identity experts).

    Example:
        >>> import jax.numpy as jnp
        >>> import jmoe
        >>> routing = jmoe.route_top_k(jnp.array([[0.0, 9.0, 9.0, -9.0]]), 2)  # two experts, one identity, one zero
        >>> computed, identity_weight = jmoe.routers.split_zero_experts(routing, 2, num_identity=1)
        >>> computed.expert_index.tolist(), identity_weight.tolist()
        ([[1, -1]], [0.5])
    """
    if num_experts < 1 or num_identity < 0:
        raise ValueError(
            f"num_experts is {num_experts} and num_identity {num_identity}; they must be at least 1 and 0."
        )
    index = routing.expert_index
    is_identity = (index >= num_experts) & (index < num_experts + num_identity)
    identity_weight = jnp.sum(jnp.where(is_identity, routing.weight, 0), axis=1)
    return routing.where(index < num_experts), identity_weight
