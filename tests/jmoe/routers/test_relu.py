"""ReLU routing and the L1 loss that adapts itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

import jmoe
from jmoe.routers import ReLURouter, relu_density, relu_l1_loss, route_relu


@pytest.fixture
def logits():
    return jnp.asarray(np.random.default_rng(0).standard_normal((20, 6)), jnp.float32)


@pytest.mark.parametrize("max_k", [None, 3, 1])
def test_tokens_go_to_their_positive_logits_up_to_the_bound(max_k, logits):
    routing = jax.jit(lambda z: route_relu(z, max_k=max_k))(logits)
    assert routing.expert_index.shape == (20, max_k or 6)
    for z, experts, weights in zip(*map(np.asarray, (logits, routing.expert_index, routing.weight)), strict=True):
        expected = [e for e in np.argsort(-z) if z[e] > 0][:max_k]
        assert experts[experts >= 0].tolist() == expected
        np.testing.assert_array_equal(weights, [*z[expected], *[0] * (len(experts) - len(expected))])


def test_the_layer_is_the_sum_over_all_experts_weighted_by_relu(logits, relative_error):
    rng = np.random.default_rng(1)
    x, w_up, w_down = (rng.standard_normal(s).astype(np.float32) for s in ((20, 4), (6, 4, 5), (6, 5, 4)))
    y = jmoe.moe_mlp(jnp.asarray(x), jnp.asarray(w_up), jnp.asarray(w_down), route_relu(logits), activation="relu")
    expected = sum(np.maximum(logits[:, e, None], 0) * (np.maximum(x @ w_up[e], 0) @ w_down[e]) for e in range(6))
    assert relative_error(y, expected) < 1e-6


def test_masked_tokens_are_absent_and_nan_spoils_its_own_token_only():
    logits = jnp.array([[1.0, -1.0], [jnp.nan, -1.0], [1.0, 2.0]])
    routing = route_relu(logits, mask=jnp.array([True, True, False]))
    assert routing.expert_index.tolist() == [[0, -1], [0, -1], [-1, -1]]
    assert np.isnan(routing.weight[1, 0])
    assert routing.weight[0].tolist() == [1, 0]


def test_the_weights_are_differentiable_through_relu(logits):
    gradient = jax.grad(lambda z: route_relu(z).weight.sum())(logits)
    np.testing.assert_array_equal(gradient, np.asarray(logits) > 0)


@pytest.mark.parametrize("balance", [True, False])
def test_the_loss_and_the_density_follow_the_formulas(balance, logits, relative_error):
    mask = jnp.arange(20) < 15
    dirty = jnp.where(mask[:, None], logits, jnp.nan)
    z = np.asarray(logits[:15], np.float64)
    f = 6 / (2 * 15) * (z > 0).sum(axis=0) if balance else np.ones(6)
    loss, gradient = jax.value_and_grad(lambda z: relu_l1_loss(z, 2, balance=balance, mask=mask))(dirty)
    assert relative_error(loss, np.sum(f * np.maximum(z, 0)) / 15) < 1e-6
    assert relative_error(gradient[:15], f * (z > 0) / 15) < 1e-6
    assert not gradient[15:].any()
    np.testing.assert_allclose(relu_density(dirty, mask=mask), (z > 0).mean(), rtol=1e-6)


def test_without_tokens_loss_and_density_are_zero(logits):
    mask = jnp.zeros(20, bool)
    assert relu_l1_loss(logits, 2, mask=mask) == relu_density(logits, mask=mask) == 0


def test_the_coefficient_grows_where_too_many_experts_are_active_and_shrinks_where_too_few():
    router = ReLURouter(4, 8, 2, initial_l1=1e-3, rngs=nnx.Rngs(0))
    for density, expected in ((0.5, 1.2e-3), (0.3, 1.44e-3), (0.25, 1.44e-3), (0.1, 1.2e-3)):
        nnx.jit(lambda router, density: router.update_l1(density))(router, jnp.array(density))
        np.testing.assert_allclose(router.l1_coefficient[...], expected, rtol=1e-5)


def test_a_layer_routes_by_relu():
    moe = jmoe.MoE(4, 8, 6, router=ReLURouter(4, 6, 2, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5, 4)), jnp.float32)
    y, _ = moe(x)
    tokens = x.reshape(-1, 4)
    routing = route_relu(tokens @ moe.router.kernel[...])
    expected = jmoe.moe_mlp(tokens, moe.w_up[...], moe.w_down[...], routing)
    np.testing.assert_allclose(y.reshape(-1, 4), expected, rtol=1e-5, atol=1e-6)
    assert "l1_coefficient" not in nnx.state(moe, nnx.Param).router


def test_the_layers_aux_has_what_the_loss_needs_over_all_tokens_of_a_mesh():
    moe = jmoe.MoE(4, 8, 6, router=ReLURouter(4, 6, 2, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 5, 4)), jnp.float32)
    mask = jnp.asarray(np.random.default_rng(1).random((8, 5)) < 0.7)
    kernel = np.asarray(moe.router.kernel[...], np.float64)
    z = np.asarray(x, np.float64)[np.asarray(mask)] @ kernel
    l1_loss = sum(6 / 2 * (z[:, e] > 0).mean() * np.maximum(z[:, e], 0).mean() for e in range(6))

    def loss(moe, x):
        _, aux = moe(x, mask=mask)
        return aux.router["l1_loss"], aux

    run = nnx.jit(nnx.value_and_grad(loss, has_aux=True))
    (value, aux), gradients = run(moe, x)
    np.testing.assert_allclose(value, l1_loss, rtol=1e-5)
    np.testing.assert_allclose(aux.router["density"], (z > 0).mean(), rtol=1e-6)
    np.testing.assert_allclose(aux.experts_per_token, 6 * (z > 0).mean(), rtol=1e-6)
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)):
        (value, aux), gradients_on_mesh = run(moe, x)
    np.testing.assert_allclose(value, l1_loss, rtol=1e-5)
    np.testing.assert_allclose(aux.router["density"], (z > 0).mean(), rtol=1e-6)
    np.testing.assert_allclose(gradients_on_mesh.router.kernel, gradients.router.kernel, rtol=1e-4, atol=1e-6)


def test_a_training_step_brings_the_density_to_its_target():
    router = ReLURouter(4, 8, 2, initial_l1=1e-3, rngs=nnx.Rngs(0))
    moe = jmoe.MoE(4, 8, 8, router=router, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(moe, optax.adam(3e-2), wrt=nnx.Param)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 4)), jnp.float32)
    x = x.at[:, 0].set(1.0)  # of tokens that are symmetric around 0, a linear router likes half

    @nnx.jit
    def step(moe, optimizer):
        def loss(moe):
            y, aux = moe(x)
            return jnp.mean((y - x) ** 2) + moe.router.l1_coefficient[...] * aux.router["l1_loss"], aux

        gradients, aux = nnx.grad(loss, has_aux=True)(moe)
        optimizer.update(moe, gradients)
        moe.router.update_l1(aux.router["density"])
        return aux.router["density"]

    densities = [float(step(moe, optimizer)) for _ in range(90)]
    assert densities[0] > 0.4
    np.testing.assert_allclose(densities[-20:], 0.25, atol=0.05)


def test_a_bound_that_is_no_number_of_experts_raises(logits):
    with pytest.raises(ValueError, match="k is 7; it must be between 1 and the number of experts, 6"):
        route_relu(logits, max_k=7)
