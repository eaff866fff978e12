"""The backward of a weighted activation as plain array expressions: also its portable form."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float


def activation_gradient(
    h: Float[Array, "M H"],
    out_grad: Float[Array, "M F"],
    weight: Float[Array, " M"] | None,
    value_and_derivative: Callable[[Array], tuple[Array, Array]],
) -> tuple[Float[Array, "M H"], Float[Array, "M F"], Float[Array, " M"] | None]:
    """Goes back through the activation in float32, or float64 for float64."""
    dtype = jnp.promote_types(h.dtype, jnp.float32)
    parts = jnp.split(h.astype(dtype), h.shape[1] // out_grad.shape[1], axis=1)
    a, gradients, dweight = go_back(parts, out_grad.astype(dtype), value_and_derivative)
    if weight is not None:
        dweight = jnp.sum(dweight, axis=1)
        weight = weight.astype(dtype)[:, None]
        a, gradients = weight * a, [weight * gradient for gradient in gradients]
    return (
        jnp.concatenate(gradients, axis=1).astype(h.dtype),
        a.astype(h.dtype),
        None if weight is None else dweight,
    )


def go_back(
    parts: list[Array], da: Array, value_and_derivative: Callable[[Array], tuple[Array, Array]]
) -> tuple[Array, list[Array], Array]:
    """Goes back from activations to pre-activations, element by element.

    Args:
        parts: the pre-activations, or their gate and their up half.
        da: the gradient of the activations.
        value_and_derivative: of the activation, or of its gate.

    Returns:
        The activations, the gradient of each part, and the products of activations and their gradients.
    """
    value, derivative = value_and_derivative(parts[0])
    if len(parts) == 1:
        return value, [da * derivative], da * value
    up = parts[1]
    a = value * up
    return a, [da * up * derivative, da * value], da * a
