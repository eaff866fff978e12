"""SparseMixer: experts are drawn at random in training, and the gradient of that choice is estimated."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jmoe.routing import Routing, check_top_k, checked_logits


def route_sparsemixer(
    logits: Float[Array, "T E"],
    k: int = 2,
    *,
    key: Array | None = None,
    jitter: float = 0.01,
    mask: Bool[Array, " T"] | None = None,
) -> Routing:
    """Routes each token to k experts, drawn one after the other, each from a softmax over the near-best.

    For each of the k, of the experts not yet chosen with the largest logit m, those are candidates with
    `(m - z_e) / max(|z_e|, m) <= 2 * jitter`. With p the softmax of the candidates' logits, expert e is drawn
    from p, or is the best one without a key, and has weight `p_e`.

    In training a drawn expert that is not the best one has, with probability 3/4, the weight `p_e / 3` instead,
    where Heun's third-order method takes the derivative of the expert's output. The gradient of a weight is
    that of `p_e` in either case: `p_e * (1[e = i] - p_i)` in the logit of i.

    Args:
        logits: [T, E], the router's output, of any floating-point dtype.
        k: experts per token; 2 in the paper.
        key: a JAX random key in training, as the layer gives it where it is called with `rngs`; None to take the
            best experts.
        jitter: how near to the best one a candidate is.
        mask: as in `jmoe.route_top_k`.

    Returns:
        A `Routing` with `expert_index` int32[T, k], in the order of drawing, and `weight` float32[T, k].

    Raises:
        ValueError: k is not between 1 and E, `jitter` is negative, or `logits` is not a floating-point matrix.

    Source: Liu et al. (GRIN), arXiv 2409.12136 (SparseMixer-v2); Liu et al., arXiv 2310.00811; the numbers
    of Microsoft's Phi-3.5-MoE (`sparsemixer` of its `modeling_phimoe.py`).

    Example:
        >>> import jax.numpy as jnp
        >>> import jmoe
        >>> routing = jmoe.routers.route_sparsemixer(jnp.array([[5.0, 1.0, 5.0, 3.0]]), 2)
        >>> routing.expert_index.tolist(), routing.weight.tolist()
        ([[0, 2]], [[0.5, 1.0]])
    """
    logits = checked_logits(logits)
    num_experts = logits.shape[1]
    check_top_k(k, num_experts)
    if jitter < 0:
        raise ValueError(f"jitter is {jitter}; it must be at least 0.")
    is_free = jnp.ones(logits.shape, bool)
    chosen = []
    for step in range(k):
        best = jnp.max(logits, axis=1, keepdims=True, where=is_free, initial=-jnp.inf)
        # Not `distance > ...`: so a NaN leaves a candidate, and spoils its own token only.
        is_far = (best - logits) > 2 * jitter * jnp.maximum(jnp.abs(logits), best)
        candidates = jnp.where(is_free & ~lax.stop_gradient(is_far), logits, -jnp.inf)
        best_index = jnp.argmax(candidates, axis=1)
        probability = jax.nn.softmax(candidates, axis=1)
        if key is None:
            index, is_full = best_index, True
        else:
            draw_key, midpoint_key = jax.random.split(jax.random.fold_in(key, step))
            index = jax.random.categorical(draw_key, candidates, axis=1)
            is_full = (index == best_index) | jax.random.bernoulli(midpoint_key, 0.25, index.shape)
        weight = jnp.take_along_axis(probability, index[:, None], axis=1)[:, 0]
        # The value changes, the gradient does not.
        weight += lax.stop_gradient(jnp.where(is_full, 0, -2 / 3 * weight))
        chosen.append((index.astype(jnp.int32), weight))
        is_free &= index[:, None] != jnp.arange(num_experts)
    expert_index, weight = (jnp.stack(columns, axis=1) for columns in zip(*chosen, strict=True))
    routing = Routing(expert_index, weight)
    return routing if mask is None else routing.masked(mask)
