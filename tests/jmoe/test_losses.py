"""Auxiliary losses and the expert load."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe


@pytest.fixture
def logits():
    return jnp.asarray(np.random.default_rng(0).standard_normal((40, 6)) * 2, jnp.float32)


def test_load_balancing_loss_follows_the_formula(logits):
    routing = jmoe.route_top_k(logits, 2)
    scores = np.asarray(jax.nn.softmax(logits), np.float64)
    share = np.bincount(np.asarray(routing.expert_index).ravel(), minlength=6) / 80
    loss = jmoe.load_balancing_loss(jax.nn.softmax(logits), routing)
    np.testing.assert_allclose(loss, 6 * np.sum(share * scores.mean(axis=0)), rtol=1e-6)


def test_load_balancing_loss_is_one_at_balance_and_the_number_of_experts_at_collapse():
    balanced = jmoe.Routing(jnp.arange(8).reshape(4, 2), jnp.ones((4, 2)))
    np.testing.assert_allclose(jmoe.load_balancing_loss(jnp.full((4, 8), 1 / 8), balanced), 1)
    collapsed = jmoe.Routing(jnp.full((4, 1), 3), jnp.ones((4, 1)))
    np.testing.assert_allclose(jmoe.load_balancing_loss(jax.nn.one_hot(jnp.full(4, 3), 8), collapsed), 8)


def test_times_k_it_is_hugging_faces_loss(logits):
    routing = jmoe.route_top_k(logits, 3)
    scores = np.asarray(jax.nn.softmax(logits), np.float64)
    # transformers' load_balancing_loss_func: the one-hot masks' mean over tokens, by slot, times mean score.
    expert_mask = np.eye(6)[np.asarray(routing.expert_index)]  # [T, K, E]
    hugging_face = 6 * np.sum(expert_mask.mean(axis=0) * scores.mean(axis=0))
    np.testing.assert_allclose(3 * jmoe.load_balancing_loss(jax.nn.softmax(logits), routing), hugging_face, rtol=1e-6)


def numpy_sequence_loss(logits, expert_index, mask):
    """DeepSeek-V3's sequence-wise loss, a sequence at a time; arrays [B, S, *]."""
    losses = []
    for z, chosen, kept in zip(np.asarray(logits, np.float64), expert_index, mask, strict=True):
        if kept.any():
            p = np.exp(z[kept]) / np.exp(z[kept]).sum(axis=1, keepdims=True)
            f = np.bincount(chosen[kept].ravel(), minlength=6) / chosen[kept].size * 6
            losses.append(np.sum(f * p.mean(axis=0)))
    return np.mean(losses)


@pytest.mark.parametrize("flat", [False, True])
def test_sequences_are_balanced_by_themselves(flat, logits):
    routing = jmoe.route_top_k(logits, 2)
    mask = np.random.default_rng(1).random(40) < 0.6
    mask[8:16] = False  # a sequence without tokens
    expected = numpy_sequence_loss(
        logits.reshape(5, 8, 6), np.asarray(routing.expert_index).reshape(5, 8, 2), mask.reshape(5, 8)
    )
    if flat:
        token = jnp.repeat(jnp.arange(40), 2)[::-1]
        routing = jmoe.Assignments(token, routing.expert_index.ravel()[::-1], routing.weight.ravel()[::-1])
    scores = jnp.where(mask[:, None], jax.nn.softmax(logits), jnp.nan)
    loss = jax.jit(lambda s: jmoe.sequence_balancing_loss(s, routing, 5, mask=jnp.asarray(mask)))
    np.testing.assert_allclose(loss(scores), expected, rtol=1e-6)
    assert not jax.grad(loss)(scores)[~mask].any()


def test_one_sequence_is_balanced_like_a_layer_and_none_gives_zero(logits):
    routing, scores = jmoe.route_top_k(logits, 2), jax.nn.softmax(logits)
    whole = jmoe.load_balancing_loss(scores, routing)
    np.testing.assert_allclose(jmoe.sequence_balancing_loss(scores, routing, 1), whole, rtol=1e-6)
    assert jmoe.sequence_balancing_loss(scores, routing, 5, mask=jnp.zeros(40, bool)) == 0


def test_sequences_that_do_not_divide_the_tokens_raise(logits):
    with pytest.raises(ValueError, match="num_sequences is 7; it must divide the number of tokens, 40"):
        jmoe.sequence_balancing_loss(jax.nn.softmax(logits), jmoe.route_top_k(logits, 2), 7)


