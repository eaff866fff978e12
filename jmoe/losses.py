"""What keeps a router healthy, and how to see it: auxiliary losses and the expert load."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jmoe.routing import Assignments, Routing, count_assignments

AxisName = str | tuple[str, ...]


def load_balancing_loss(
    scores: Float[Array, "T E"],
    routing: Routing | Assignments,
    *,
    mask: Bool[Array, " T"] | None = None,
    axis_name: AxisName = (),
) -> Float[Array, ""]:
    """Computes the load-balancing loss of the Switch Transformer.

    `E * sum_e f_e * P_e`, where f_e is the share of all assignments that expert e got (a count: no gradient)
    and P_e the mean score of expert e. It is 1 at perfect balance and E when every token goes to one expert
    with score 1. Hugging Face's loss is K times this one.

    Args:
        scores: [T, E], each row summing to 1: `softmax(logits)`, or sigmoids divided by their sum.
        routing: the assignments; absent ones do not count.
        mask: bool[T], false for tokens that enter no statistic, such as padding.
        axis_name: mesh axes that the tokens are sharded over, inside `jax.shard_map`; the statistics are then
            global.

    Returns:
        A scalar in float32 (float64 for float64 scores); 0 where no token is left.

    Source: Fedus et al., arXiv 2101.03961, section 2.2, equations 4 to 6.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jmoe
        >>> logits = 9 * jnp.eye(4)
        >>> float(jmoe.load_balancing_loss(jax.nn.softmax(logits), jmoe.route_top_k(logits, 1)))
        1.0
    """
    num_experts = scores.shape[1]
    load = expert_load(routing, num_experts, mask=mask, axis_name=axis_name)
    mean_score = _token_mean(scores, mask, axis_name)
    return num_experts * jnp.sum(load * mean_score)


def router_z_loss(
    logits: Float[Array, "T E"], *, mask: Bool[Array, " T"] | None = None, axis_name: AxisName = ()
) -> Float[Array, ""]:
    """Computes the router z-loss, which keeps logits small: `mean_t logsumexp_e(logits[t, e])^2`.

    Args:
        logits: [T, E], the router's output.
        mask: as in `load_balancing_loss`.
        axis_name: as in `load_balancing_loss`.

    Returns:
        A scalar in float32 (float64 for float64 logits); 0 where no token is left.

    Source: Zoph et al. (ST-MoE), arXiv 2202.08906, equation 5.

    Example:
        >>> import jax.numpy as jnp
        >>> import jmoe
        >>> float(jmoe.router_z_loss(jnp.log(jnp.full((3, 4), 0.25))))
        0.0
    """
    if mask is not None:
        logits = jnp.where(mask[:, None], logits, 0)
    log_z = jax.nn.logsumexp(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=1)
    return _token_mean(jnp.square(log_z), mask, axis_name)


def expert_load(
    routing: Routing | Assignments,
    num_experts: int,
    *,
    mask: Bool[Array, " T"] | None = None,
    axis_name: AxisName = (),
) -> Float[Array, " E"]:
    """Computes the share of the present assignments that each expert got.

    Args:
        routing: the assignments; absent ones do not count.
        num_experts: E.
        mask: as in `load_balancing_loss`.
        axis_name: as in `load_balancing_loss`.

    Returns:
        float32[E], which sums to 1; all zeros where no assignment is present.

    Example:
        >>> import jax.numpy as jnp
        >>> import jmoe
        >>> routing = jmoe.Routing(jnp.array([[0, 1], [0, 2]]), jnp.ones((2, 2)))
        >>> jmoe.expert_load(routing, 4).tolist()
        [0.5, 0.25, 0.25, 0.0]
    """
    if mask is not None:
        routing = routing.masked(mask)
    counts = lax.psum(count_assignments(routing.expert_index, num_experts), axis_name)
    return counts / jnp.maximum(counts.sum(), 1).astype(jnp.float32)


def _token_mean(
    values: Float[Array, " T *_"], mask: Bool[Array, " T"] | None, axis_name: AxisName
) -> Float[Array, "*_"]:
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    if mask is None:
        mask = jnp.ones(values.shape[0], bool)
    values = jnp.where(mask.reshape(-1, *[1] * (values.ndim - 1)), values, 0)
    total, count = lax.psum((values.sum(axis=0), mask.sum()), axis_name)
    return total / jnp.maximum(count, 1)
