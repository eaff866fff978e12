import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from jmoe.models.vocabulary import mean_cross_entropy, vocabulary_matmul

V, D = 32, 16


@pytest.fixture(scope="module")
def problem():
    """Two sequences of 12 tokens, some of which do not count, whatever their targets."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (2, 12, D))
    embedding = jax.random.normal(keys[1], (V, D))
    mask = jnp.stack([jnp.arange(12) % 5 != 4, jnp.arange(12) < 8])
    targets = jnp.where(mask, jax.random.randint(keys[2], (2, 12), 0, V), -100)
    return hidden, embedding, targets, mask


def plain_cross_entropy(hidden, embedding, targets, mask):
    """The same from all logits at once, for JAX to differentiate."""
    logits = jnp.einsum("bsd,vd->bsv", hidden, embedding, preferred_element_type=jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(mask, targets, 0))
    return jnp.sum(losses, where=mask) / jnp.sum(mask)


def value_and_gradients(function, hidden, embedding, scale=1.0):
    """The value, and the gradients of `scale * function`."""

    @jax.jit
    def run(hidden, embedding):
        value, pull_back = jax.vjp(function, hidden, embedding)
        return value, pull_back(jnp.asarray(scale, value.dtype))

    return run(hidden, embedding)


@pytest.mark.parametrize("chunk_size", [1, 8, 10, 100], ids=lambda size: f"chunks-of-{size}")
@pytest.mark.parametrize("scale", [1.0, -0.3])
def test_value_and_gradients_are_those_of_all_logits_at_once(problem, relative_error, chunk_size, scale):
    hidden, embedding, *rest = problem
    expected = value_and_gradients(lambda *args: plain_cross_entropy(*args, *rest), hidden, embedding, scale)
    actual = value_and_gradients(lambda *args: mean_cross_entropy(*args, *rest, chunk_size), hidden, embedding, scale)
    jax.tree.map(lambda a, b: np.testing.assert_array_less(relative_error(a, b), 1e-6), actual, expected)
    value = jax.jit(lambda *args: mean_cross_entropy(*args, *rest, chunk_size))(hidden, embedding)
    np.testing.assert_array_equal(value, actual[0])


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_round_operands_and_gradients_only(problem, relative_error, dtype, param_dtype):
    hidden, embedding, *rest = problem
    hidden, embedding = hidden.astype(dtype), embedding.astype(param_dtype)
    # Exactly what is multiplied, in float32.
    operands = hidden.astype(jnp.float32), embedding.astype(dtype).astype(jnp.float32)
    value, gradients = value_and_gradients(lambda *args: plain_cross_entropy(*args, *rest), *operands)
    actual_value, actual = value_and_gradients(lambda *args: mean_cross_entropy(*args, *rest, 8), hidden, embedding)
    assert actual_value.dtype == jnp.float32
    np.testing.assert_allclose(actual_value, value, rtol=1e-6)
    assert [gradient.dtype for gradient in actual] == [dtype, param_dtype]
    for gradient, expected in zip(actual, gradients, strict=True):
        assert relative_error(gradient, expected) < 5e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_larger_power_of_two_as_loss_scale_changes_only_exponents(problem, dtype):
    hidden, embedding, *rest = problem
    gradients = [
        value_and_gradients(
            lambda *args: mean_cross_entropy(*args, *rest, 8), hidden.astype(dtype), embedding.astype(dtype), scale
        )[1]
        for scale in (2.0**6, 2.0**10)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(16 * a, b), *gradients)


def test_gradients_in_float64_are_those_of_finite_differences(problem):
    hidden, embedding, targets, mask = jax.device_get(problem)
    with jax.enable_x64(True):
        function = jax.jit(lambda *args: mean_cross_entropy(*args, jnp.asarray(targets), jnp.asarray(mask), 8))
        arguments = jnp.asarray(hidden, jnp.float64), jnp.asarray(embedding, jnp.float64)
        assert function(*arguments).dtype == jnp.float64
        check_grads(function, arguments, order=1, modes=["rev"])


def test_without_counted_targets_value_and_gradients_are_zero(problem):
    hidden, embedding, targets, mask = problem
    run = jax.jit(jax.value_and_grad(lambda *args: mean_cross_entropy(*args, targets, mask & False, 8), (0, 1)))
    # Not even a model that has diverged on tokens that do not count changes that.
    value, gradients = run(hidden.at[:, 3].set(1e30), embedding)
    assert value == 0
    assert not any(gradient.any() for gradient in gradients)


def test_logits_are_computed_once_and_gradients_only_where_asked_for(problem):
    def num_products(transformation):
        hidden, embedding, *rest = problem
        loss = transformation(lambda *args: mean_cross_entropy(*args, *rest, 8))
        return str(jax.make_jaxpr(loss)(hidden, embedding)).count("dot_general[")

    assert num_products(lambda loss: loss) == 1
    assert num_products(lambda loss: jax.grad(loss, (0, 1))) == 3


def test_sharding_the_vocabulary_changes_nothing(problem, relative_error):
    hidden, embedding, *rest = problem
    run = jax.jit(jax.value_and_grad(lambda *args: mean_cross_entropy(*args, 8), (0, 1)))
    expected = run(hidden, embedding, *rest)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    matrix = jax.device_put(embedding, jax.NamedSharding(mesh, jax.P("tensor", "fsdp")))
    tokens = jax.device_put((hidden, *rest), jax.NamedSharding(mesh, jax.P("data")))
    actual = run(tokens[0], matrix, *tokens[1:])
    jax.tree.map(lambda a, b: np.testing.assert_array_less(relative_error(a, b), 1e-6), actual, expected)


def test_the_output_product_and_its_gradients_are_those_of_float32(problem, relative_error):
    hidden, embedding = problem[0].astype(jnp.bfloat16), problem[1]
    logits_grad = jax.random.normal(jax.random.key(2), (2, 12, V)).astype(jnp.bfloat16).astype(jnp.float32)

    def exact(hidden, embedding):
        return hidden.astype(jnp.float32) @ embedding.astype(jnp.bfloat16).astype(jnp.float32).T

    logits, pull_back = jax.vjp(vocabulary_matmul, hidden, embedding)
    expected, exact_pull_back = jax.vjp(exact, hidden, embedding)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    for actual, wanted, rounding in zip(
        pull_back(logits_grad), exact_pull_back(logits_grad), (8e-3, 5e-3), strict=True
    ):
        assert actual.dtype == wanted.dtype
        assert relative_error(actual, wanted) < rounding
