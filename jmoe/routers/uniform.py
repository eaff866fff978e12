"""Uniform assignment: every expert gets the same number of tokens, for benchmarks."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jmoe.routing import Routing, Score, ScoreOrder, route_top_k


def route_uniform(
    logits: Float[Array, "T E"],
    k: int,
    *,
    score: Score = "softmax",
    score_order: ScoreOrder = "before_top_k",
    normalize: bool | float = True,
    scale: float = 1.0,
    mask: Bool[Array, " T"] | None = None,
) -> Routing:
    """Gives tokens experts in turn, with the weights of `jmoe.route_top_k`.

    The i-th token goes to experts `i * k` to `i * k + k - 1`, modulo E. The router costs what it costs otherwise and
    its weights have gradients, but the load is even: what a layer takes then is free of the imbalance of a router
    that was not trained.

    Args:
        logits: [T, E], the router's output.
        k: experts per token.
        score: as in `jmoe.route_top_k`.
        score_order: as in `jmoe.route_top_k`.
        normalize: as in `jmoe.route_top_k`.
        scale: as in `jmoe.route_top_k`.
        mask: as in `jmoe.route_top_k`; tokens that are left are counted without the others.

    Returns:
        A `Routing` with `expert_index` int32[T, k] and `weight` float32[T, k].

    Source: `uniform_expert_assignment` of MegaBlocks.

    Example:
        >>> import jax.numpy as jnp
        >>> import jmoe
        >>> jmoe.routers.route_uniform(jnp.zeros((3, 4)), 2).expert_index.tolist()
        [[0, 1], [2, 3], [0, 1]]
    """
    weight = route_top_k(logits, k, score=score, score_order=score_order, normalize=normalize, scale=scale).weight
    num_tokens, num_experts = logits.shape
    token = jnp.arange(num_tokens) if mask is None else jnp.cumsum(mask) - 1
    expert_index = (token[:, None] * k + jnp.arange(k)) % num_experts
    routing = Routing(expert_index.astype(jnp.int32), weight)
    return routing if mask is None else routing.masked(mask)
