"""The formulas of the activations' derivatives, against automatic differentiation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.activations import activate, value_and_derivative

GATES: dict[Any, Any] = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}


@jax.custom_vjp
def sine(x):
    return jnp.sin(x)


sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, gradient: (gradient * jnp.cos(x),))
X = jnp.array([-80.0, -5.0, -1.3, -1e-3, 0.0, 1e-3, 0.7, 4.0, 80.0])


@pytest.mark.parametrize("activation", ["gelu", "relu", "relu_squared", "silu", *GATES, jnp.sin, sine])
def test_value_and_derivative_are_those_of_the_activation_or_its_gate(activation):
    value, derivative = value_and_derivative(activation)(X)
    plain = GATES.get(activation, activation)
    np.testing.assert_allclose(value, activate(plain, X), rtol=1e-5, atol=1e-6)
    expected = jax.vmap(jax.grad(lambda x: activate(plain, x[None])[0]))(X)
    np.testing.assert_allclose(derivative, expected, rtol=1e-5, atol=1e-6)
    assert value.dtype == derivative.dtype == X.dtype


@pytest.mark.usefixtures("without_annotation_checks")
def test_an_unknown_name_is_a_value_error_that_names_the_known_ones():
    unknown: Any = "swish"
    with pytest.raises(ValueError, match=r"activation is 'swish'; .*'silu'"):
        value_and_derivative(unknown)
