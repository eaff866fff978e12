"""The baseline: a layer whose rows travel by `jax.lax.ragged_all_to_all`."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

import jmoe
from benchmarks.jax_matmuls import kernel_implementation
from benchmarks.layers import Configuration


def rows_received(expert_index: np.ndarray, num_experts: int, num_devices: int) -> int:
    """Counts the rows of the device that receives most.

    Args:
        expert_index: [T, K], of the tokens of all devices.
        num_experts: E, split evenly over the devices.
        num_devices: n.
    """
    return int(np.bincount(expert_index.ravel() // (num_experts // num_devices), minlength=num_devices).max())


def ragged_layer(
    configuration: Configuration, max_rows: int, ragged_all_to_all: Callable[..., Array] = lax.ragged_all_to_all
) -> Callable[..., Array]:
    """Makes a layer that sends each assignment's row to its expert's device and the output back, in one exchange each.

    The experts are computed by this project's layer, and derivatives are JAX's. It knows beforehand how many rows the
    fullest device gets, which no program that trains does: it would need room for `n * T * min(K, E/n)`.

    Args:
        configuration: The shapes; T are the tokens of each device.
        max_rows: Rows that a device has room for, at least those of `rows_received`.
        ragged_all_to_all: As in `jax.lax`.

    Returns:
        A function of a device's x [T, D], w_up, w_down and logits [T, E], inside a `jax.shard_map` over "expert".
    """
    T, K, D = configuration.T, configuration.K, configuration.D

    def layer(x: Array, w_up: Array, w_down: Array, logits: Array) -> Array:
        num_local, shard = w_up.shape[0], lax.axis_index("expert")
        routing = jmoe.route_top_k(logits, K)
        expert = routing.expert_index.ravel()
        order = jnp.argsort(expert, stable=True)
        of_expert = jnp.bincount(expert, length=configuration.E).astype(jnp.int32)
        counts = lax.all_gather(of_expert, "expert").reshape(-1, configuration.E // num_local, num_local)
        sizes = counts.sum(axis=2)  # [from, to]
        starts_here = _starts(sizes, axis=1)  # in the rows of the sender
        starts_there = _starts(sizes, axis=0)  # in those of the receiver

        def exchange(rows: Array, size: int, sends: tuple[Array, Array], receives: tuple[Array, Array]) -> Array:
            (send_starts, send_sizes), (receive_starts, receive_sizes) = sends, receives
            output = jnp.zeros((size, D), rows.dtype)
            return ragged_all_to_all(
                rows, output, send_starts, send_sizes, receive_starts, receive_sizes, axis_name="expert"
            )

        there = starts_there[shard], sizes[:, shard]
        received = exchange(x[order // K], max_rows, (starts_here[shard], sizes[shard]), there)
        # Those of each sender are sorted by expert.
        num_received = counts[:, shard].ravel()
        local = jnp.tile(jnp.arange(num_local), len(counts))
        local = jnp.repeat(local, num_received, total_repeat_length=max_rows)
        local = jnp.where(jnp.arange(max_rows) < num_received.sum(), local, -1)
        v = jmoe.moe_mlp(
            received,
            w_up,
            w_down,
            jmoe.Routing(local[:, None], jnp.ones((max_rows, 1))),
            activation=configuration.activation,
            implementation=kernel_implementation(),
        )
        sent_back = starts_there[:, shard], sizes[:, shard]
        v = exchange(v, T * K, sent_back, (starts_here[:, shard], sizes[shard]))
        v_of_token = v[jnp.argsort(order)].reshape(T, K, D)
        return jnp.einsum("tk,tkd->td", routing.weight, v_of_token.astype(jnp.float32)).astype(x.dtype)

    return layer


def _starts(sizes: Array, axis: int) -> Array:
    return jnp.cumsum(sizes, axis=axis, dtype=jnp.int32) - sizes
