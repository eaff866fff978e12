from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.config import OptimizerConfig
from train.optimizer import decayed_parameters, make_optimizer, make_schedule

PARAMS: dict[str, Any] = {
    "embedding": {"embedding": jnp.ones((6, 4))},
    "layer_groups": {0: {"mlp": {"w_up": jnp.ones((2, 3, 4, 5)), "b_up": jnp.ones((2, 3, 5))}}},
    "final_norm": {"scale": jnp.ones((4,))},
}


def _first_update(gradients, **settings) -> Any:
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0, **settings), 10)
    return optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)[0]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", {10: 1.0, 60: 0.55, 110: 0.1}),
        ("linear", {10: 1.0, 60: 0.55, 110: 0.1}),
        ("constant", {10: 1.0, 60: 1.0, 110: 1.0}),
        ("wsd", {10: 1.0, 60: 1.0, 90: 1.0, 100: 0.55, 110: 0.1}),
    ],
)
def test_each_schedule_warms_up_linearly_and_ends_where_it_says(schedule, expected):
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=10, schedule=schedule, final_learning_rate=0.1)
    schedule = make_schedule(config, 110)
    rates = {step: np.asarray(schedule(step)).item() for step in (0, 5, *expected)}
    assert rates == pytest.approx({0: 0.0, 5: 1.0} | {step: 2 * share for step, share in expected.items()})


def test_a_warm_up_as_long_as_the_run_is_refused():
    with pytest.raises(ValueError, match=r"optimizer.warmup_steps must be less than steps = 50, got 50"):
        make_schedule(OptimizerConfig(warmup_steps=50), 50)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "sgd"])
def test_weight_decay_shrinks_matrices_and_spares_norm_scales_and_biases(name):
    gradients = jax.tree.map(jnp.zeros_like, PARAMS)
    with_decay = _first_update(gradients, name=name, weight_decay=0.5, learning_rate=0.1)
    without = _first_update(gradients, name=name, weight_decay=0.0, learning_rate=0.1)
    difference = jax.tree.map(lambda a, b: a - b, with_decay, without)
    experts = difference["layer_groups"][0]["mlp"]
    np.testing.assert_allclose(experts["w_up"], -0.05, rtol=1e-5)
    assert not np.any(experts["b_up"])
    assert not np.any(difference["final_norm"]["scale"])


def test_embeddings_are_decayed_by_name_not_by_rank():
    assert decayed_parameters(PARAMS) == {
        "embedding": {"embedding": True},
        "layer_groups": {0: {"mlp": {"w_up": True, "b_up": False}}},
        "final_norm": {"scale": False},
    }


def test_the_gradient_is_clipped_by_its_global_norm_before_the_update():
    gradients = jax.tree.map(lambda a: 3.0 * a, PARAMS)
    updates = _first_update(gradients, name="sgd", beta1=0.0, weight_decay=0.0, learning_rate=1.0, clip_norm=0.5)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(updates)))
    np.testing.assert_allclose(norm, 0.5, rtol=1e-5)


def test_muon_orthogonalizes_each_experts_matrix_on_its_own_and_leaves_embeddings_to_adam():
    keys = iter(jax.random.split(jax.random.key(0), 9))
    gradients = jax.tree.map(lambda a: jax.random.normal(next(keys), a.shape), PARAMS)
    updates = _first_update(gradients, name="muon", weight_decay=0.0, learning_rate=1.0, clip_norm=1e9)

    experts = updates["layer_groups"][0]["mlp"]["w_up"]
    singular_values = np.linalg.svd(experts, compute_uv=False)  # [2, 3, 4]
    largest = singular_values.max(-1, keepdims=True)
    assert np.all(singular_values / largest > 0.5)  # near one value, matrix by matrix
    np.testing.assert_allclose(largest, largest.mean(), rtol=0.3)
    # Adam's first step has one size and the sign of the gradient.
    adam = -updates["embedding"]["embedding"] * np.sign(gradients["embedding"]["embedding"])
    np.testing.assert_allclose(adam, adam.mean(), rtol=1e-3)
    assert adam.mean() > 0.5
