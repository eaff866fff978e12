"""Expert capacity: the token-dropping MoE of GShard and the Switch Transformer."""

import math
from fractions import Fraction

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jmoe.dispatch import check_routing, make_dispatch
from jmoe.losses import AxisName
from jmoe.routing import ABSENT, Assignments, Routing, is_present
from jmoe.sharding import as_axes


def expert_capacity(capacity_factor: float, num_assignments: int, num_experts: int) -> int:
    """Computes `ceil(capacity_factor * R / E)`, the places of each expert; 1 is room for all at perfect balance.

    Raises:
        ValueError: the factor is not positive and finite.

    Example:
        >>> expert_capacity(1.25, 2 * 64, num_experts=8)
        20
    """
    if not 0 < capacity_factor < math.inf:
        raise ValueError(f"capacity_factor is {capacity_factor}; it must be positive and finite (None or 0: dropless).")
    # As it is written: 1.1 as a binary fraction times 10 would be a little more than 11.
    return math.ceil(Fraction(str(capacity_factor)) * num_assignments / num_experts)


def limited_by_factor[R: Routing | Assignments](
    routing: R, num_experts: int, capacity_factor: float, axis_name: AxisName
) -> tuple[R, Float[Array, ""]]:
    """Limits each expert to `capacity_factor` times its share of the assignments of all shards.

    Returns:
        The routing without what was dropped, and the share of the assignments to the E experts that it was.
    """
    num_shards = math.prod(lax.axis_size(axis) for axis in as_axes(axis_name))
    capacity = expert_capacity(capacity_factor, num_shards * routing.expert_index.size, num_experts)
    limited = limit_to_capacity(routing, num_experts, capacity, axis_name=axis_name)
    counts = [is_present(r.expert_index, num_experts).sum() for r in (routing, limited)]
    wanted, kept = lax.psum(counts, axis_name)
    return limited, (wanted - kept) / jnp.maximum(wanted, 1).astype(jnp.float32)


def limit_to_capacity[R: Routing | Assignments](
    routing: R, num_experts: int, capacity: int, *, axis_name: AxisName = ()
) -> R:
    """Makes those assignments absent that come when their expert has `capacity` others.

    First come, first served: the first choices of all tokens in their order, then the second choices, and so on. So a
    token's k-th choice is dropped where the choices before the k-th of all tokens, and the k-th ones of earlier
    tokens, have filled its expert. The weights of the others stay as they are. `Assignments` are served in the order
    of the list, whatever their tokens.

    Args:
        routing: the assignments; absent ones take no place. A token's experts are in the order of its choice, as of
            `jmoe.route_top_k`.
        num_experts: E.
        capacity: the assignments that each expert takes, 0 or more.
        axis_name: mesh axes that the tokens are sharded over, inside `jax.shard_map`: the tokens of earlier shards
            then come before those of later ones, and `capacity` is that of an expert for the tokens of all shards.

    Returns:
        The routing without what was dropped.

    Raises:
        ValueError: `num_experts` or `capacity` is out of range, or the arrays of `routing` do not fit each other.

    Source: Lepikhin et al. (GShard), arXiv 2006.16668, algorithm 1; Fedus et al. (Switch Transformer),
    arXiv 2101.03961, section 2.2. That first choices come first is from the former; the latter has K = 1.

    Example:
        >>> import jax.numpy as jnp
        >>> import jmoe
        >>> routing = jmoe.Routing(jnp.array([[1, 0], [0, 1], [0, 2]]), jnp.ones((3, 2)))
        >>> jmoe.limit_to_capacity(routing, 3, capacity=2).expert_index.tolist()
        [[1, -1], [0, 1], [0, 2]]
    """
    if num_experts < 1:
        raise ValueError(f"num_experts is {num_experts}; it must be at least 1.")
    if capacity < 0:
        raise ValueError(f"capacity is {capacity}; it must be 0 or more.")
    check_routing(routing)
    index = routing.expert_index if isinstance(routing, Routing) else routing.expert_index[:, None]  # [T, K]
    present = is_present(index, num_experts)
    top_k = index.shape[1]

    # Each expert has a queue for each choice, in which an assignment's place is its row in the group.
    choice = jnp.arange(top_k, dtype=jnp.int32)
    queue = choice * num_experts + jnp.where(present, index, 0).astype(jnp.int32)  # [T, K]
    in_queue = Routing(jnp.where(present, queue, ABSENT), jnp.zeros(queue.shape))
    dispatch = make_dispatch(in_queue, max(top_k, 1) * num_experts)
    sizes = dispatch.group_sizes
    place = dispatch.position - (jnp.cumsum(sizes) - sizes)[queue]  # [T, K]

    lengths = sizes.reshape(-1, num_experts)  # [K, E]
    of_shards, shard = lengths[None], 0
    if axis_name:
        of_shards, shard = lax.all_gather(lengths, axis_name), lax.axis_index(axis_name)  # [shards, K, E]
    lengths = of_shards.sum(axis=0)
    earlier_choices = jnp.cumsum(lengths, axis=0) - lengths
    is_earlier = jnp.arange(of_shards.shape[0]) < shard
    earlier_shards = jnp.where(is_earlier[:, None, None], of_shards, 0).sum(axis=0)
    place += (earlier_choices + earlier_shards).ravel()[queue]
    return routing.where((present & (place < capacity)).reshape(routing.expert_index.shape))
