import dataclasses
import functools

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from train.config import preset
from train.evaluate import evaluate, make_eval_step
from train.step import graph_of, init_state, make_train_step

MODEL = dataclasses.replace(
    preset("tiny").model,
    num_layers=1,
    embed_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    num_experts=4,
    expert_hidden_dim=16,
    vocab_size=32,
    load_balancing_coef=0.5,
)
SCHEDULE = optax.linear_schedule(0.0, 1.0, 10)


def _batch(padded):
    """Four sequences of eight tokens, the last tokens of which are padding in some."""
    tokens = jax.random.randint(jax.random.key(1), (4, 9), 0, 32)
    mask = jnp.arange(8) < 8 - jnp.array(padded)[:, None]
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "mask": mask,
        "segment_ids": mask.astype(jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(8), (4, 8)),
    }


@functools.cache
def _step(model, accumulation_steps=1):
    """The compiled step of gradient descent with rate 1, whose update is the gradient."""
    return make_train_step(graph_of(model), optax.sgd(1.0), SCHEDULE, accumulation_steps)


@functools.partial(jax.jit, static_argnums=0)
def _apply(model, params, tokens, **options):
    """The model's logits and statistics."""
    return nnx.merge(graph_of(model), params)(tokens, **options)


def _gradient(model, batch, accumulation_steps=1):
    """The gradient and the metrics of one step."""
    state = init_state(model, optax.sgd(1.0), 0)
    before = jax.tree.map(np.array, state.params)
    after, metrics = _step(model, accumulation_steps)(state, batch)
    return jax.tree.map(lambda a, b: a - np.asarray(b), before, after.params), metrics


def test_the_step_descends_the_cross_entropy_plus_the_weighted_router_losses():
    # All experts take part, so that no routing decision makes the loss jump.
    model = dataclasses.replace(MODEL, top_k=4, router_z_coef=0.25)
    batch = _batch([0, 0, 0, 0])
    gradient, metrics = _gradient(model, batch)
    expected = metrics["cross_entropy"] + 0.5 * metrics["load_balancing_loss"] + 0.25 * metrics["router_z_loss"]
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)

    # Along the router's part of the gradient, that sum changes as the gradient says.
    def loss(distance):
        state = init_state(model, optax.sgd(1.0), 0)
        router = state.params["groups"][0]["layers"][0]["mlp"]["router"]
        router["kernel"] = router["kernel"] + distance * router_gradient
        return float(_step(model)(state, batch)[1]["loss"])

    router_gradient = gradient["groups"][0]["layers"][0]["mlp"]["router"]["kernel"]
    slope = (loss(1e-2) - loss(-1e-2)) / 2e-2
    np.testing.assert_allclose(slope, np.sum(router_gradient**2), rtol=0.05)


def test_accumulation_gives_the_gradient_of_the_whole_batch_whatever_is_padded():
    # The load-balancing loss is not linear in the batch, so it is left out.
    model = dataclasses.replace(MODEL, load_balancing_coef=0.0)
    batch = _batch([0, 5, 2, 6])
    whole, whole_metrics = _gradient(model, batch)
    parts, parts_metrics = _gradient(model, batch, accumulation_steps=4)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a)
    for name in ("loss", "cross_entropy", "router_z_loss", "expert_load", "gradient_norm"):
        np.testing.assert_allclose(parts_metrics[name], whole_metrics[name], rtol=1e-4, err_msg=name)