def test_the_pooled_loss_times_k_is_hugging_faces_loss_of_a_model(logits):
    layers = [logits, logits[::-1] - 1, 2 * logits]
    routings = [jmoe.route_top_k(z, 3) for z in layers]
    # transformers' load_balancing_loss_func joins the layers' logits before it takes means.
    scores = np.concatenate([np.asarray(jax.nn.softmax(z), np.float64) for z in layers])
    expert_mask = np.eye(6)[np.concatenate([np.asarray(r.expert_index) for r in routings])]
    hugging_face = 6 * np.sum(expert_mask.mean(axis=0) * scores.mean(axis=0))
    load = jnp.stack([jmoe.expert_load(r, 6) for r in routings])
    mean_score = jnp.stack([jax.nn.softmax(z).mean(axis=0) for z in layers])
    np.testing.assert_allclose(3 * jmoe.pooled_balancing_loss(load, mean_score), hugging_face, rtol=1e-6)


def test_its_gradient_goes_through_the_scores_alone(logits):
    routing = jmoe.route_top_k(logits, 2)
    gradient = jax.grad(jmoe.load_balancing_loss)(jax.nn.softmax(logits), routing)
    share = np.bincount(np.asarray(routing.expert_index).ravel(), minlength=6) / 80
    np.testing.assert_allclose(gradient, np.tile(6 * share / 40, (40, 1)), rtol=1e-5)


def test_router_z_loss_follows_the_formula(logits):
    z = np.log(np.exp(np.asarray(logits, np.float64)).sum(axis=1))
    np.testing.assert_allclose(jmoe.router_z_loss(logits), np.mean(z**2), rtol=1e-6)


def test_masked_tokens_enter_no_statistic_even_as_nan(logits):
    mask = np.random.default_rng(1).random(40) < 0.6
    routing, kept = jmoe.route_top_k(logits, 2), jmoe.route_top_k(logits[mask], 2)
    dirty = jnp.where(mask[:, None], logits, jnp.nan)
    mask = jnp.asarray(mask)

    def losses(logits):
        scores = jax.nn.softmax(logits)
        return jmoe.load_balancing_loss(scores, routing, mask=mask) + jmoe.router_z_loss(logits, mask=mask)

    loss, gradient = jax.value_and_grad(losses)(jnp.where(mask[:, None], logits, 0))
    clean = logits[np.asarray(mask)]
    expected = jmoe.load_balancing_loss(jax.nn.softmax(clean), kept) + jmoe.router_z_loss(clean)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(losses(dirty), expected, rtol=1e-6)
    assert np.all(gradient[~mask] == 0)
    np.testing.assert_allclose(jmoe.expert_load(routing, 6, mask=mask), jmoe.expert_load(kept, 6), rtol=1e-6)


def test_flat_assignments_count_like_the_same_routing(logits):
    routing = jmoe.route_top_k(logits, 2)
    flat = jmoe.Assignments(jnp.repeat(jnp.arange(40), 2), routing.expert_index.ravel(), routing.weight.ravel())
    mask = jnp.arange(40) % 3 > 0
    np.testing.assert_array_equal(jmoe.expert_load(flat, 6, mask=mask), jmoe.expert_load(routing, 6, mask=mask))


def test_absent_assignments_do_not_count():
    routing = jmoe.Routing(jnp.array([[0, -1], [1, 9]]), jnp.ones((2, 2)))
    assert jmoe.expert_load(routing, 3).tolist() == [0.5, 0.5, 0]


def test_without_tokens_losses_and_load_are_zero(logits):
    mask, routing = jnp.zeros(40, bool), jmoe.route_top_k(logits, 2)
    assert jmoe.load_balancing_loss(jax.nn.softmax(logits), routing, mask=mask) == 0
    assert jmoe.router_z_loss(logits, mask=mask) == 0
    assert np.all(jmoe.expert_load(routing, 6, mask=mask) == 0)


def test_bfloat16_scores_are_averaged_in_float32(logits):
    loss = jmoe.load_balancing_loss(jax.nn.softmax(logits).astype(jnp.bfloat16), jmoe.route_top_k(logits, 2))
    assert loss.dtype == jnp.float32
    assert jmoe.router_z_loss(logits.astype(jnp.bfloat16)).dtype == jnp.float32
