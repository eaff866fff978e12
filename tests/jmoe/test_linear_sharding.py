"""`ParallelLinear` and `LoRAExperts` with the tokens sharded over eight devices, against one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jmoe
from jmoe.sharding import reshard

T, K, E, D, N = 24, 2, 4, 5, 6
AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit
NORMAL = nnx.initializers.normal(1.0)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.fixture(params=["linear", "experts with adapters", "a dense kernel with adapters"])
def module(request):
    if request.param == "linear":
        return jmoe.ParallelLinear(D, N, E, use_bias=True, bias_init=NORMAL, rngs=nnx.Rngs(0))
    kernel = normal(0, E, D, N) if request.param.startswith("experts") else normal(0, D, N)
    return jmoe.LoRAExperts(kernel, 3, num_experts=E, b_init=NORMAL, rngs=nnx.Rngs(0))


@pytest.fixture
def tokens():
    """x, routing weights and expert indices, some absent, and the cotangent of y."""
    rng = np.random.default_rng(1)
    expert_index = np.argsort(rng.random((T, E)), axis=1)[:, :K].astype(np.int32)
    expert_index[:5, 1] = -1
    return normal(2, T, D), jnp.asarray(rng.random((T, K)), jnp.float32), jnp.asarray(expert_index), normal(3, T, N)


def apply_to(graphdef):
    def apply(state, x, weights, expert_index):
        dispatch = jmoe.make_dispatch(jmoe.Routing(expert_index, weights), E)
        return nnx.merge(graphdef, state)(x, dispatch, weights=weights)

    return apply


def output_and_gradients(apply, state, x, weights, expert_index, dy):
    def loss(state, x, weights):
        y = apply(state, x, weights, expert_index)
        return jnp.sum(y * dy), y

    return jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(state, x, weights))


@pytest.mark.sample(4)
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_each_shards_own_tokens_give_the_output_and_gradients_of_one_device(kind, module, tokens, relative_error):
    graphdef, state = nnx.split(module)
    expected = output_and_gradients(apply_to(graphdef), state, *tokens)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    replicated, data = jax.P(), jax.P("data")
    with jax.set_mesh(mesh):
        apply = jax.shard_map(
            apply_to(graphdef), in_specs=(replicated, data, data, data), out_specs=data, check_vma=False
        )
        actual = output_and_gradients(apply, reshard(replicated, state), *reshard(data, tokens))
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < 5e-6


def test_the_partitioner_of_an_auto_mesh_gives_the_output_and_gradients_of_one_device(module, tokens, relative_error):
    graphdef, state = nnx.split(module)
    expected = output_and_gradients(apply_to(graphdef), state, *tokens)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AUTO,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(tokens, jax.NamedSharding(mesh, jax.P("data")))
        actual = output_and_gradients(apply_to(graphdef), state, *sharded)
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < 5e-6
