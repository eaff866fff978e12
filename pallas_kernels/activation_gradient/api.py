"""The public backward of a weighted activation: argument checks, the choice of implementation, batching."""

from collections.abc import Callable

import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float

from pallas_kernels import hopper
from pallas_kernels.activation_gradient import mosaic_gpu, reference
from pallas_kernels.implementations import Implementation, choose_implementation


def activation_gradient(
    h: Float[Array, "M H"],
    out_grad: Float[Array, "M F"],
    weight: Float[Array, " M"] | None,
    value_and_derivative: Callable[[Array], tuple[Array, Array]],
    *,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "M H"], Float[Array, "M F"], Float[Array, " M"] | None]:
    """Goes back through `weight[m] * a[m]`, where a are the activations of h, and computes the activations again.

    A plain activation is `a = f(h)`, a gated one `a = f(h[:, :F]) * h[:, F:]`, which it is if H = 2F. With
    `da = out_grad`, the results are the gradient of h, `weight * da * (da/dh)`, the weighted activations `weight * a`,
    and the gradient of the weights, `sum_f da * a`. All are computed in float32 (float64 for float64). Not
    differentiable; `jax.vmap` runs the batch in sequence. These are the three results that SonicMoE's backward of the
    down-projection has (arXiv 2512.14080, section 3).

    Args:
        h: [M, H], the pre-activations, floating point.
        out_grad: [M, F], the gradient of the weighted activations, in the dtype of h.
        weight: [M], floating point, or None for 1 everywhere.
        value_and_derivative: computes f(x) and f'(x) of an array, element by element. For "mosaic_gpu" Pallas must be
            able to lower it.
        implementation: as in `grouped_matmul`; "reference" is the same as "xla".

    Returns:
        The gradient of h, [M, H], and the weighted activations, [M, F], in the dtype of h; and the gradient of the
        weights, [M], in float32 (float64), or None where there are none.

    Raises:
        ValueError: shapes or dtypes do not fit, or the named implementation cannot run, with the reason.

    Example:
        >>> import jax.numpy as jnp
        >>> h, da, weight = jnp.array([[2.0, 5.0]]), jnp.array([[1.0]]), jnp.array([3.0])
        >>> dh, a, dweight = activation_gradient(h, da, weight, lambda x: (x**2, 2 * x))
        >>> dh.tolist(), a.tolist(), dweight.tolist()
        ([[60.0, 12.0]], [[60.0]], [20.0])
    """
    h, out_grad = jnp.asarray(h), jnp.asarray(out_grad)
    if h.ndim != 2 or not jnp.issubdtype(h.dtype, jnp.floating):
        raise ValueError(f"h is {h.dtype}{list(h.shape)}; it must be a floating-point matrix [M, H].")
    if out_grad.ndim != 2 or out_grad.shape[0] != h.shape[0] or out_grad.dtype != h.dtype:
        raise ValueError(
            f"out_grad is {out_grad.dtype}{list(out_grad.shape)}; it must be {h.dtype}[M, F] with M = {h.shape[0]}."
        )
    num_rows, width = out_grad.shape
    if h.shape[1] not in (width, 2 * width):
        raise ValueError(f"out_grad has F = {width} columns and h has {h.shape[1]}; h must have F or 2F.")
    if weight is not None and (weight.shape != (num_rows,) or not jnp.issubdtype(weight.dtype, jnp.floating)):
        raise ValueError(f"weight is {weight.dtype}{list(weight.shape)}; it must be floating-point [M] = [{num_rows}].")
    name = choose_implementation(
        "activation_gradient", implementation, hopper.why_unsupported((width,), h.dtype, h.dtype)
    )
    if name != "mosaic_gpu" or num_rows < mosaic_gpu.BLOCK_ROWS:
        return reference.activation_gradient(h, out_grad, weight, value_and_derivative)

    @sequential_vmap
    def call(h, out_grad, weight):
        return mosaic_gpu.activation_gradient(h, out_grad, weight, value_and_derivative)

    return call(h, out_grad, weight)
