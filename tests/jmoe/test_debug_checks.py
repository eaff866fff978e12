"""`jmoe.debug_checks` turns values that break a rule into checkify errors."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental import checkify

import jmoe
from jmoe.models.attention import KVCache, cached_attention


def error_of(function, *arguments):
    """The checkify error of a function that has been compiled, and run without the checks, before."""
    compiled = jax.jit(function)
    compiled(*arguments)
    with jmoe.debug_checks():
        error, _ = jax.jit(checkify.checkify(compiled))(*arguments)
    return error.get()


def moe_mlp(token_index, expert_index, weight):
    routing = jmoe.Assignments(token_index, expert_index, weight)
    return jmoe.moe_mlp(jnp.ones((3, 2)), jnp.ones((2, 2, 8)), jnp.ones((2, 4, 2)), routing)


def parallel_linear(token_index, expert_index, weight):
    dispatch = jmoe.make_dispatch(jmoe.Assignments(token_index, expert_index, weight), 2)
    return jmoe.parallel_linear(jnp.ones((3, 2)), jnp.ones((2, 2, 8)), dispatch, weights=weight)


def test_nan_logits_are_reported_with_the_number_of_tokens():
    logits = jnp.ones((4, 3)).at[1, 2].set(jnp.nan)
    assert "logits hold NaN for 1 of 4 tokens" in error_of(lambda z: jmoe.route_top_k(z, 2), logits)


@pytest.mark.parametrize(
    ("token_index", "expert_index", "weight", "message"),
    [
        (
            [0, 2],
            [1, 5],
            [1.0, 1.0],
            "expert_index lies between 0 and 5; it must be in [0, E), or -1 where absent",
        ),
        ([0, 3], [1, 0], [1.0, 1.0], "token_index of a present assignment is outside [0, T)"),
        ([0, 2], [1, 0], [1.0, jnp.inf], "the routing weight of a present assignment is not finite"),
    ],
)
def test_a_routing_that_breaks_a_rule_is_reported(token_index, expert_index, weight, message):
    assert message in error_of(moe_mlp, *map(jnp.array, (token_index, expert_index, weight)))


def test_a_placement_hides_no_index_that_breaks_a_rule():
    def placed(expert_index):
        routing = jmoe.Routing(expert_index, jnp.ones((2, 1)))
        placement = jmoe.ExpertPlacement(((1,), (0,)))
        return jmoe.moe_mlp(
            jnp.ones((2, 2)), jnp.ones((2, 2, 8)), jnp.ones((2, 4, 2)), routing, expert_placement=placement
        )

    assert error_of(placed, jnp.array([[1], [-1]])) is None
    assert "expert_index lies between 0 and 5; it must be in [0, E)" in error_of(placed, jnp.array([[0], [5]]))


@pytest.mark.parametrize(
    ("token_index", "weight", "message"),
    [
        ([0, 3], [1.0, 1.0], "the token index of a present assignment is outside [0, T)"),
        ([0, 2], [1.0, jnp.inf], "the weight of a present assignment is not finite"),
    ],
)
def test_a_dispatch_that_breaks_a_rule_is_reported(token_index, weight, message):
    assert message in error_of(parallel_linear, jnp.array(token_index), jnp.array([1, 0]), jnp.array(weight))


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([[3], [4]], "a position is outside [0, C), the slots of the cache"),
        ([[0, 1], [2, 3]], "starts past position 0 of its cache"),
        ([[0, 1], [0, 1]], None),
    ],
)
def test_positions_that_a_cache_cannot_serve_are_reported(positions, message):
    positions, slots = jnp.array(positions), jnp.zeros((2, 4, 1, 2))

    def attend(positions, slots):
        heads = jnp.ones((*positions.shape, 1, 2))
        return cached_attention(heads, heads, heads, positions, None, KVCache(slots, slots), "xla")[0]

    error = error_of(attend, positions, slots)
    assert error is None if message is None else message in error


@pytest.mark.parametrize("function", [moe_mlp, parallel_linear])
def test_absent_assignments_may_hold_anything(function):
    assert error_of(function, jnp.array([0, 9]), jnp.array([1, -1]), jnp.array([1.0, jnp.nan])) is None


def test_the_checks_refuse_a_mesh():
    moe = jmoe.MoE(4, 8, 2, 1, rngs=nnx.Rngs(0))
    mesh = jax.make_mesh((2,), ("expert",))
    message = "run the checks on one device"
    with jax.set_mesh(mesh), jmoe.debug_checks(), pytest.raises(ValueError, match=message):
        moe(jnp.ones((2, 4)))


def test_a_layer_passes_the_checks_and_its_masked_tokens_may_be_nan():
    moe = nnx.clone(jmoe.MoE(4, 8, 3, 2, rngs=nnx.Rngs(0)))
    x = jnp.ones((3, 4)).at[0].set(jnp.nan)
    assert error_of(lambda x, mask: moe(x, mask=mask)[0], x, jnp.array([False, True, True])) is None
    assert "logits hold NaN for 1 of 3 tokens" in error_of(lambda x: moe(x)[0], x)
