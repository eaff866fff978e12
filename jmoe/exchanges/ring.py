"""The exchange in a ring: the tokens of each shard go from device to device, and their outputs after them."""

import functools
from collections.abc import Callable
from typing import Any, override

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.exchanges.exchange import Exchange
from jmoe.exchanges.windows import windowed_gradients, windowed_outputs
from jmoe.rows import accumulator


class Ring(Exchange):
    """Passes the tokens of each shard around all devices, with the sum of what these have computed for them behind.

    A device computes its experts for one shard at a time, while the next shard arrives, so that exchange and
    kernels overlap; it never holds more than one foreign shard, and the one on its way. Kept for the backward: x, the
    pre-activations of the first window of each shard, together about `1.125 * T * K` rows, and integers. In the
    backward tokens and their gradients travel again. Each way `n - 1` steps of `T * D` elements, forward and twice
    that backward; programs grow with n.
    """

    @override
    def forward(self, x, routing, parameters):
        num_local = parameters.w_up.shape[0]
        max_rows = self.room_for_rows(routing.expert_index.size, num_local)

        def compute(travelling, step):
            del step
            x, routing = travelling
            local = self.local_part(routing, num_local)
            return windowed_outputs(self.options, x, local, parameters, max_rows)

        return self._around((x, routing), compute)

    @override
    def backward(self, x, routing, parameters, kept, dy):
        max_rows = self.room_for_rows(routing.expert_index.size, parameters.w_up.shape[0])

        def compute(travelling, step):
            x, dy = travelling
            dx, dparameters, dweight = windowed_gradients(self.options, x, parameters, kept[step], dy, max_rows)
            return (dx, dweight), dparameters

        (dx, dweight), of_shards = self._around((x, dy), compute)

        def sum_of(*parts):
            return functools.reduce(jnp.add, map(accumulator, parts)).astype(parts[0].dtype)

        return dx, jax.tree.map(sum_of, *of_shards), dweight

    def _around(self, travelling: Any, compute: Callable[[Any, int], tuple[Any, Any]]) -> tuple[Any, list[Any]]:
        """Calls `compute(travelling, step)` with what each shard sends, and brings the sum of its results home.

        Args:
            travelling: what this shard sends around.
            compute: returns what is summed over the devices for that shard, and anything else.

        Returns:
            The sum for this shard, and the other results of each step.
        """
        own, others, total = None, [], None
        for step in range(self.num_shards):
            # Sent on before it is used here, so that the next one may arrive in the meantime.
            following = self._next(travelling) if step + 1 < self.num_shards else None
            part, other = compute(travelling, step)
            others.append(other)
            if step == 0:
                own = part
            else:
                total = part if total is None else jax.tree.map(jnp.add, self._next(total), part)
            travelling = following
        # The last shard is that of the next device, so one more step takes each sum home.
        return jax.tree.map(jnp.add, own, self._next(total)), others

    def _next(self, tree):
        num_shards = self.num_shards
        to_next = [(shard, (shard + 1) % num_shards) for shard in range(num_shards)]
        # Any order of the devices is a ring; JAX wants that of the mesh.
        axis_names = sorted(self.axis_names, key=jax.sharding.get_abstract_mesh().axis_names.index)
        return jax.tree.map(lambda array: lax.ppermute(array, tuple(axis_names), to_next), tree)
