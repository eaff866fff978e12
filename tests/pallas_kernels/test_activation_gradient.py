"""The backward of weighted activations: against automatic differentiation, in the interpreter, and lowered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.activations import activate, is_gated, value_and_derivative
from pallas_kernels import activation_gradient
from pallas_kernels.activation_gradient import mosaic_gpu, reference

ACTIVATIONS = ["swiglu", "geglu", "reglu", "gelu", "relu", "relu_squared", "silu"]


@pytest.fixture
def problem(normal):
    """h, the gradient of the weighted activations, and weights."""

    def draw(activation, rows, width, dtype=jnp.float32, weighted=True):
        h = normal(rows, width * (2 if is_gated(activation) else 1), dtype=dtype)
        return h, normal(rows, width, dtype=dtype, seed=1), normal(rows, seed=2) if weighted else None

    return draw


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_results_are_those_of_automatic_differentiation(activation, weighted, problem, relative_error):
    h, da, weight = problem(activation, 5, 12, weighted=weighted)
    ones = jnp.ones(5) if weight is None else weight

    def weighted_activations(h, weight):
        return weight[:, None] * activate(activation, h)

    expected_a, pull_back = jax.vjp(weighted_activations, h, ones)
    expected_dh, expected_dweight = pull_back(da)
    dh, a, dweight = activation_gradient(h, da, weight, value_and_derivative(activation))
    assert relative_error(dh, expected_dh) < 1e-6
    assert relative_error(a, expected_a) < 1e-6
    assert dweight is None if weight is None else relative_error(dweight, expected_dweight) < 1e-6


def test_float64_stays_float64(problem):
    with jax.enable_x64(True):
        h, da, weight = (jnp.asarray(x, jnp.float64) for x in problem("swiglu", 3, 4))
        results = jax.tree.leaves(activation_gradient(h, da, weight, value_and_derivative("swiglu")))
        assert [result.dtype for result in results] == 3 * [jnp.float64]


def test_vmap_gives_what_each_element_gives(problem):
    h, da, weight = (jnp.stack([x, 2 * x]) for x in problem("geglu", 4, 6))
    go_back = functools.partial(activation_gradient, value_and_derivative=value_and_derivative("geglu"))
    of_all, of_one = jax.vmap(go_back)(h, da, weight), go_back(h[1], da[1], weight[1])
    jax.tree.map(lambda results, expected: np.testing.assert_array_equal(results[1], expected), of_all, of_one)


@pytest.mark.parametrize(
    ("activation", "rows", "width", "weighted"),
    [
        ("swiglu", 40, 192, True),
        ("swiglu", 24, 512, False),
        ("geglu", 37, 256, True),  # the last block computes three rows of the one before again
        ("reglu", 8, 64, True),
        ("gelu", 16, 320, True),
        ("relu_squared", 9, 128, False),
    ],
)
def test_the_kernel_matches_the_reference(activation, rows, width, weighted, problem, interpret, relative_error):
    arrays = problem(activation, rows, width, jnp.bfloat16, weighted)
    formula = value_and_derivative(activation)
    results = interpret(
        lambda: mosaic_gpu.activation_gradient(*arrays, value_and_derivative=formula),
        detect_races=rows % mosaic_gpu.BLOCK_ROWS == 0,
    )
    for result, expected in zip(
        results, reference.activation_gradient(*arrays, value_and_derivative=formula), strict=True
    ):
        assert (result is None) == (expected is None)
        assert result is None or relative_error(result, expected) < 1e-4


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "width"), [(262144, 1024), (50, 192)])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_kernel_is_chosen_and_lowers(activation, rows, width, weighted, lower_for_cuda):
    h = (rows, width * (2 if is_gated(activation) else 1)), jnp.bfloat16
    formula = value_and_derivative(activation)

    def go_back(h, da, weight=None):
        return activation_gradient(h, da, weight, formula)

    weight = [((rows,), jnp.float32)] if weighted else []
    assert "mosaic_gpu" in lower_for_cuda(go_back, h, ((rows, width), jnp.bfloat16), *weight)


def test_fewer_rows_than_a_block_run_on_xla(lower_for_cuda):
    go_back = functools.partial(activation_gradient, value_and_derivative=value_and_derivative("silu"))
    arrays = ((7, 64), jnp.bfloat16), ((7, 64), jnp.bfloat16), ((7,), jnp.float32)
    assert "mosaic_gpu" not in lower_for_cuda(go_back, *arrays)


@pytest.mark.usefixtures("without_annotation_checks")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": jnp.ones(6)}, r"h is float32\[6\]; it must be a floating-point matrix \[M, H\]"),
        ({"out_grad": jnp.ones((5, 4))}, r"out_grad is float32\[5, 4\]; it must be float32\[M, F\] with M = 6"),
        ({"out_grad": jnp.ones((6, 4), jnp.bfloat16)}, r"out_grad is bfloat16\[6, 4\]"),
        ({"out_grad": jnp.ones((6, 3))}, r"F = 3 columns and h has 8"),
        ({"weight": jnp.ones(5)}, r"weight is float32\[5\]; it must be floating-point \[M\] = \[6\]"),
        ({"weight": jnp.ones(6, jnp.int32)}, r"weight is int32\[6\]"),
        ({"implementation": "mosaic_gpu"}, r"needs a Hopper GPU"),
    ],
)
def test_a_bad_argument_is_a_value_error_that_names_it(change, message):
    arguments = {"h": jnp.ones((6, 8)), "out_grad": jnp.ones((6, 4)), "weight": jnp.ones(6)} | change
    with pytest.raises(ValueError, match=message):
        activation_gradient(**arguments, value_and_derivative=value_and_derivative("swiglu"))
