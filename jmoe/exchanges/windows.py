"""Expert MLPs whose rows go through buffers of a fixed size, in as many windows as it takes.

How many of a group's assignments are for the experts of one device is known only when the program runs. The worst case
is all of them, which may be n times as many as there are with random routing, and every buffer has to be of static
size. So the sorted assignments are cut into windows: the first is usually all, and further ones are computed in a
loop, which runs as often as it has to.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jmoe.dispatch import Dispatch, make_dispatch
from jmoe.grouped_mlp import ExpertParameters
from jmoe.local_mlp import MLPOptions, mlp_gradients, mlp_outputs
from jmoe.routing import Assignments, Routing


class Kept(NamedTuple):
    """What the backward of MLPs needs besides x and the parameters.

    Attributes:
        weight: of the assignments.
        dispatch: of the same.
        h: the pre-activations of the first window; None if they are to be computed again.
    """

    weight: Float[Array, "..."]
    dispatch: Dispatch
    h: Array | None


def windowed_outputs(
    options: MLPOptions,
    x: Float[Array, "T D"],
    routing: Routing | Assignments,
    parameters: ExpertParameters,
    max_rows: int,
) -> tuple[Float[Array, "T D"], Kept]:
    """Computes `moe_mlp`, `max_rows` of the present assignments at a time.

    Args:
        options: the MLPs.
        x: [T, D].
        routing: the assignments, of which usually no more than `max_rows` are present.
        parameters: of the E experts.
        max_rows: the rows of a window, at least 1.

    Returns:
        y: [T, D].
        kept: for `windowed_gradients`.
    """
    dispatch = make_dispatch(routing, parameters.w_up.shape[0])

    def outputs(start):
        return mlp_outputs(options, x, parameters, routing.weight, window(dispatch, start, max_rows))

    y, h = outputs(0)
    y = _for_further_windows(lambda y, start: y + outputs(start)[0], y, dispatch, max_rows)
    return y, Kept(routing.weight, dispatch, None if options.remat else h)


def windowed_gradients(
    options: MLPOptions,
    x: Float[Array, "T D"],
    parameters: ExpertParameters,
    kept: Kept,
    dy: Float[Array, "T D"],
    max_rows: int,
) -> tuple[Float[Array, "T D"], ExpertParameters, Float[Array, "..."]]:
    """Computes the gradients of x, the parameters and the routing weights.

    The pre-activations of windows after the first are computed again.

    Args:
        options: as in `windowed_outputs`.
        x: as in `windowed_outputs`.
        parameters: as in `windowed_outputs`.
        kept: from `windowed_outputs`.
        dy: [T, D].
        max_rows: as in `windowed_outputs`.
    """

    def gradients(start, h=None):
        residuals = x, parameters, kept.weight, window(kept.dispatch, start, max_rows), h
        return mlp_gradients(options, residuals, dy)

    def add(total, start):
        return jax.tree.map(jnp.add, total, gradients(start))

    return _for_further_windows(add, gradients(0, kept.h), kept.dispatch, max_rows)


def _for_further_windows(body, carry, dispatch, max_rows):
    """Applies `body(carry, start)` for every window after the first that has an assignment."""
    if max_rows >= dispatch.token_index.size:
        return carry
    num_rows = dispatch.group_sizes.sum()
    _, carry = lax.while_loop(
        lambda state: state[0] < num_rows,
        lambda state: (state[0] + max_rows, body(state[1], state[0])),
        (jnp.int32(max_rows), carry),
    )
    return carry


def window(dispatch: Dispatch, start: int | Int32[Array, ""], max_rows: int) -> Dispatch:
    """Cuts the rows `[start, start + max_rows)` out of a dispatch; assignments elsewhere count as absent.

    Example:
        >>> import jax.numpy as jnp
        >>> import jmoe
        >>> dispatch = jmoe.make_dispatch(jmoe.Routing(jnp.array([[1], [0], [1]]), jnp.ones((3, 1))), 2)
        >>> part = window(dispatch, 1, 2)
        >>> part.token_index.tolist(), part.group_sizes.tolist(), part.position.tolist()
        ([0, 2], [0, 2], [[0], [2], [1]])
    """
    num_rows, num_groups = dispatch.token_index.size, dispatch.group_sizes.size
    if max_rows >= num_rows:
        return dispatch
    row = start + jnp.arange(max_rows, dtype=jnp.int32)
    ends = jnp.cumsum(dispatch.group_sizes)
    first, last = (jnp.clip(bound, start, start + max_rows) for bound in (ends - dispatch.group_sizes, ends))
    inside = (dispatch.position >= start) & (dispatch.position < start + max_rows)
    return dataclasses.replace(
        dispatch,
        token_index=dispatch.token_index.at[row].get(mode="clip"),
        slot=dispatch.slot.at[row].get(mode="clip"),
        expert_index=dispatch.expert_index.at[row].get(mode="fill", fill_value=num_groups),
        position=jnp.where(inside, dispatch.position - start, max_rows),
        group_sizes=last - first,
    )
