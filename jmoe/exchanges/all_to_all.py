"""The exchange that sends tokens only where they are wanted, a fixed number for each pair of devices in a round."""

import math
from typing import override

import jax
import jax.numpy as jnp
from jax import lax

import pallas_kernels
from jmoe.dispatch import make_dispatch
from jmoe.exchanges.exchange import Exchange
from jmoe.exchanges.parcels import make_plan, pack
from jmoe.exchanges.windows import Kept, window
from jmoe.local_mlp import mlp_gradients, mlp_outputs
from pallas_kernels.rows import sum_rows


class AllToAll(Exchange):
    """Sends each token once to every device that has experts of it, and the weighted sum of these back.

    In each round any device sends a `chunk` of tokens to any other, with no more assignments than there is `room`
    for. There are as many rounds as the fullest pair of devices needs: one, with random routing. Kept for the backward:
    x, the pre-activations of the first round, about `1.125 * T * K` rows, and the routing of the tokens received in
    it. The backward sends the tokens again, and computes later rounds again.

    Tokens of `Assignments`, of which any number may be one token's, travel once for each assignment.
    """

    @override
    def forward(self, x, routing, parameters):
        plan = self._plan(x, routing, parameters)

        def outputs(parcel):
            rows = self._sent(plan.rows_of(x, parcel))
            weight, dispatch = self._received(plan, parcel, parameters)
            y_rows, h = mlp_outputs(self.options, rows, parameters, weight, dispatch)
            y = self._sums(plan, parcel, self._sent(y_rows), x)
            return y, Kept(weight, dispatch, None if self.options.remat else h)

        parcel, sent = pack(plan, plan.nothing_sent())
        y, kept = outputs(parcel)
        return self._further_rounds(plan, sent, lambda y, parcel: y + outputs(parcel)[0], y), kept

    @override
    def backward(self, x, routing, parameters, kept, dy):
        plan = self._plan(x, routing, parameters)

        def gradients(parcel, kept):
            rows, dy_rows = (self._sent(plan.rows_of(array, parcel)) for array in (x, dy))
            residuals = rows, parameters, kept.weight, kept.dispatch, kept.h
            dx_rows, dparameters, dweight_rows = mlp_gradients(self.options, residuals, dy_rows)
            dx = self._sums(plan, parcel, self._sent(dx_rows), x)
            return dx, dparameters, plan.weights_of(parcel, self._sent(dweight_rows))

        def add(total, parcel):
            of_round = gradients(parcel, Kept(*self._received(plan, parcel, parameters), None))
            return jax.tree.map(jnp.add, total, of_round)

        parcel, sent = pack(plan, plan.nothing_sent())
        total = gradients(parcel, kept)
        dx, dparameters, dweight = self._further_rounds(plan, sent, add, total)
        return dx, dparameters, dweight.reshape(routing.weight.shape)

    def chunk(self, num_tokens: int, top_k: int, num_local: int) -> int:
        """The most tokens that a device sends to another one in a round.

        `1.125 * T * (1 - C(E - E/n, K) / C(E, K))`, of T tokens whose K experts are any of the E.
        """
        num_experts = self.num_experts
        draws = range(min(top_k, num_experts))
        elsewhere = math.prod(max(num_experts - num_local - i, 0) / (num_experts - i) for i in draws)
        return self.room(num_tokens * (1 - elsewhere), num_tokens)

    def _plan(self, x, routing, parameters):
        num_tokens, top_k, *_ = *routing.expert_index.shape, 1
        num_local = parameters.w_up.shape[0]
        chunk = self.chunk(num_tokens, top_k, num_local)
        room = max(top_k, self.room_for_rows(num_tokens * top_k, num_local))
        return make_plan(routing, x.shape[0], self.num_shards, num_local, chunk, room)

    def _further_rounds(self, plan, sent, body, carry):
        """Applies `body(carry, parcel)` in every round after the first that any pair of devices needs."""
        if plan.chunk >= plan.wants.shape[1] and plan.room >= plan.shard_of.size:
            return carry

        def remains(sent):
            return lax.pmax(plan.remains(sent).astype(jnp.int32), self.axis_names)

        def next_round(state):
            _, sent, carry = state
            parcel, sent = pack(plan, sent)
            carry = body(carry, parcel)
            return remains(sent), sent, carry

        *_, carry = lax.while_loop(lambda state: state[0] > 0, next_round, (remains(sent), sent, carry))
        return carry

    def _sent(self, rows):
        """Sends a chunk of rows to each device, or what has been sent back, and returns those that arrive."""
        return lax.all_to_all(rows, self.axis_names, split_axis=0, concat_axis=0, tiled=True)

    def _received(self, plan, parcel, parameters):
        """Sends the routing of a parcel; returns the weights of what arrives, and the dispatch to local experts."""
        routing = jax.tree.map(self._sent, plan.routing_of(parcel))
        num_local = parameters.w_up.shape[0]
        dispatch = make_dispatch(self.local_part(routing, num_local), num_local)
        return routing.weight, window(dispatch, 0, self.num_shards * plan.room)

    def _sums(self, plan, parcel, rows, like):
        """Adds the rows that came back into those of their tokens, deterministically."""
        if plan.token_index is not None:
            return sum_rows(rows, plan.token_of(parcel), plan.num_tokens).astype(like.dtype)
        implementation = self.options.implementation
        if implementation == "mosaic_gpu":  # as in `jmoe.combine`
            implementation = None
        return pallas_kernels.combine(rows, parcel.row, implementation=implementation)
