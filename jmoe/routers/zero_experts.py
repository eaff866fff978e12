"""Experts without parameters, which a router may choose besides the E that compute."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jmoe.routing import Assignments, Routing
from pallas_kernels.rows import sum_rows


def split_zero_experts[R: Routing | Assignments](
    routing: R, num_experts: int, num_tokens: int, num_identity: int = 0
) -> tuple[R, Float[Array, " T"]]:
    """Splits the assignments to experts without parameters from those to the E experts that compute.

    A router with logits for E experts, then `num_identity` identity experts, then any number of zero experts,
    spends less on tokens that need less: an identity expert returns its input, a zero expert nothing. Both are
    absent assignments for `jmoe.moe_mlp`, so they cost no row:

    `y = moe_mlp(x, ..., computed) + identity_weight[:, None] * x`.

    `jmoe.MoE(num_identity_experts=..., num_zero_experts=...)` does this.

    Args:
        routing: of a router over all of these experts.
        num_experts: E, the experts that compute; indices [0, E).
        num_tokens: T.
        num_identity: the identity experts; indices [E, E + num_identity). All after these are zero experts.

    Returns:
        computed: the routing to the E experts, others absent.
        identity_weight: [T], the sum of each token's weights of identity experts.

    Raises:
        ValueError: `num_experts` is not positive or `num_identity` is negative.

    Source: Jin et al. (MoE++), arXiv 2410.07348 (zero and copy experts); Meituan (LongCat-Flash), arXiv 2509.01322
    (identity experts).

    Example:
        >>> import jax.numpy as jnp
        >>> import jmoe
        >>> routing = jmoe.route_top_k(jnp.array([[0.0, 9.0, 9.0, -9.0]]), 2)  # two experts, one identity, one zero
        >>> computed, identity_weight = jmoe.routers.split_zero_experts(routing, 2, 1, num_identity=1)
        >>> computed.expert_index.tolist(), identity_weight.tolist()
        ([[1, -1]], [0.5])
    """
    if num_experts < 1 or num_identity < 0:
        raise ValueError(
            f"num_experts is {num_experts} and num_identity {num_identity}; they must be at least 1 and 0."
        )
    index = routing.expert_index
    is_identity = (index >= num_experts) & (index < num_experts + num_identity)
    weight = jnp.where(is_identity, routing.weight, 0)
    if isinstance(routing, Assignments):
        token_index = routing.token_index.astype(jnp.int32)
        identity_weight = sum_rows(weight[:, None], token_index, num_tokens)[:, 0]
    else:
        identity_weight = weight.sum(axis=1)
    return routing.where(index < num_experts), identity_weight
