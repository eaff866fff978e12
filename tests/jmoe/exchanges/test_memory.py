"""What the exchanges keep and need is a matter of their chunks, not of the worst routing."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jmoe
from jmoe.exchanges import AllToAll, Gather, Ring
from jmoe.exchanges.replicas import Replication
from jmoe.grouped_mlp import ExpertParameters
from jmoe.local_mlp import mlp_options

T, D, F, K = 512, 64, 64, 2  # T tokens of each device
NUM_LOCAL = 2
OPTIONS = mlp_options((F,) * NUM_LOCAL, "swiglu", "output", False, "xla")
SHARDED = PartitionSpec("expert")
# The usual order on CPUs runs as much as possible at once, whatever memory that takes.
IN_ORDER = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def on_mesh(kind, num_devices, function, **options):
    """Maps a function of an exchange, x, routing and parameters over devices, and the shapes of its arguments."""
    mesh = jax.make_mesh((num_devices,), ("expert",), (AxisType.Auto,), devices=jax.devices()[:num_devices])
    num_experts = NUM_LOCAL * num_devices
    exchange = kind(("expert",), OPTIONS, num_experts, **options)

    def shape(*dimensions, dtype=jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(dimensions, dtype, sharding=NamedSharding(mesh, SHARDED))

    tokens = num_devices * T
    arguments = (
        shape(tokens, D),
        jmoe.Routing(shape(tokens, K, dtype=jnp.int32), shape(tokens, K)),
        ExpertParameters(shape(num_experts, D, 2 * F), shape(num_experts, F, D)),
    )
    function = functools.partial(function, exchange)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=SHARDED, out_specs=SHARDED, check_vma=False)
    return exchange, mapped, arguments


def forward_and_backward(exchange, x, routing, parameters):
    def apply(x, weight, parameters):
        return exchange(x, jmoe.Routing(routing.expert_index, weight), parameters)

    y, pull_back = jax.vjp(apply, x, routing.weight, parameters)
    return pull_back(jnp.sin(y))


def peak_bytes(kind, num_devices, **options):
    exchange, mapped, arguments = on_mesh(kind, num_devices, forward_and_backward, **options)
    memory: Any = jax.jit(mapped).lower(*arguments).compile(compiler_options=IN_ORDER).memory_analysis()
    return exchange, memory.temp_size_in_bytes


@pytest.mark.parametrize("slack", [1.125, pytest.param(2.25, marks=pytest.mark.exhaustive)])
def test_the_peak_of_the_all_to_all_is_a_matter_of_its_chunk(slack):
    """The worst routing, of all tokens to one expert, has n times the rows of random routing."""
    exchange, peak = peak_bytes(AllToAll, 8, slack=slack)
    received = 8 * exchange.chunk(T, K, NUM_LOCAL)
    rows = 8 * exchange.room_for_rows(T * K, NUM_LOCAL)
    parameters = NUM_LOCAL * 3 * D * F
    assert peak < 4 * (7 * received * D + 3 * rows * (2 * F + D) + 4 * T * D + 2 * parameters)
    if slack == 1.125:
        assert peak < 0.75 * peak_bytes(Gather, 8)[1]


def test_copies_of_experts_are_brought_again_and_not_kept_from_forward_to_backward():
    num_devices, num_tokens, width = 2, 16, 128
    placement = jmoe.ExpertPlacement(((0,), (1,)), ((jmoe.Replica(1, 0.5),), ()))
    options = mlp_options((width,) * 2, "swiglu", "output", False, "xla")
    exchange = Gather(("expert",), options, 4, replication=Replication(("expert",), placement))
    mesh = jax.make_mesh((num_devices,), ("expert",), (AxisType.Auto,), devices=jax.devices()[:num_devices])

    def peak_of(num_layers):
        def gradients(x, routing, layers):
            def loss(layers):
                y = x
                for parameters in layers:
                    y = jnp.sin(exchange(y, routing, parameters))
                return jnp.sum(y)

            return jax.grad(loss)(layers)

        def shape(*dimensions, dtype=jnp.float32) -> Any:
            return jax.ShapeDtypeStruct(dimensions, dtype, sharding=NamedSharding(mesh, SHARDED))

        routing = jmoe.Routing(shape(num_tokens, 1, dtype=jnp.int32), shape(num_tokens, 1))
        parameters = ExpertParameters(shape(2, width, 2 * width), shape(2, width, width))
        arguments = shape(num_tokens, width), routing, [parameters] * num_layers
        mapped = jax.shard_map(gradients, mesh=mesh, in_specs=SHARDED, out_specs=SHARDED, check_vma=False)
        with jax.set_mesh(mesh):
            compiled = jax.jit(mapped).lower(*arguments).compile(compiler_options=IN_ORDER)
        memory: Any = compiled.memory_analysis()
        return memory.temp_size_in_bytes

    # Each device has two experts of each layer while it computes that one.
    bytes_of_expert = 4 * 3 * width * width
    assert peak_of(6) < peak_of(2) + 2 * bytes_of_expert


@pytest.mark.parametrize("kind", [Gather, Ring, AllToAll])
def test_what_is_kept_is_one_shards_pre_activations_and_no_tokens_of_others(kind):
    """But those that the gather has gathered."""
    kept = []

    def forward(exchange, x, routing, parameters):
        _, of_exchange = exchange.forward(x, routing, parameters)
        kept.extend(jax.tree.leaves(of_exchange))
        return x

    num_devices = 8
    exchange, mapped, arguments = on_mesh(kind, num_devices, forward)
    jax.eval_shape(mapped, *arguments)
    of_tokens = [array.shape for array in kept if array.shape[-1:] == (D,)]
    assert of_tokens == ([(num_devices * T, D)] if kind is Gather else [])
    pre_activations = [array for array in kept if array.shape[-1:] == (2 * F,)]
    assert sum(len(h) for h in pre_activations) <= num_devices * exchange.room_for_rows(T * K, NUM_LOCAL)
    integers = [array for array in kept if array.shape[-1:] not in ((D,), (2 * F,))]
    # The routing, and where each row of the windows is: 5 numbers for each assignment that may be there.
    assert sum(array.size for array in integers) <= 5 * num_devices * T * K + 100 * num_devices
