"""Experts without parameters: identity and zero."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import jmoe
from jmoe.routers import split_zero_experts


def test_outputs_are_those_of_experts_that_return_their_input_or_nothing(relative_error):
    rng = np.random.default_rng(0)
    x, logits, w_up, w_down = (
        jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((30, 4), (30, 7), (3, 4, 5), (3, 5, 4))
    )
    routing = jmoe.route_top_k(logits, 3)

    @jax.jit
    def layer(x, routing):
        computed, identity_weight = split_zero_experts(routing, 3, 30, num_identity=2)
        return jmoe.moe_mlp(x, w_up, w_down, computed, activation="relu") + identity_weight[:, None] * x

    expected = np.zeros((30, 4))
    for t in range(30):
        for e, w in zip(np.asarray(routing.expert_index[t]), np.asarray(routing.weight[t]), strict=True):
            if e < 3:
                expected[t] += w * (np.maximum(x[t] @ w_up[e], 0) @ w_down[e])
            elif e < 5:
                expected[t] += w * x[t]
    assert relative_error(layer(x, routing), expected) < 1e-6


def test_absent_assignments_stay_absent_and_nan_weights_there_do_not_leak():
    routing = jmoe.Routing(jnp.array([[-1, 2], [0, 9]]), jnp.array([[jnp.nan, 0.5], [1.0, jnp.nan]]))
    computed, identity_weight = split_zero_experts(routing, 2, 2, num_identity=1)
    assert computed.expert_index.tolist() == [[-1, -1], [0, -1]]
    assert identity_weight.tolist() == [0.5, 0]


def test_identity_weights_carry_gradients_to_the_router():
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        logits, direction = (rng.standard_normal((5, 4)) for _ in range(2))

        def loss(logits):
            return jnp.sum(split_zero_experts(jmoe.route_top_k(logits, 2), 2, 5, num_identity=1)[1] ** 2)

        slope = np.sum(jax.grad(loss)(jnp.asarray(logits)) * direction)
        up, down = (loss(jnp.asarray(logits + sign * 1e-6 * direction)) for sign in (1, -1))
        np.testing.assert_allclose(slope, (up - down) / 2e-6, rtol=1e-6)


def test_flat_assignments_are_split_alike():
    rng = np.random.default_rng(2)
    routing = jmoe.route_top_k(jnp.asarray(rng.standard_normal((9, 6)), jnp.float32), 3)
    order = rng.permutation(27)
    token_index = jnp.asarray(np.repeat(np.arange(9), 3)[order])
    flat = jmoe.Assignments(token_index, routing.expert_index.ravel()[order], routing.weight.ravel()[order])
    flat = jax.tree.map(lambda a: jnp.append(a, jnp.asarray([4], a.dtype)), flat)
    flat = dataclasses.replace(flat, token_index=flat.token_index.at[-1].set(9))  # a token that is not there
    expected, expected_weight = split_zero_experts(routing, 3, 9, num_identity=2)
    computed, weight = split_zero_experts(flat, 3, 9, num_identity=2)
    np.testing.assert_allclose(weight, expected_weight, rtol=1e-6)
    np.testing.assert_array_equal(computed.expert_index[:-1], np.asarray(expected.expert_index).ravel()[order])


def choose_two(logits, mask=None):
    """Top-2, as a flat list."""
    routing = jmoe.route_top_k(logits, 2)
    token_index = jnp.repeat(jnp.arange(logits.shape[0]), 2)
    return jmoe.Assignments(token_index, routing.expert_index.ravel(), routing.weight.ravel())


@pytest.mark.parametrize("options", [{"top_k": 2}, {"router": choose_two}], ids=["slots", "flat"])
@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_the_layer_adds_what_identity_experts_return(options, weight_on, relative_error):
    sizes = {"num_identity_experts": 2, "num_zero_experts": 1, "weight_on": weight_on}
    moe = jmoe.MoE(8, 10, 4, activation="relu", **sizes, **options, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((8, 5, 8)), jnp.float32)
    mask = jnp.asarray(rng.random((8, 5)) < 0.8)
    kernel, w_up, w_down = (np.asarray(p[...], np.float64) for p in (moe.router.kernel, moe.w_up, moe.w_down))
    assert kernel.shape == (8, 7)
    assert w_up.shape == (4, 8, 10)

    expected, load = np.zeros((8, 5, 8)), np.zeros(7)
    for place in np.argwhere(mask):
        row = np.asarray(x[tuple(place)], np.float64)
        z = row @ kernel
        chosen = np.argsort(-z)[:2]
        weights = np.exp(z[chosen]) / np.exp(z[chosen]).sum()
        for e, w in zip(chosen, weights, strict=True):
            load[e] += 1
            if e < 4 and weight_on == "output":
                expected[tuple(place)] += w * (np.maximum(row @ w_up[e], 0) @ w_down[e])
            elif e < 4:
                expected[tuple(place)] += np.maximum(w * row @ w_up[e], 0) @ w_down[e]
            elif e < 6:
                expected[tuple(place)] += w * row

    run = nnx.jit(lambda moe, x: moe(x, mask=mask))
    dirty = jnp.where(mask[..., None], x, jnp.nan)
    y, aux = run(moe, dirty)
    assert load[4:].all()
    assert relative_error(y, expected) < 2e-6
    np.testing.assert_allclose(aux.expert_load, load / load.sum(), rtol=1e-6)
    assert aux.dropped_fraction == 0
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)):
        y, aux = run(moe, dirty)
    assert relative_error(y, expected) < 2e-6
    np.testing.assert_allclose(aux.expert_load, load / load.sum(), rtol=1e-6)


def test_tokens_that_all_go_to_identity_experts_pass_through():
    moe = jmoe.MoE(8, 10, 2, 1, num_identity_experts=1, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    moe.router.kernel[...] = jnp.zeros((8, 3)).at[:, 2].set(1.0)
    x = jnp.ones((1, 8))
    y, aux = nnx.jit(lambda moe, x: moe(x))(moe, x)
    assert y.dtype == jnp.bfloat16
    assert y.tolist() == x.tolist()
    assert aux.expert_load.tolist() == [0, 0, 1]


def test_a_router_with_other_logits_than_there_are_experts_raises():
    router = jmoe.routers.LinearRouter(8, 7, jmoe.route_top_k, k=2, rngs=nnx.Rngs(0))
    moe = jmoe.MoE(8, 10, 6, router=router, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"gives logits \[5, 7\]; they must be \[T, 6\]: as many as num_experts, "):
        moe(jnp.ones((5, 8)))


def test_bad_numbers_raise():
    routing = jmoe.Routing(jnp.zeros((1, 1), int), jnp.ones((1, 1)))
    with pytest.raises(ValueError, match="num_experts is 0 and num_identity 1"):
        split_zero_experts(routing, 0, 1, num_identity=1)
