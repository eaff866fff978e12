"""Expert capacity: the token-dropping MoE of GShard and the Switch Transformer."""

import math
from fractions import Fraction

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from jmoe.dispatch import check_routing, make_dispatch
from jmoe.losses import AxisName
from jmoe.routing import ABSENT, Assignments, Routing, is_present


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
    routing: R,
    num_experts: int,
    capacity_factor: float,
    *,
    num_assignments: int,
    batch_shape: tuple[int, ...],
    batch_axes: tuple[tuple[str, ...], ...],
) -> tuple[R, Float[Array, ""]]:
    """Limits each expert to `capacity_factor` times its share of the assignments of all shards.

    Args:
        routing: of this shard's tokens.
        num_experts: E.
        capacity_factor: as in `expert_capacity`.
        num_assignments: what the share is of: R = T * K of this shard.
        batch_shape: the dimensions of this shard's tokens.
        batch_axes: the mesh axes that each of them is sharded over; nothing on one device.

    Returns:
        The routing without what was dropped, and the share of the assignments to the E experts that it was.
    """
    all_axes = tuple(axis for axes in batch_axes for axis in axes)
    num_shards = math.prod(lax.axis_size(axis) for axis in all_axes)
    capacity = expert_capacity(capacity_factor, num_shards * num_assignments, num_experts)
    if isinstance(routing, Routing):
        has_place = _has_place_in_token_order(routing.expert_index, num_experts, capacity, batch_shape, batch_axes)
    else:
        has_place = _has_place(routing.expert_index[:, None], num_experts, capacity, all_axes)[:, 0]
    limited = routing.where(has_place)
    counts = [is_present(r.expert_index, num_experts).sum() for r in (routing, limited)]
    wanted, kept = lax.psum(counts, all_axes)
    return limited, (wanted - kept) / jnp.maximum(wanted, 1).astype(jnp.float32)


def limit_to_capacity[R: Routing | Assignments](
    routing: R, num_experts: int, capacity: int, *, axis_name: AxisName = ()
) -> R:
    """Makes those assignments absent that come when their expert has `capacity` others.

    First come, first served: the first choices of all tokens in their order, then the second choices, and so on. So a
    token's k-th choice is dropped where the choices before the k-th of all tokens, and the k-th ones of earlier
    tokens, have filled its expert. The weights of the others stay as they are. `Assignments` are served in the order
    of the list, whatever their tokens (mask those that are outside [0, T) before).

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
    index = routing.expert_index
    index = index if isinstance(routing, Routing) else index[:, None]
    return routing.where(_has_place(index, num_experts, capacity, axis_name).reshape(routing.expert_index.shape))


def _has_place_in_token_order(
    index: Integer[Array, "T K"],
    num_experts: int,
    capacity: int,
    batch_shape: tuple[int, ...],
    batch_axes: tuple[tuple[str, ...], ...],
) -> Bool[Array, "T K"]:
    """Says of this shard's assignments what `_has_place` says, with the tokens of all shards in their global order."""
    # Shards of the first dimension follow each other in that order. Those of the others interleave: their tokens are
    # put together first.
    first, *others = batch_axes or [()]
    sharded = [(d, axes) for d, axes in enumerate(others, 1) if axes]
    index = index.reshape(*batch_shape, index.shape[1])
    for d, axes in sharded:
        index = lax.all_gather(index, axes, axis=d, tiled=True)
    matrix = index.reshape(math.prod(index.shape[:-1]), index.shape[-1])
    has_place = _has_place(matrix, num_experts, capacity, first).reshape(index.shape)
    for d, axes in sharded:
        has_place = lax.dynamic_slice_in_dim(has_place, lax.axis_index(axes) * batch_shape[d], batch_shape[d], axis=d)
    return has_place.reshape(math.prod(batch_shape), index.shape[-1])


def _has_place(
    index: Integer[Array, "T K"], num_experts: int, capacity: int, axis_name: AxisName
) -> Bool[Array, "T K"]:
    """Says which assignments are present and have a place in the queue of their expert that is below the capacity."""
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
    return present & (place < capacity)
