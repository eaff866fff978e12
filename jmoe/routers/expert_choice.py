"""Expert choice: each expert picks its tokens."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jmoe.capacity import expert_capacity
from jmoe.routing import ABSENT, Assignments, Score, checked_logits, log_score


def route_expert_choice(
    logits: Float[Array, "T E"],
    capacity: int | None = None,
    *,
    capacity_factor: float | None = None,
    score: Score = "softmax",
    scale: float = 1.0,
    mask: Bool[Array, " T"] | None = None,
) -> Assignments:
    """Lets each expert pick the `capacity` tokens that have the largest scores for it.

    The load is perfect; a token may get any number of experts, none too. Its weights are its scores, which
    are taken over the experts. Every token of the batch can change what another one gets, so this is no
    router for generating token by token, nor does it keep the future out of a causal model. A NaN counts as
    the largest score; the token's own output is NaN and no other token's, but it takes the places of others. On a
    mesh `jmoe.MoE` has experts choose among the tokens of each shard by themselves: `capacity` is per shard.

    Args:
        logits: [T, E], the router's output, of any floating-point dtype.
        capacity: tokens per expert, between 1 and T.
        capacity_factor: instead of `capacity`, the mean number of experts per token, as in the paper: an expert picks
            `ceil(T * capacity_factor / E)` tokens. Of a layer on a mesh, T is the tokens of a shard.
        score: as in `jmoe.route_top_k`.
        scale: a factor on all weights.
        mask: bool[T], false for tokens that no expert may pick, such as padding. Where fewer than `capacity`
            tokens are left, the rest of the assignments is absent.

    Returns:
        `Assignments` of R = E * capacity entries, sorted by expert, each expert's best token first.

    Raises:
        ValueError: an argument is not one of the values above.

    Source: Zhou et al., arXiv 2202.09368.

    Example:
        >>> import jax.numpy as jnp
        >>> import jmoe
        >>> logits = jnp.array([[4.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
        >>> routing = jmoe.routers.route_expert_choice(logits, 2)
        >>> routing.token_index.tolist(), routing.expert_index.tolist()
        ([0, 2, 1, 2], [0, 0, 1, 1])
    """
    logits = checked_logits(logits)
    num_tokens, num_experts = logits.shape
    if (capacity is None) == (capacity_factor is None):
        raise ValueError(f"capacity is {capacity} and capacity_factor {capacity_factor}; give one of them.")
    if capacity_factor is not None:
        capacity = expert_capacity(capacity_factor, num_tokens, num_experts)
    if capacity is None or not 1 <= capacity <= num_tokens:
        raise ValueError(f"capacity is {capacity}; it must be between 1 and the number of tokens, {num_tokens}.")
    log_scores = log_score(logits, score)  # [T, E]
    # Of a softmax, the order of tokens is not that of the logits, but of the scores.
    eligible = log_scores if mask is None else jnp.where(mask[:, None], log_scores, -jnp.inf)
    _, token_index = lax.top_k(lax.stop_gradient(eligible).T, capacity)  # [E, capacity]
    weight = scale * jnp.exp(jnp.take_along_axis(log_scores.T, token_index, axis=1))
    expert_index = jnp.broadcast_to(jnp.arange(num_experts, dtype=jnp.int32)[:, None], token_index.shape)
    if mask is not None:
        expert_index = jnp.where(mask[token_index], expert_index, ABSENT)
        weight = jnp.where(mask[token_index], weight, 0)
    return Assignments(token_index.ravel(), expert_index.ravel(), weight.ravel())
