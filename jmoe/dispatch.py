"""Dispatch: the assignments sorted by expert, so that each expert's rows lie together."""

import dataclasses
import functools
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32, Integer, Shaped

from jmoe.routing import Assignments, Routing, checked_present, count_assignments, is_present, widened

# On an H100 comparing so many is still 30 us faster than XLA's sort; more were not measured.
_MOST_ASSIGNMENTS_COMPARED = 4096
type _Sorted = tuple[Int32[Array, " R"], Int32[Array, " R"], Int32[Array, " R"], Int32[Array, "T K"]]


@no_type_check  # JAX also builds pytrees of other shapes and of things that are no arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dispatch:
    """R rows, one for each assignment, sorted by expert; the rows of absent assignments come last.

    Attributes:
        token_index: int32[R], the token of each row. Of an absent row's token nothing is promised.
        slot: int32[R], which of its token's K assignments each row is; from `Assignments`, which of the R.
        expert_index: int32[R], the expert of each row, in ascending order; E in absent rows.
        position: int32[T, K], the row of each assignment; int32[R] from `Assignments`. The inverse of the
            sort.
        group_sizes: int32[E], the rows of each expert; of each group, where groups are no experts.
        expert_of_group: int32[groups], the expert of each group; None where group e is expert e.
    """

    token_index: Int32[Array, " R"]
    slot: Int32[Array, " R"]
    expert_index: Int32[Array, " R"]
    position: Int32[Array, "T K"] | Int32[Array, " R"]
    group_sizes: Int32[Array, " groups"]
    expert_of_group: Int32[Array, " groups"] | None = None

    def to_rows(self, of_assignments: Shaped[Array, "*_"]) -> Shaped[Array, " R"]:
        """Sorts values of the assignments, [T, K] or [R], into the order of the rows."""
        if self.position.ndim == 1:
            return of_assignments[self.slot]
        # Clipped, since an absent row may have no token, and without the many operations that numbers below 0 take.
        return of_assignments.at[self.token_index, self.slot].get(mode="clip", wrap_negative_indices=False)

    def from_rows(self, of_rows: Shaped[Array, " R"]) -> Shaped[Array, "*_"]:
        """Puts values of the rows back into the order of the assignments, with zeros for absent ones."""
        return jnp.where(self.position < self.group_sizes.sum(), of_rows[self.position], 0)


def make_dispatch(routing: Routing | Assignments, num_experts: int) -> Dispatch:
    """Sorts the assignments by expert; those of one expert keep their order.

    This replaces the permuted, padded copy of the tokens that a capacity needs: kernels read the rows of a
    token where they are (ScatterMoE, arXiv 2403.08245, section 3.1). No assignment is dropped, whatever the
    routing.

    Args:
        routing: the assignments. Absent ones sort behind every expert's rows and belong to no group.
            `jmoe.debug_checks()` reports indices outside [0, E) that are not -1.
        num_experts: E.

    Returns:
        A `Dispatch`.

    Raises:
        ValueError: the arrays of `routing` do not fit each other, or `num_experts` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> import jmoe
        >>> dispatch = jmoe.make_dispatch(jmoe.Routing(jnp.array([[2, 0], [0, -1]]), jnp.ones((2, 2))), 3)
        >>> dispatch.token_index.tolist(), dispatch.group_sizes.tolist(), dispatch.position.tolist()
        ([0, 1, 0, 1], [2, 0, 1], [[2, 0], [1, 3]])
    """
    if num_experts < 1:
        raise ValueError(f"num_experts is {num_experts}; it must be at least 1.")
    check_routing(routing)
    routing = widened(routing)
    present = checked_present(routing.expert_index, num_experts)
    # Without the barrier XLA would count again wherever only the sum of the sizes is used.
    group_sizes = lax.optimization_barrier(count_assignments(routing.expert_index, num_experts))
    # As few bits as there may be: a GPU sorts 8 of them at a time.
    dtype = next(d for d in (jnp.uint8, jnp.uint16, jnp.uint32) if num_experts <= jnp.iinfo(d).max)
    expert_index = jnp.where(present, routing.expert_index, num_experts).astype(dtype)
    few = expert_index.size <= _MOST_ASSIGNMENTS_COMPARED
    # What compares well depends on the platform that is compiled for, which may not be the one that traces.
    sort = functools.partial(lax.platform_dependent, cpu=_sort, default=_sort_by_comparing) if few else _sort
    if isinstance(routing, Routing):
        sorted_index, token_index, slot, position = sort(expert_index)
    else:
        sorted_index, slot, _, position = sort(expert_index[:, None])
        token_index, position = routing.token_index.astype(jnp.int32)[slot], position[:, 0]
    return Dispatch(token_index, slot, sorted_index, position, group_sizes)


