"""Expert choice: experts pick tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe.routers import route_expert_choice


def numpy_scores(logits, score):
    z = np.asarray(logits, np.float64)
    if score == "softmax":
        return np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    return 1 / (1 + np.exp(-z)) if score == "sigmoid" else np.sqrt(np.log1p(np.exp(z)))


@pytest.fixture
def logits():
    return jnp.asarray(np.random.default_rng(0).standard_normal((30, 5)), jnp.float32)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_each_expert_gets_its_best_tokens_with_their_scores_as_weights(score, logits, relative_error):
    routing = jax.jit(lambda z: route_expert_choice(z, 4, score=score, scale=2.0))(logits)
    scores = numpy_scores(logits, score)
    tokens = np.concatenate([np.argsort(-scores[:, e])[:4] for e in range(5)])
    experts = np.repeat(np.arange(5), 4)
    np.testing.assert_array_equal(routing.token_index, tokens)
    np.testing.assert_array_equal(routing.expert_index, experts)
    assert relative_error(routing.weight, 2 * scores[tokens, experts]) < 1e-6
    np.testing.assert_allclose(jmoe.expert_load(routing, 5), 0.2, rtol=1e-6)


def test_masked_tokens_are_not_picked_and_take_no_place(logits):
    mask = jnp.arange(30) % 3 > 0
    dirty = jnp.where(mask[:, None], logits, 99.0)
    routing = route_expert_choice(dirty, 4, mask=mask)
    expected = route_expert_choice(logits[mask], 4)
    np.testing.assert_array_equal(routing.token_index, np.flatnonzero(mask)[expected.token_index])
    np.testing.assert_array_equal(routing.expert_index, expected.expert_index)
    np.testing.assert_allclose(routing.weight, expected.weight, rtol=1e-6)


def test_nan_in_masked_tokens_does_not_leak(logits):
    mask = jnp.arange(30) < 25
    clean, dirty = (
        route_expert_choice(jnp.where(mask[:, None], logits, fill), 6, mask=mask) for fill in (0.0, jnp.nan)
    )
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


def test_where_few_tokens_are_left_the_rest_is_absent():
    routing = route_expert_choice(jnp.zeros((3, 2)), 3, mask=jnp.array([False, True, False]))
    present = routing.expert_index >= 0
    assert routing.token_index[present].tolist() == [1, 1]
    assert routing.expert_index[present].tolist() == [0, 1]
    assert not routing.weight[~present].any()


def test_a_single_token_goes_to_every_expert():
    routing = route_expert_choice(jnp.array([[0.0, 1.0, 2.0]]), 1)
    assert routing.token_index.tolist() == [0, 0, 0]
    assert routing.expert_index.tolist() == [0, 1, 2]


def test_gradients_of_the_weights_match_finite_differences():
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        logits, direction, dw = (rng.standard_normal(s) for s in ((6, 3), (6, 3), (6,)))

        def loss(logits):
            return jnp.sum(route_expert_choice(logits, 2).weight * dw)

        slope = np.sum(jax.grad(loss)(jnp.asarray(logits)) * direction)
        up, down = (loss(jnp.asarray(logits + sign * 1e-6 * direction)) for sign in (1, -1))
        np.testing.assert_allclose(slope, (up - down) / 2e-6, rtol=1e-6)


def test_the_capacity_may_be_a_mean_number_of_experts_per_token(logits):
    routing, expected = route_expert_choice(logits, capacity_factor=1.1), route_expert_choice(logits, 7)
    np.testing.assert_array_equal(routing.token_index, expected.token_index)
    for capacities in ({}, {"capacity": 7, "capacity_factor": 1.1}):
        with pytest.raises(ValueError, match="give one of them"):
            route_expert_choice(logits, **capacities)


@pytest.mark.parametrize("capacity", [0, 31])
def test_a_capacity_that_is_no_number_of_tokens_raises(capacity, logits):
    with pytest.raises(ValueError, match=f"capacity is {capacity}; it must be between 1 and the number of tokens, 30"):
        route_expert_choice(logits, capacity)
