"""The activations of expert MLPs, plain and gated."""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

GatedActivation = Literal["swiglu", "geglu", "reglu"]
PlainActivation = Literal["gelu", "relu", "relu_squared", "silu"]
Activation = GatedActivation | PlainActivation | Callable[[Array], Array]

_GATES = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}
_PLAIN = {
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
}


@dataclasses.dataclass(frozen=True)
class Gated:
    """A gated activation whose gate is any function: `gate(h[..., :F]) * h[..., F:]`.

    Attributes:
        gate: a function of an array, applied element by element; it may not close over traced arrays.

    Source: Shazeer (GLU variants), arXiv 2002.05202.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jmoe
        >>> jmoe.Gated(jax.nn.sigmoid)(jnp.array([0.0, 6.0])).tolist()
        [3.0]
    """

    gate: Callable[[Array], Array]

    def __call__(self, h: Float[Array, "*batch H"]) -> Float[Array, "*batch F"]:
        """Applies the activation to 2F pre-activations."""
        gate, up = jnp.split(h, 2, axis=-1)
        return self.gate(gate) * up


def is_gated(activation: Activation) -> bool:
    """Says whether an activation takes 2F pre-activations (gate columns first) to F activations.

    Raises:
        ValueError: it is neither a known name nor a callable.
    """
    if isinstance(activation, Gated):
        return True
    if callable(activation) or activation in _PLAIN:
        return False
    if activation in _GATES:
        return True
    names = ", ".join(map(repr, get_args(GatedActivation) + get_args(PlainActivation)))
    raise ValueError(f"activation is {activation!r}; it must be one of {names}, or a callable.")


def activate(activation: Activation, h: Float[Array, "*batch H"]) -> Float[Array, "*batch F"]:
    """Applies an activation to the pre-activations of an MLP.

    A gated one computes `g(h[..., :F]) * h[..., F:]`, with g the SiLU of SwiGLU, the GELU of GEGLU or the
    ReLU of ReGLU (Shazeer, arXiv 2002.05202). GELU is the tanh approximation, as in `jax.nn.gelu`.
    """
    if callable(activation):
        return activation(h)
    if is_gated(activation):
        return Gated(_PLAIN[_GATES[activation]])(h)
    return _PLAIN[activation](h)


def value_and_derivative(activation: Activation) -> Callable[[Array], tuple[Array, Array]]:
    """Returns a function that computes f(x) and f'(x), where f is an activation, or the gate of a gated one.

    The named activations have formulas, which kernels can lower; they are those that `activate` has by automatic
    differentiation. A callable is differentiated in reverse mode, as a function of each element.

    Args:
        activation: as in `activate`.

    Returns:
        A function of an array, which gives two of its shape and dtype.

    Raises:
        ValueError: it is neither a known name nor a callable.
    """
    if callable(activation):
        function = activation.gate if isinstance(activation, Gated) else activation

        def differentiate(x):
            value, pull_back = jax.vjp(function, x)
            return value, *pull_back(jnp.ones_like(value))

        return differentiate
    is_gated(activation)  # raises for unknown names
    return _WITH_DERIVATIVE[_GATES.get(activation, activation)]


def _gelu(x: Array) -> tuple[Array, Array]:
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    tanh = jnp.tanh(scale * (x + cubic * x * x * x))
    half = 0.5 * (1 + tanh)
    return x * half, half + 0.5 * x * (1 - tanh * tanh) * scale * (1 + 3 * cubic * x * x)


def _relu(x: Array) -> tuple[Array, Array]:
    return jnp.maximum(x, 0), jnp.where(x > 0, 1, 0).astype(x.dtype)


def _relu_squared(x: Array) -> tuple[Array, Array]:
    positive = jnp.maximum(x, 0)
    return positive * positive, 2 * positive


def _silu(x: Array) -> tuple[Array, Array]:
    sigmoid = 1 / (1 + jnp.exp(-x))
    value = x * sigmoid
    return value, sigmoid + value * (1 - sigmoid)


_WITH_DERIVATIVE = {"gelu": _gelu, "relu": _relu, "relu_squared": _relu_squared, "silu": _silu}
