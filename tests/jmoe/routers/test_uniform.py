"""Uniform assignment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe.routers import route_uniform


@pytest.fixture
def logits():
    return jnp.asarray(np.random.default_rng(0).standard_normal((20, 6)), jnp.float32)


@pytest.mark.parametrize("k", [1, 4, 6])
def test_tokens_get_different_experts_in_turn_with_the_weights_of_top_k(k, logits):
    routing = jax.jit(lambda z: route_uniform(z, k, score="sigmoid", normalize=False))(logits)
    assert routing.expert_index.tolist() == [[(t * k + j) % 6 for j in range(k)] for t in range(20)]
    top_k = jmoe.route_top_k(logits, k, score="sigmoid", normalize=False)
    np.testing.assert_allclose(routing.weight, top_k.weight, rtol=1e-6)


def test_masked_tokens_do_not_spoil_the_balance(logits):
    mask = jnp.arange(20) % 5 > 1  # 12 tokens
    routing = route_uniform(jnp.where(mask[:, None], logits, jnp.nan), 2, mask=mask)
    assert (routing.expert_index[~mask] == -1).all()
    np.testing.assert_allclose(jmoe.expert_load(routing, 6), 1 / 6, rtol=1e-6)
    assert np.isfinite(routing.weight).all()


def test_the_weights_have_the_gradients_of_top_k(logits):
    def loss(route):
        return jax.grad(lambda z: jnp.sum(jnp.sin(route(z, 2).weight)))(logits)

    np.testing.assert_allclose(loss(route_uniform), loss(jmoe.route_top_k), rtol=1e-6)