def test_the_dropped_fraction_is_that_of_all_assignments_of_the_batch():
    # Every expert is chosen by all tokens of a part, which is one sequence, and takes four.
    model = dataclasses.replace(MODEL, top_k=4, capacity_factor=0.5)
    batch = _batch([0, 5, 2, 6])
    batch |= {"mask": batch["mask"].at[0].set(False)}  # the share of the targets is another
    _, metrics = _gradient(model, batch, accumulation_steps=4)
    np.testing.assert_allclose(metrics["dropped_fraction"], (4 + 0 + 2 + 0) / (8 + 3 + 6 + 2), rtol=1e-6)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_selection_biases_move_with_the_load_and_nothing_else_touches_them(scan_layers):
    layers = {"num_layers": 3, "first_dense_layers": 1, "hidden_dim": 16, "scan_layers": scan_layers}
    routing = {"router_score": "sigmoid", "router_bias_update_rate": 0.125, "load_balancing_coef": 0.0}
    model = dataclasses.replace(MODEL, **layers, **routing)
    optimizer = optax.adamw(1e-3, weight_decay=0.5)
    step, whole_step = (make_train_step(graph_of(model), optimizer, SCHEDULE, steps) for steps in (2, 1))
    state = init_state(model, optimizer, 0)
    assert "'bias'" not in str(jax.tree.structure(state.opt_state))

    def biases(state):
        moe_groups = [state.params["groups"][i] for i in range(1, len(state.params["groups"]))]
        return np.concatenate([group["layers"][0]["mlp"]["router"]["bias"] for group in moe_groups])

    expected = np.zeros((2, 4), np.float32)
    np.testing.assert_array_equal(biases(state), expected)
    for _ in range(3):
        state, metrics = step(state, _batch([0, 0, 0, 0]))
        load = np.asarray(metrics["expert_load"])
        expected += 0.125 * np.sign(np.round(0.25 - load, 5))
        np.testing.assert_array_equal(biases(state), expected)
    assert expected.any()
    # Also where the parts of a batch have different shares of its targets and of its assignments, or no targets.
    batch = _batch([0, 5, 2, 6])
    batch |= {"segment_ids": jnp.ones((4, 8), jnp.int32)}
    for mask in (batch["mask"], jnp.zeros((4, 8), bool)):
        in_parts, _ = step(jax.tree.map(jnp.copy, state), {**batch, "mask": mask})
        in_one, _ = whole_step(jax.tree.map(jnp.copy, state), {**batch, "mask": mask})
        np.testing.assert_array_equal(biases(in_parts), biases(in_one))
    # A bias that is this large decides alone, in training and in evaluation.
    router = state.params["groups"][1]["layers"][0]["mlp"]["router"]
    router["bias"] = router["bias"] + jnp.array([0.0, 9.0, 0.0, 9.0])
    _, aux = _apply(model, state.params, _batch([0, 0, 0, 0])["tokens"])
    np.testing.assert_array_equal(aux.expert_load[0], [0, 0.5, 0, 0.5])


def test_bfloat16_compute_updates_float32_master_weights():
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    gradient, metrics = _gradient(model, _batch([0, 0, 0, 0]))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(gradient))
    assert metrics["loss"].dtype == np.float32
    exact, _ = _gradient(MODEL, _batch([0, 0, 0, 0]))
    a, b = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(g)]) for g in (gradient, exact))
    error = np.linalg.norm(a - b) / np.linalg.norm(b)
    assert 1e-5 < error < 0.1  # computed in bfloat16, and right


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_experts_master_weights_are_read_once_to_compute_with(accumulation_steps):
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    state = jax.eval_shape(functools.partial(init_state, model, optax.sgd(1.0), 0))
    program = _step(model, accumulation_steps).lower(state, _batch([0, 0, 0, 0])).as_text()
    for matrix in "1x4x16x32x", "1x4x16x16x":  # w_up and w_down, with the layer before
        casts = [line for line in program.splitlines() if f"(tensor<{matrix}f32>) -> tensor<{matrix}bf16>" in line]
        assert len(casts) == 1


def test_the_step_takes_over_the_buffers_of_the_state_and_counts_itself():
    state = init_state(MODEL, optax.sgd(1.0), 0)
    leaf = jax.tree.leaves(state.params)[0]
    state, metrics = _step(MODEL)(state, _batch([0, 0, 0, 0]))
    assert leaf.is_deleted()
    assert int(state.step) == 1
    assert metrics["learning_rate"] == 0.0
    state, metrics = _step(MODEL)(state, _batch([0, 0, 0, 0]))
    np.testing.assert_allclose(metrics["learning_rate"], 0.1, rtol=1e-6)


def test_evaluation_sums_the_nats_of_counted_targets_over_batches():
    params = init_state(MODEL, optax.sgd(1.0), 0).params
    batches = [_batch([0, 0, 0, 0]), _batch([3, 8, 0, 1])]
    loader = grain.MapDataset.source(batches).to_iter_dataset()
    evaluation = evaluate(make_eval_step(graph_of(MODEL)), params, loader)
    assert evaluation.num_targets == 32 + 20
    expected = 0.0
    for batch in batches:
        inputs = {name: batch[name] for name in ("tokens", "positions", "segment_ids")}
        logits, _ = _apply(MODEL, params, **inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        expected += float(jnp.sum(losses, where=batch["mask"]))
    np.testing.assert_allclose(evaluation.nats, expected, rtol=1e-5)
    np.testing.assert_allclose(evaluation.bits_per_byte(104), expected / np.log(2) / 104, rtol=1e-5)