def dispatch_unsorted(routing: Routing, num_experts: int) -> Dispatch:
    """Makes each assignment a group of its own, so that nothing has to be sorted.

    For so few tokens that they hardly share an expert: then each expert's weights are read once, or little more, and
    the small kernels of a sort and of a schedule are saved. Absent assignments have rows too, of some expert
    or other, and places past the last row.

    Args:
        routing: the assignments.
        num_experts: E.

    Returns:
        A `Dispatch` whose rows are the assignments in their order, with `expert_of_group`.
    """
    shape = routing.expert_index.shape
    row = jnp.arange(routing.expert_index.size, dtype=jnp.int32)
    position = jnp.where(is_present(routing.expert_index, num_experts), row.reshape(shape), row.size)
    # Clipped before the cast, which could wrap around.
    expert_index = jnp.clip(widened(routing).expert_index.ravel(), 0, num_experts - 1).astype(jnp.int32)
    token_index, slot = _row_and_column(row, shape[1])
    return Dispatch(token_index, slot, expert_index, position, jnp.ones_like(row), expert_index)


def _sort(keys: Integer[Array, "T K"]) -> _Sorted:
    """Sorts stably. Returns the keys in order, the row and the column of each in `keys`, and the place of each key."""
    index = jnp.arange(keys.size, dtype=jnp.int32)
    sorted_keys, order = lax.sort((keys.ravel(), index), num_keys=1, is_stable=True)
    place = (
        lax.empty(order.shape, order.dtype)
        .at[order]
        .set(index, mode="promise_in_bounds", unique_indices=True, wrap_negative_indices=False)
    )
    row, column = _row_and_column(order, keys.shape[1])
    return sorted_keys.astype(jnp.int32), row, column, place.reshape(keys.shape)


def _sort_by_comparing(keys: Integer[Array, "T K"]) -> _Sorted:
    """The same by comparing each key with each: for few keys a small kernel or two on a GPU, where a sort is many."""
    key, index = keys.ravel(), jnp.arange(keys.size, dtype=jnp.int32)
    is_before = (key < key[:, None]) | ((key == key[:, None]) & (index < index[:, None]))
    place = jnp.sum(is_before, axis=1, dtype=jnp.int32)
    is_here = place == index[:, None]

    def in_order(x: Integer[Array, " R"]) -> Int32[Array, " R"]:
        return jnp.sum(jnp.where(is_here, x, 0), axis=1, dtype=jnp.int32)

    row, column = _row_and_column(index, keys.shape[1])
    return in_order(key), in_order(row), in_order(column), place.reshape(keys.shape)


def _row_and_column(index: Int32[Array, " R"], columns: int) -> tuple[Int32[Array, " R"], Int32[Array, " R"]]:
    """As `jnp.divmod`, for numbers from 0: with a sign there are a dozen more operations."""
    index = index.astype(jnp.uint32)
    return lax.div(index, jnp.uint32(columns)).astype(jnp.int32), lax.rem(index, jnp.uint32(columns)).astype(jnp.int32)


def check_routing(routing: Routing | Assignments) -> None:
    """Raises a ValueError where the arrays of a routing do not fit each other."""
    if not isinstance(routing, Routing | Assignments):
        raise ValueError(f"routing is a {type(routing).__name__}; it must be a jmoe.Routing or jmoe.Assignments.")
    layout = "[T, K]" if isinstance(routing, Routing) else "[R]"
    rank = 2 if isinstance(routing, Routing) else 1
    for field in dataclasses.fields(routing):
        array = getattr(routing, field.name)
        kind = jnp.floating if field.name == "weight" else jnp.integer
        shape = routing.expert_index.shape
        if array.ndim != rank or array.shape != shape or not jnp.issubdtype(array.dtype, kind):
            raise ValueError(
                f"routing.{field.name} is {array.dtype}{list(array.shape)}; it must be {kind.__name__} "
                f"{layout} of the shape of expert_index, {list(shape)}."
            )
