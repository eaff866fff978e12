"""SparseMixer: random experts in training, with an estimated gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.routers import route_sparsemixer


def numpy_candidates(z, taken, jitter):
    """The softmax over an expert's near-best rivals, 0 for all others."""
    free = [e for e in range(len(z)) if e not in taken]
    best = max(z[e] for e in free)
    near = [e for e in free if (best - z[e]) / max(abs(z[e]), best) <= 2 * jitter]
    p = np.zeros(len(z))
    p[near] = np.exp(z[near] - best)
    return p / p.sum()


@pytest.fixture
def logits():
    return jnp.asarray(np.random.default_rng(0).standard_normal((60, 5)) + 2, jnp.float32)


@pytest.mark.parametrize("jitter", [0.01, 0.2])
def test_without_a_key_the_best_are_weighted_among_their_near_rivals(jitter, logits):
    routing = jax.jit(lambda z: route_sparsemixer(z, 3, jitter=jitter))(logits)
    for z, experts, weights in zip(
        np.asarray(logits, np.float64), np.asarray(routing.expert_index), routing.weight, strict=True
    ):
        assert experts.tolist() == np.argsort(-z)[:3].tolist()
        expected = [numpy_candidates(z, experts[:i], jitter)[e] for i, e in enumerate(experts)]
        np.testing.assert_allclose(weights, expected, rtol=1e-5)


def test_in_training_experts_are_drawn_and_their_weights_follow_heun(logits):
    keys = jax.random.split(jax.random.key(0), 3000)
    z = np.asarray(logits[0], np.float64)
    routing = jax.jit(jax.vmap(lambda key: route_sparsemixer(logits[:1], 2, key=key, jitter=0.3)))(keys)
    first, second = np.asarray(routing.expert_index)[:, 0].T
    weight = np.asarray(routing.weight)[:, 0, 0]
    p = numpy_candidates(z, [], 0.3)
    assert (p > 0).sum() > 1
    np.testing.assert_allclose(np.bincount(first, minlength=5) / 3000, p, atol=0.04)
    assert (first != second).all()
    ratio = weight / p[first]
    is_best = first == p.argmax()
    np.testing.assert_allclose(ratio[is_best], 1, rtol=1e-5)
    is_full = np.isclose(ratio[~is_best], 1, rtol=1e-5)
    np.testing.assert_allclose(ratio[~is_best][~is_full], 1 / 3, rtol=1e-5)
    assert abs(is_full.mean() - 0.25) < 0.05


def test_the_gradient_is_that_of_the_probability_of_what_was_drawn(logits):
    def weights(z):
        routing = route_sparsemixer(z, 1, key=jax.random.key(1), jitter=0.3)
        return routing.weight.sum(), routing.expert_index[:, 0]

    (_, drawn), gradient = jax.value_and_grad(weights, has_aux=True)(logits)
    assert (drawn != logits.argmax(axis=1)).any()
    for z, e, actual in zip(np.asarray(logits, np.float64), drawn, gradient, strict=True):
        p = numpy_candidates(z, [], 0.3)
        np.testing.assert_allclose(actual, p[e] * ((np.arange(5) == e) - p), atol=1e-6)


def test_all_experts_of_a_single_token_are_taken_where_k_is_all():
    for key in (None, jax.random.key(0)):
        routing = route_sparsemixer(jnp.array([[-1.0, -2.0, -1.5]]), 3, key=key)
        assert sorted(routing.expert_index[0].tolist()) == [0, 1, 2]
        assert np.isfinite(routing.weight).all()


def test_masked_tokens_are_absent_and_nan_spoils_its_own_token_only(logits):
    dirty = logits.at[0].set(jnp.nan).at[1].set(jnp.nan)
    routing = route_sparsemixer(dirty, 2, mask=jnp.arange(60) != 1)
    assert routing.expert_index[1].tolist() == [-1, -1]
    assert np.isnan(routing.weight[0]).all()
    expected = route_sparsemixer(logits, 2)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[2:], b[2:]), routing, expected)


def test_bad_arguments_raise(logits):
    with pytest.raises(ValueError, match="jitter is -1"):
        route_sparsemixer(logits, 2, jitter=-1.0)
    with pytest.raises(ValueError, match="k is 6"):
        route_sparsemixer(logits, 6)
