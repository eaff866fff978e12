"""Routing: which experts tokens go to, with what weight."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe


def softmax(z):
    z = np.exp(z - z.max(axis=-1, keepdims=True))
    return z / z.sum(axis=-1, keepdims=True)


@pytest.fixture
def logits():
    return jnp.asarray(np.random.default_rng(0).standard_normal((50, 8)) * 3, jnp.float32)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("score_order", ["before_top_k", "after_top_k"])
@pytest.mark.parametrize("normalize", [True, False])
def test_weights_follow_the_formulas(score, score_order, normalize, logits, relative_error):
    routing = jmoe.route_top_k(logits, 3, score=score, score_order=score_order, normalize=normalize, scale=2.5)
    z = np.asarray(logits, np.float64)
    expected_index = np.argsort(-z, axis=1)[:, :3]
    chosen = np.take_along_axis(z, expected_index, axis=1)
    if score == "sigmoid":
        weight = 1 / (1 + np.exp(-chosen))
    elif score == "sqrt_softplus":
        weight = np.sqrt(np.log1p(np.exp(chosen)))
    elif score_order == "before_top_k":
        weight = np.take_along_axis(softmax(z), expected_index, axis=1)
    else:
        weight = softmax(chosen)
    if normalize:
        weight /= weight.sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(routing.expert_index, expected_index)
    assert routing.weight.dtype == jnp.float32
    assert relative_error(routing.weight, 2.5 * weight) < 1e-6


@pytest.mark.parametrize("p", [1.0, 2.0, 0.5, 3.0, math.inf])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_weights_may_be_divided_by_a_p_norm(p, score, logits, relative_error):
    routing = jax.jit(lambda z: jmoe.route_top_k(z, 3, score=score, normalize=p))(logits)
    z = np.asarray(logits, np.float64)
    s = softmax(z) if score == "softmax" else 1 / (1 + np.exp(-z))
    s = np.take_along_axis(s, np.asarray(routing.expert_index), axis=1)
    assert relative_error(routing.weight, s / np.linalg.norm(s, ord=p, axis=1, keepdims=True)) < 1e-6


def test_gradients_of_a_p_norm_match_finite_differences():
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        logits, direction, dw = (rng.standard_normal(s) for s in ((4, 5), (4, 5), (4, 2)))

        def loss(logits):
            return jnp.sum(jmoe.route_top_k(logits, 2, score="sigmoid", normalize=2.0).weight * dw)

        slope = np.sum(np.asarray(jax.grad(loss)(jnp.asarray(logits))) * direction)
        up, down = (loss(jnp.asarray(logits + sign * 1e-6 * direction)) for sign in (1, -1))
        np.testing.assert_allclose(slope, (up - down) / 2e-6, rtol=1e-6)


def test_the_defaults_are_a_normalised_softmax_before_top_k(logits):
    routing = jmoe.route_top_k(logits, 2)
    named = jmoe.route_top_k(logits, 2, score="softmax", score_order="before_top_k", normalize=True, scale=1.0)
    jax.tree.map(np.testing.assert_array_equal, routing, named)
    np.testing.assert_allclose(routing.weight.sum(axis=1), 1, rtol=1e-6)


def test_equal_logits_go_to_the_lower_expert_first():
    routing = jmoe.route_top_k(jnp.array([[1.0, 2.0, 2.0, 1.0]]), 3)
    assert routing.expert_index.tolist() == [[1, 2, 0]]


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_weights_sum_to_one_even_where_every_score_underflows(score):
    logits = jnp.array([[-200.0, -201.0, 500.0, -202.0], [-300.0, -300.0, -300.0, -300.0]])
    routing = jmoe.route_top_k(logits[:, [0, 1, 3]], 2, score=score)
    np.testing.assert_allclose(routing.weight.sum(axis=1), 1, rtol=1e-6)


def test_bfloat16_logits_are_scored_in_float32(logits):
    logits = logits.astype(jnp.bfloat16)
    routing = jmoe.route_top_k(logits, 2)
    expected = jmoe.route_top_k(logits.astype(jnp.float32), 2)
    jax.tree.map(np.testing.assert_array_equal, routing, expected)


def test_float64_logits_are_scored_in_float64(logits):
    with jax.enable_x64(True):
        assert jmoe.route_top_k(logits.astype(jnp.float64), 2).weight.dtype == jnp.float64


def test_nan_logits_spoil_their_own_token_only():
    logits = jnp.array([[0.0, jnp.nan, 1.0], [2.0, 1.0, 0.0]])
    routing = jmoe.route_top_k(logits, 2)
    assert np.isnan(routing.weight[0]).all()
    assert ((routing.expert_index >= 0) & (routing.expert_index < 3)).all()
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.map(lambda a: a[1:], routing),
        jmoe.route_top_k(logits[1:], 2),
    )


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_gradients_of_the_weights_match_finite_differences(score):
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        logits, direction, dw = (rng.standard_normal(s) for s in ((4, 5), (4, 5), (4, 2)))

        @jax.jit
        def loss(logits):
            return jnp.sum(jmoe.route_top_k(logits, 2, score=score).weight * dw)

        slope = np.sum(np.asarray(jax.grad(loss)(jnp.asarray(logits))) * direction)
        up, down = (loss(jnp.asarray(logits + sign * 1e-6 * direction)) for sign in (1, -1))
        np.testing.assert_allclose(slope, (up - down) / 2e-6, rtol=1e-6)


def test_gradients_of_sqrt_softplus_stay_finite_and_right_at_extreme_logits():
    logits = jnp.array([[-500.0, -39.0, -41.0, 0.0, 90.0]])

    def sum_of_weights(z):
        return jnp.sum(jmoe.route_top_k(z, 5, score="sqrt_softplus", normalize=False).weight)

    gradient = jax.grad(sum_of_weights)(logits)
    z = np.asarray(logits, np.float64)
    with np.errstate(over="ignore"):
        expected = 1 / (1 + np.exp(-z)) / (2 * np.sqrt(np.log1p(np.exp(z))))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-30)


def test_masked_tokens_are_absent():
    mask = jnp.array([True, False])
    routing = jmoe.route_top_k(jnp.array([[0.0, 1.0], [1.0, 0.0]]), 1, mask=mask)
    assert routing.expert_index.tolist() == [[1], [-1]]


def test_masking_makes_the_assignments_of_a_token_absent():
    routing = jmoe.Routing(jnp.array([[0, 1], [1, 2]]), jnp.ones((2, 2)))
    masked = routing.masked(jnp.array([True, False]))
    assert masked.expert_index.tolist() == [[0, 1], [-1, -1]]
    assert masked.weight.tolist() == [[1, 1], [0, 0]]
    flat = jmoe.Assignments(jnp.array([1, 0, 5, -1]), jnp.array([0, 1, 2, 2]), jnp.ones(4))
    assert flat.masked(jnp.array([True, False])).expert_index.tolist() == [-1, 1, -1, -1]


def test_routings_pass_through_jit_vmap_and_eval_shape(logits):
    batched = jax.vmap(lambda z: jmoe.route_top_k(z, 2))(logits.reshape(5, 10, 8))
    flat = jax.jit(jmoe.route_top_k, static_argnums=1)(logits, 2)
    np.testing.assert_array_equal(batched.expert_index.reshape(50, 2), flat.expert_index)
    assert jax.eval_shape(lambda z: jmoe.route_top_k(z, 2), logits).weight.shape == (50, 2)


@pytest.mark.usefixtures("without_annotation_checks")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k is 0; it must be between 1 and the number of experts, 8"),
        ({"k": 9}, "k is 9"),
        ({"score": "tanh"}, "score is 'tanh'; it must be 'softmax', 'sigmoid' or 'sqrt_softplus'"),
        ({"normalize": 0}, "normalize is 0; it must be True, False or the p of a p-norm, more than 0"),
        ({"normalize": -2.0}, "normalize is -2.0"),
        ({"score_order": "first"}, "score_order is 'first'"),
        ({"logits": jnp.ones((2, 3, 8))}, r"logits is float32\[2, 3, 8\]"),
        ({"logits": jnp.ones((2, 8), jnp.int32)}, r"logits is int32"),
    ],
)
def test_a_bad_argument_is_a_value_error_that_names_it(arguments, message, logits):
    with pytest.raises(ValueError, match=message):
        jmoe.route_top_k(**{"logits": logits, "k": 2, **arguments})


@pytest.mark.usefixtures("without_annotation_checks")
def test_the_scale_may_be_traced():
    logits = jnp.array([[0.0, 2.0, 1.0]])
    traced = jax.jit(lambda scale: jmoe.route_top_k(logits, 2, scale=scale).weight)
    for scale in (1.0, 2.5):
        np.testing.assert_allclose(traced(scale), jmoe.route_top_k(logits, 2, scale=scale).weight, rtol=1e-6)
