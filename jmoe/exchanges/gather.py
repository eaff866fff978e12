"""The exchange that gathers: every shard gets all tokens, and the outputs of all shards are summed back."""

import dataclasses
from typing import override

import jax
from jax import lax

from jmoe.exchanges.exchange import Exchange
from jmoe.exchanges.windows import windowed_gradients, windowed_outputs
from jmoe.routing import Assignments


class Gather(Exchange):
    """All-gathers the tokens, computes this shard's experts for all of them, and reduce-scatters the outputs.

    Kept for the backward: the gathered tokens [n*T, D] and their routing, and the pre-activations of the first window,
    about `1.125 * T * K` rows. One collective each way, each of `(n - 1) * T * D` elements a device; the backward
    has two more of them.
    """

    @override
    def forward(self, x, routing, parameters):
        num_local = parameters.w_up.shape[0]
        if isinstance(routing, Assignments) and self.axis_names:
            first = lax.axis_index(self.axis_names) * x.shape[0]
            routing = dataclasses.replace(routing, token_index=routing.token_index + first)
        all_x, all_routing = self._gathered((x, routing))
        local = self.local_part(all_routing, num_local)
        max_rows = self.room_for_rows(all_routing.expert_index.size, num_local)
        all_y, kept = windowed_outputs(self.options, all_x, local, parameters, max_rows)
        return self._scattered(all_y), (all_x, kept)

    @override
    def backward(self, x, routing, parameters, kept, dy):
        all_x, kept = kept
        max_rows = self.room_for_rows(kept.dispatch.position.size, parameters.w_up.shape[0])
        gradients = windowed_gradients(self.options, all_x, parameters, kept, self._gathered(dy), max_rows)
        dall_x, dparameters, dall_weight = gradients
        return self._scattered(dall_x), dparameters, self._scattered(dall_weight)

    def _gathered(self, tree):
        if not self.axis_names:
            return tree
        return jax.tree.map(lambda array: lax.all_gather(array, self.axis_names, axis=0, tiled=True), tree)

    def _scattered(self, array):
        if not self.axis_names:
            return array
        return lax.psum_scatter(array, self.axis_names, scatter_dimension=0, tiled=True)
