"""The exchange that sends tokens only where they are wanted, a fixed number for each pair of devices in a round."""

import math
from typing import NamedTuple, override

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

import pallas_kernels
from jmoe.dispatch import make_dispatch
from jmoe.exchanges.exchange import Exchange
from jmoe.exchanges.windows import Kept, windowed_gradients, windowed_outputs
from jmoe.grouped_mlp import Options
from jmoe.routing import ABSENT, Routing
from pallas_kernels.rows import sum_rows


class AllToAll(Exchange):
    """Sends each token once to every device that has experts of it, and the weighted sum of these back.

    In each round any device sends a `chunk` of tokens to any other. There are as many rounds as the fullest pair
    of devices needs: one, with random routing. Kept for the backward: x, the pre-activations of the first round's first
    window, about `1.125 * T * K` rows, and the routing of the tokens received in that round. The backward sends the
    tokens again, and computes later rounds again.

    Tokens of `Assignments`, of which any number may be one token's, travel once for each assignment.
    """

    @override
    def forward(self, x, routing, parameters):
        plan = self._plan(x, routing, parameters)

        def outputs(number):
            parcel = _pack(plan, number)
            rows, chosen = self._sent(plan.rows_of(x, parcel)), self._sent_routing(plan, parcel, parameters)
            y_rows, kept = windowed_outputs(self.options, rows, chosen, parameters, self._max_rows(plan, parameters))
            return self._sums(plan, parcel, self._sent(y_rows), x), kept

        y, kept = outputs(0)
        return self._further_rounds(plan, lambda y, number: y + outputs(number)[0], y), kept

    @override
    def backward(self, x, routing, parameters, kept, dy):
        plan = self._plan(x, routing, parameters)

        def gradients(number, kept=None):
            parcel = _pack(plan, number)
            rows, dy_rows = (self._sent(plan.rows_of(array, parcel)) for array in (x, dy))
            if kept is None:
                chosen = self._sent_routing(plan, parcel, parameters)
                kept = Kept(chosen.weight, make_dispatch(chosen, parameters.w_up.shape[0]), None)
            dx_rows, dparameters, dweight_rows = windowed_gradients(
                self.options, rows, parameters, kept, dy_rows, self._max_rows(plan, parameters)
            )
            dx = self._sums(plan, parcel, self._sent(dx_rows), x)
            return dx, dparameters, plan.weights_of(parcel, self._sent(dweight_rows))

        def add(total, number):
            return jax.tree.map(jnp.add, total, gradients(number))

        dx, dparameters, dweight = self._further_rounds(plan, add, gradients(0, kept))
        return dx, dparameters, dweight.reshape(routing.weight.shape)

    def chunk(self, num_units: int, top_k: int, num_local: int) -> int:
        """The tokens that a device sends to another one in a round.

        `1.125 * T * (1 - C(E - E/n, K) / C(E, K))`, of T tokens whose K experts are any of the E.
        """
        num_experts = self.num_experts
        draws = range(min(top_k, num_experts))
        elsewhere = math.prod(max(num_experts - num_local - i, 0) / (num_experts - i) for i in draws)
        return self.room(num_units * (1 - elsewhere), num_units)

    def _plan(self, x, routing, parameters):
        """Numbers the tokens that go to each device."""
        num_local, num_shards = parameters.w_up.shape[0], self.num_shards
        token_index = None
        if not isinstance(routing, Routing):
            token_index = routing.token_index
            routing = Routing(routing.expert_index[:, None], routing.weight[:, None])
        index = routing.expert_index
        present = (index >= 0) & (index < num_local * num_shards)
        shard_of = jnp.where(present, index // num_local, num_shards)  # [U, K]
        goes = (shard_of == jnp.arange(num_shards)[:, None, None]).any(axis=2)  # [n, U]
        rank = jnp.where(goes, jnp.cumsum(goes, axis=1, dtype=jnp.int32) - 1, ABSENT)
        chunk = self.chunk(index.shape[0], index.shape[1], num_local)
        num_rounds = lax.pmax(-(-(rank.max() + 1) // chunk), self.axis_names)
        return _Plan(x.shape[0], chunk, token_index, routing, shard_of, rank, num_rounds)

    def _further_rounds(self, plan, body, carry):
        """Applies `body(carry, number)` for every round after the first that any pair of devices needs."""
        if plan.chunk >= plan.rank.shape[1]:
            return carry
        _, carry = lax.while_loop(
            lambda state: state[0] < plan.num_rounds,
            lambda state: (state[0] + 1, body(state[1], state[0])),
            (jnp.int32(1), carry),
        )
        return carry

    def _max_rows(self, plan, parameters):
        num_assignments, top_k = plan.routing.expert_index.size, plan.routing.expert_index.shape[1]
        mean = self.num_shards * num_assignments * parameters.w_up.shape[0] / self.num_experts
        return self.room(mean, self.num_shards * plan.chunk * top_k)

    def _sent(self, rows):
        """Sends a chunk of rows to each device, or what has been sent back, and returns those that arrive."""
        return lax.all_to_all(rows, self.axis_names, split_axis=0, concat_axis=0, tiled=True)

    def _sent_routing(self, plan, parcel, parameters):
        """Sends the routing of a parcel's tokens; returns that of those that arrive, to this shard's experts."""
        index = plan.routing.expert_index.at[parcel.unit].get(mode="fill", fill_value=ABSENT)
        weight = plan.routing.weight.at[parcel.unit].get(mode="fill", fill_value=0)
        return self.local_part(Routing(self._sent(index), self._sent(weight)), parameters.w_up.shape[0])

    def _sums(self, plan, parcel, rows, like):
        """Adds the rows that came back into those of their tokens, deterministically."""
        if plan.token_index is not None:
            return sum_rows(rows, plan.token_of(parcel), plan.num_tokens).astype(like.dtype)
        implementation = self.options.implementation if isinstance(self.options, Options) else None
        if implementation == "mosaic_gpu":  # as in `jmoe.combine`
            implementation = None
        return pallas_kernels.combine(rows, parcel.row, implementation=implementation)


class _Plan(NamedTuple):
    """What goes where. A unit is what travels together: a token, or one of `Assignments`."""

    num_tokens: int
    chunk: int
    token_index: Int32[Array, " U"] | None  # None where units are tokens
    routing: Routing  # of the units
    shard_of: Int32[Array, "U K"]  # n where absent
    rank: Int32[Array, "n U"]  # among the units that go to a shard; ABSENT where one does not
    num_rounds: Int32[Array, ""]

    def token_of(self, parcel: "_Parcel") -> Int32[Array, " rows"]:
        """Returns the token of each row; T where there is none."""
        if self.token_index is None:
            return parcel.unit
        return self.token_index.at[parcel.unit].get(mode="fill", fill_value=self.num_tokens)

    def rows_of(self, x: Float[Array, "T D"], parcel: "_Parcel") -> Float[Array, "rows D"]:
        """Reads the rows that a parcel has of x; zeros where there is none."""
        return x.at[self.token_of(parcel)].get(mode="fill", fill_value=0)

    def weights_of(self, parcel: "_Parcel", rows: Float[Array, "rows K"]) -> Float[Array, "U K"]:
        """Takes each assignment's value from the row of the shard that it is for; zeros where none was sent."""
        row = jnp.take_along_axis(parcel.row, self.shard_of, axis=1, mode="fill", fill_value=rows.shape[0])
        return rows.at[row, jnp.arange(rows.shape[1])].get(mode="fill", fill_value=0)


class _Parcel(NamedTuple):
    """What is sent in one round, in rows: a chunk for each shard."""

    unit: Int32[Array, " rows"]  # U where a chunk has room left
    row: Int32[Array, "U n"]  # of each unit, for each shard; past the last where it is not sent there


def _pack(plan: _Plan, number: int | Int32[Array, ""]) -> _Parcel:
    """Chooses the units of a round: the next chunk for each shard."""
    num_shards, num_units = plan.rank.shape
    num_rows = num_shards * plan.chunk
    place = plan.rank - number * plan.chunk
    is_sent = (plan.rank >= 0) & (place >= 0) & (place < plan.chunk)
    first = plan.chunk * jnp.arange(num_shards, dtype=jnp.int32)
    row = jnp.where(is_sent, first[:, None] + place, num_rows)  # [n, U]
    units = jnp.broadcast_to(jnp.arange(num_units, dtype=jnp.int32), row.shape)
    unit = jnp.full(num_rows, num_units, jnp.int32).at[row].set(units, mode="drop")
    return _Parcel(unit, row.T)
