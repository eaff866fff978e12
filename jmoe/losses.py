"""What keeps a router healthy, and how to see it: auxiliary losses and the expert load."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Shaped

from jmoe.routing import Assignments, Routing, count_assignments, is_present, widened

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
        routing: the assignments; absent ones do not count. Those of `Assignments` count whatever their token, unless
            there is a mask.
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
    mean_score = token_mean(scores, mask, axis_name)
    return num_experts * jnp.sum(load * mean_score)


def sequence_balancing_loss(
    scores: Float[Array, "T E"],
    routing: Routing | Assignments,
    num_sequences: int,
    *,
    mask: Bool[Array, " T"] | None = None,
    axis_name: AxisName = (),
    sequence_axis_name: AxisName = (),
) -> Float[Array, ""]:
    """Computes the mean, over sequences, of the load-balancing loss of each sequence by itself.

    It keeps each sequence balanced, where `load_balancing_loss` lets one make up for another.

    Args:
        scores: as in `load_balancing_loss`. Tokens of a sequence follow each other.
        routing: as in `load_balancing_loss`.
        num_sequences: the sequences that the T tokens belong to, all of the same length.
        mask: as in `load_balancing_loss`. Sequences of which no token is left do not count.
        axis_name: mesh axes that whole sequences are sharded over, inside `jax.shard_map`.
        sequence_axis_name: mesh axes that the tokens of a sequence are sharded over.

    Returns:
        A scalar in float32 (float64 for float64 scores); 0 where no token is left.

    Raises:
        ValueError: `num_sequences` does not divide T.

    Source: DeepSeek-V3, arXiv 2412.19437, equations 17 to 20 ("complementary sequence-wise auxiliary loss"), where the
    load is that of the largest scores; here it is that of the routing, which a selection bias may have changed.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jmoe
        >>> logits = 9 * jnp.eye(2)  # each expert has one of the two tokens
        >>> scores, routing = jax.nn.softmax(logits), jmoe.route_top_k(logits, 1)
        >>> [round(float(jmoe.sequence_balancing_loss(scores, routing, n)), 3) for n in (1, 2)]
        [1.0, 2.0]
    """
    num_tokens, num_experts = scores.shape
    if num_sequences < 1 or num_tokens % num_sequences:
        raise ValueError(f"num_sequences is {num_sequences}; it must divide the number of tokens, {num_tokens}.")
    if mask is None:
        mask = jnp.ones(num_tokens, bool)
    count = _count_by_sequence(routing.masked(mask), num_sequences, num_tokens // num_sequences, num_experts)
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    scores = jnp.where(mask[:, None], scores, 0).reshape(num_sequences, -1, num_experts)
    tokens = mask.reshape(num_sequences, -1).sum(axis=1, keepdims=True)
    count, total_score, tokens = lax.psum(
        (count, scores.sum(axis=1), tokens), sequence_axis_name
    )  # [sequences, E or 1]
    load = count / jnp.maximum(count.sum(axis=1, keepdims=True), 1)
    loss = num_experts * jnp.sum(load * total_score / jnp.maximum(tokens, 1))
    loss, num_present = lax.psum((loss, jnp.sum(tokens > 0)), axis_name)
    return loss / jnp.maximum(num_present, 1)


def _count_by_sequence(
    routing: Routing | Assignments, num_sequences: int, length: int, num_experts: int
) -> Int32[Array, "sequences E"]:
    """Counts each sequence's assignments of each expert."""
    routing = widened(routing)
    expert_index = routing.expert_index
    if isinstance(routing, Assignments):
        token_index = routing.token_index
    else:
        token_index = jnp.broadcast_to(jnp.arange(expert_index.shape[0])[:, None], expert_index.shape)
    present = is_present(expert_index, num_experts)
    sequence = jnp.where(present, token_index // length, num_sequences)
    count = jnp.zeros((num_sequences, num_experts), jnp.int32)
    return count.at[sequence, jnp.where(present, expert_index, 0)].add(1, mode="drop")


def pooled_balancing_loss(expert_load: Float[Array, "L E"], mean_score: Float[Array, "L E"]) -> Float[Array, ""]:
    """Computes one load-balancing loss for several layers, as if their tokens were those of one.

    `E * sum_e f_e * P_e`, with the load f and the score P averaged over the layers. It lets the expert e of one layer
    make up for expert e of another. The mean of the layers' own losses is what MegaBlocks computes
    (`batched_load_balancing_loss`); this is Hugging Face's loss of a model, which is K times as large.

    Args:
        expert_load: [L, E], `expert_load` of each layer's aux.
        mean_score: [L, E], `mean_score` of each layer's aux.

    Source: `load_balancing_loss_func` of Hugging Face transformers (Mixtral).

    Example:
        >>> import jax.numpy as jnp
        >>> import jmoe
        >>> float(jmoe.pooled_balancing_loss(jnp.eye(2), jnp.eye(2)))  # two layers that collapsed to different experts
        1.0
    """
    return expert_load.shape[1] * jnp.sum(expert_load.mean(axis=0) * mean_score.mean(axis=0))


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
    return token_mean(jnp.square(log_z), mask, axis_name)


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


def token_mean(
    values: Shaped[Array, " T *_"], mask: Bool[Array, " T"] | None, axis_name: AxisName
) -> Float[Array, "*_"]:
    """Averages over the tokens that the mask leaves, in float32 or better; 0 where none is left."""
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    if mask is None:
        mask = jnp.ones(values.shape[0], bool)
    values = jnp.where(mask.reshape(-1, *[1] * (values.ndim - 1)), values, 0)
    total, count = lax.psum((values.sum(axis=0), mask.sum()), axis_name)
    return total / jnp.maximum(count, 1)
