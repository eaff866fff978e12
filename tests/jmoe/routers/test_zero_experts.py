"""Experts without parameters: identity and zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
        computed, identity_weight = split_zero_experts(routing, 3, num_identity=2)
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
    computed, identity_weight = split_zero_experts(routing, 2, num_identity=1)
    assert computed.expert_index.tolist() == [[-1, -1], [0, -1]]
    assert identity_weight.tolist() == [0.5, 0]


def test_identity_weights_carry_gradients_to_the_router():
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        logits, direction = (rng.standard_normal((5, 4)) for _ in range(2))

        def loss(logits):
            return jnp.sum(split_zero_experts(jmoe.route_top_k(logits, 2), 2, num_identity=1)[1] ** 2)

        slope = np.sum(jax.grad(loss)(jnp.asarray(logits)) * direction)
        up, down = (loss(jnp.asarray(logits + sign * 1e-6 * direction)) for sign in (1, -1))
        np.testing.assert_allclose(slope, (up - down) / 2e-6, rtol=1e-6)


def test_bad_numbers_raise():
    routing = jmoe.Routing(jnp.zeros((1, 1), int), jnp.ones((1, 1)))
    with pytest.raises(ValueError, match="num_experts is 0 and num_identity 1"):
        split_zero_experts(routing, 0, num_identity=1)
