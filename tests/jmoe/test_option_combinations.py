"""Options of `jmoe.MoE` together: routers, identity experts, capacity, shared experts, experts of different widths."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jmoe

T, D, F, E, K = 24, 12, 8, 4, 2
X = jnp.asarray(np.random.default_rng(0).standard_normal((T, D)), jnp.float32)


def apply(moe: jmoe.MoE, x: jax.Array = X):
    return nnx.jit(lambda moe, x: moe(x))(moe, x)


def layer(**options: Any) -> jmoe.MoE:
    return jmoe.MoE(D, F, E, activation="relu", bias_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(0), **options)


def mlp(w_up, w_down, x):
    return np.maximum(x @ np.asarray(w_up), 0) @ np.asarray(w_down)


def test_identity_experts_capacity_weighted_sum_and_output_bias_follow_the_formulas():
    moe = layer(
        top_k=K,
        num_identity_experts=2,
        num_zero_experts=1,
        capacity_factor=0.5,
        shared_hidden_features=5,
        shared_combine="weighted_sum",
        use_output_bias=True,
    )
    y, aux = apply(moe)

    assert moe.shared is not None
    assert moe.bias is not None
    x = np.asarray(X)
    logits = x @ np.asarray(moe.router.kernel[...])
    chosen = np.argsort(-logits, axis=1)[:, :K]
    weight = np.exp(np.take_along_axis(logits, chosen, axis=1))
    weight /= weight.sum(axis=1, keepdims=True)
    capacity, taken, dropped = int(np.ceil(0.5 * T * K / E)), np.zeros(E, int), 0
    expected = np.zeros((T, D))
    for k in range(K):  # all first choices before the second ones
        for t in range(T):
            expert = chosen[t, k]
            if expert < E and taken[expert] < capacity:
                taken[expert] += 1
                expected[t] += weight[t, k] * mlp(moe.w_up[expert], moe.w_down[expert], x[t])
            elif expert < E:
                dropped += 1
            elif expert < E + 2:
                expected[t] += weight[t, k] * x[t]
    shared = mlp(moe.shared.w_up[...], moe.shared.w_down[...], x)
    expected = (K * expected + shared) / (K + 1) + np.asarray(moe.bias[...])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    assert dropped > 0
    np.testing.assert_allclose(aux.dropped_fraction, dropped / np.sum(chosen < E), rtol=1e-6)


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_an_assignment_list_is_limited_by_its_own_number_of_assignments(capacity_factor):
    # Perfectly balanced, so that a factor of 1 drops nothing.
    route = functools.partial(jmoe.routers.route_expert_choice, capacity=6)
    y, aux = apply(layer(router=route, capacity_factor=capacity_factor))
    expected, _ = apply(layer(router=route))
    np.testing.assert_array_equal(y, expected)
    assert aux.dropped_fraction == 0


def test_half_the_places_drop_half_of_what_experts_choose():
    route = functools.partial(jmoe.routers.route_expert_choice, capacity=6)
    _, aux = apply(layer(router=route, capacity_factor=0.5))
    assert aux.dropped_fraction == 0.5
    assert aux.expert_load.tolist() == [1 / E] * E


def test_a_weighted_sum_counts_the_experts_that_a_router_of_the_users_gives():
    def route(logits):
        return jmoe.route_top_k(logits, 3)

    options = {"shared_hidden_features": 5, "shared_combine": "weighted_sum"}
    expected, _ = apply(layer(top_k=3, **options))
    y, _ = apply(layer(router=route, **options))
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("remat", [False, True])
def test_experts_of_different_widths_take_routers_capacity_and_a_shared_expert(remat):
    widths = (64, 128, 64)
    moe = jmoe.MoE(
        D,
        widths,
        3,
        activation="relu",
        router=functools.partial(jmoe.routers.route_group_limited, k=1),
        capacity_factor=1.0,
        shared_hidden_features=5,
        shared_combine="sigmoid_gate",
        remat=remat,
        rngs=nnx.Rngs(0),
    )
    y, aux = apply(moe)
    assert moe.shared is not None
    assert moe.shared.gate is not None
    x = np.asarray(X)
    gate = 1 / (1 + np.exp(-x @ np.asarray(moe.shared.gate[...])))
    expected = gate * mlp(moe.shared.w_up[...], moe.shared.w_down[...], x)
    starts, taken, dropped = np.cumsum((0, *widths)), np.zeros(3, int), 0
    for t, expert in enumerate(np.argmax(x @ np.asarray(moe.router.kernel[...]), axis=1)):
        taken[expert] += 1
        if taken[expert] > T // 3:
            dropped += 1
            continue
        of_expert = slice(starts[expert], starts[expert + 1])
        expected[t] += mlp(moe.w_up[:, of_expert], moe.w_down[of_expert], x[t])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(aux.dropped_fraction, dropped / T, rtol=1e-6)

    gradients = nnx.jit(nnx.grad(lambda moe, x: jnp.sum(moe(x)[0] ** 2)))(moe, X)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert np.any(gradients.w_up[...])


def test_a_capacity_is_that_of_all_devices_together_for_any_router():
    moe = layer(router=jmoe.routers.LinearRouter(D, E, jmoe.route_top_k, k=K, rngs=nnx.Rngs(1)), capacity_factor=0.75)
    x = X.reshape(4, 6, D)
    expected, expected_aux = apply(moe, x)
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "expert"))):
        y, aux = apply(moe, jax.device_put(x, jax.P(("data", "expert"))))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert expected_aux.dropped_fraction > 0
    np.testing.assert_allclose(aux.dropped_fraction, expected_aux.dropped_fraction, rtol=1e-6)
