"""The grouped matmul under JAX's transformations: derivatives, vmap, remat, scan."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pallas_kernels import grouped_matmul, grouped_weight_gradient

IMPLEMENTATIONS = ["reference", "xla"]
M, K, N = 37, 3, 5
SIZES = [0, 33, 1]


@pytest.fixture
def operands(normal):
    def make(dtype=jnp.float32, *, transpose_rhs=False, batch=()):
        shape = (N, K) if transpose_rhs else (K, N)
        return normal(*batch, M, K, dtype=dtype), normal(*batch, 3, *shape, dtype=dtype, seed=1)

    return make


def dense_matmul(lhs, rhs, group_sizes, *, transpose_rhs=False):
    """The same as one product with a matrix for each row, for JAX to differentiate."""
    group = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(lhs.shape[0]), side="right")
    member = jax.nn.one_hot(group, rhs.shape[0], dtype=lhs.dtype)
    return jnp.einsum("mg,mk,gnk->mn" if transpose_rhs else "mg,mk,gkn->mn", member, lhs, rhs)


@pytest.mark.parametrize("transpose_rhs", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_match_finite_differences_and_second_ones_those_of_a_dense_form(
    implementation, transpose_rhs, operands, normal, relative_error
):
    with jax.enable_x64(True):
        lhs, rhs = operands(jnp.float64, transpose_rhs=transpose_rhs)
        sizes = jnp.array(SIZES)

        def loss(matmul, lhs, rhs):
            return jnp.sum(jnp.sin(matmul(lhs, rhs, sizes, transpose_rhs=transpose_rhs)))

        ours = jax.jit(functools.partial(loss, functools.partial(grouped_matmul, implementation=implementation)))
        check_grads(ours, (lhs, rhs), order=1, modes=("rev",))

        def hessian_product(matmul):
            directions = (
                normal(M, K, dtype=jnp.float64, seed=2),
                normal(*rhs.shape, dtype=jnp.float64, seed=3),
            )

            def slope(lhs, rhs):
                gradients = jax.grad(functools.partial(loss, matmul), argnums=(0, 1))(lhs, rhs)
                return sum(jnp.vdot(g, d) for g, d in zip(gradients, directions, strict=True))

            return jax.jit(jax.grad(slope, argnums=(0, 1)))(lhs, rhs)

        ours = hessian_product(functools.partial(grouped_matmul, implementation=implementation))
        for product, expected in zip(ours, hessian_product(dense_matmul), strict=True):
            assert relative_error(product, expected) < 1e-13


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_of_the_weight_gradient_match_finite_differences_to_the_second_order(implementation, normal):
    with jax.enable_x64(True):
        sizes = jnp.array(SIZES)

        @jax.jit
        def loss(lhs, out_grad):
            return jnp.sum(jnp.sin(grouped_weight_gradient(lhs, out_grad, sizes, implementation=implementation)))

        check_grads(loss, (normal(M, K, dtype=jnp.float64), normal(M, N, dtype=jnp.float64)), order=2, modes=("rev",))


def gradients(lhs, rhs, group_sizes, implementation=None):
    """Gradients of a loss that is not linear in the product."""

    def loss(lhs, rhs):
        return jnp.sum(jnp.sin(grouped_matmul(lhs, rhs, group_sizes, implementation=implementation)))

    return jax.grad(loss, argnums=(0, 1))(lhs, rhs)


BATCHED_SIZES = jnp.array([[37, 0, 0], [1, 2, 3], [30, 30, 30], [0, 0, 36]])


@pytest.mark.sample(3)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("axes", [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0), (1, -1, 0)], ids=str)
def test_vmap_over_any_operand_gives_each_elements_product_and_gradients(
    axes, implementation, operands, relative_error
):
    lhs, rhs = operands(batch=(4,))
    batches = [lhs, rhs, BATCHED_SIZES]

    def both(lhs, rhs, group_sizes):
        product = grouped_matmul(lhs, rhs, group_sizes, implementation=implementation)
        return product, *gradients(lhs, rhs, group_sizes, implementation)

    def element(i):
        return [batch[0 if axis is None else i] for batch, axis in zip(batches, axes, strict=True)]

    arguments = [b[0] if axis is None else jnp.moveaxis(b, 0, axis) for b, axis in zip(batches, axes, strict=True)]
    results = jax.jit(jax.vmap(both, in_axes=axes))(*arguments)
    single = jax.jit(both)
    for i in range(4):
        for result, expected in zip(results, single(*element(i)), strict=True):
            assert relative_error(result[i], expected) < 1e-6


def test_the_gradient_of_a_vmap_is_the_sum_of_the_elements_gradients(operands, relative_error):
    lhs, rhs = operands(batch=(4,))
    lhs = lhs[0]

    def loss(lhs, rhs):
        products = jax.vmap(grouped_matmul, in_axes=(None, 0, 0))(lhs, rhs, BATCHED_SIZES)
        return jnp.sum(jnp.sin(products))

    lhs_grad, rhs_grad = jax.jit(jax.grad(loss, argnums=(0, 1)))(lhs, rhs)
    one_by_one = jax.jit(jax.vmap(gradients, in_axes=(None, 0, 0)))
    expected_lhs_grad, expected_rhs_grad = one_by_one(lhs, rhs, BATCHED_SIZES)
    assert relative_error(lhs_grad, expected_lhs_grad.sum(axis=0)) < 1e-6
    assert relative_error(rhs_grad, expected_rhs_grad) < 1e-6


def test_vmap_may_be_nested(operands, relative_error):
    lhs, rhs = operands(batch=(2, 2))
    sizes = BATCHED_SIZES.reshape(2, 2, 3)
    results = jax.jit(jax.vmap(jax.vmap(grouped_matmul)))(lhs, rhs, sizes)
    for i, j in np.ndindex(2, 2):
        assert relative_error(results[i, j], dense_matmul(lhs[i, j], rhs[i, j], sizes[i, j])) < 1e-6


def test_recomputing_in_the_backward_pass_changes_no_gradient(operands):
    lhs, rhs = operands()

    def loss(matmul, lhs, rhs):
        return jnp.sum(jnp.sin(matmul(lhs, rhs, jnp.array(SIZES))))

    run = jax.jit(jax.grad(loss, argnums=(1, 2)), static_argnums=0)
    for ours, expected in zip(
        run(jax.checkpoint(grouped_matmul), lhs, rhs), run(grouped_matmul, lhs, rhs), strict=True
    ):
        np.testing.assert_array_equal(ours, expected)


def test_a_scan_over_layers_matches_a_loop_over_them_forward_and_backward(normal, relative_error):
    x, layers = normal(M, K), normal(4, 3, K, K, seed=1)
    sizes = jnp.array([[10, 20, 7], [37, 0, 0], [0, 30, 2], [12, 12, 13]])

    def scanned(x, layers):
        def layer(x, inputs):
            weights, sizes = inputs
            return jnp.tanh(grouped_matmul(x, weights, sizes)), None

        return jnp.sum(jax.lax.scan(layer, x, (layers, sizes))[0] ** 2)

    def looped(x, layers):
        for i in range(4):
            x = jnp.tanh(dense_matmul(x, layers[i], sizes[i]))
        return jnp.sum(x**2)

    results, expected = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(x, layers) for f in (scanned, looped))
    for ours, theirs in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        assert relative_error(ours, theirs) < 3e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_forward_mode_says_that_it_is_not_supported(implementation, operands, normal):
    lhs, rhs = operands()
    multiply = functools.partial(grouped_matmul, group_sizes=jnp.array(SIZES), implementation=implementation)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(multiply, (lhs, rhs), (lhs, rhs))
    out_grad = normal(M, N)
    gradient = functools.partial(grouped_weight_gradient, group_sizes=jnp.array(SIZES), implementation=implementation)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(gradient, (lhs, out_grad), (lhs, out_grad))
