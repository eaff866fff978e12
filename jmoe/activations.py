"""The activations of expert MLPs, plain and gated."""

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

GatedActivation = Literal["swiglu", "geglu", "reglu"]
PlainActivation = Literal["gelu", "relu", "relu_squared", "silu"]
Activation = GatedActivation | PlainActivation | Callable[[Array], Array]

_GATES = {"swiglu": jax.nn.silu, "geglu": jax.nn.gelu, "reglu": jax.nn.relu}
_PLAIN = {
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
}


def is_gated(activation: Activation) -> bool:
    """Says whether an activation takes 2F pre-activations (gate columns first) to F activations.

    Raises:
        ValueError: it is neither a known name nor a callable.
    """
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
        gate, up = jnp.split(h, 2, axis=-1)
        return _GATES[activation](gate) * up
    return _PLAIN[activation](h)
