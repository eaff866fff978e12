"""The public up-projection: argument checks and the choice of implementation."""

from collections.abc import Callable

import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Integer

from pallas_kernels.implementations import Implementation, choose_implementation
from pallas_kernels.up_projection import mosaic_gpu, reference


def up_projection(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "G K H"],
    group_sizes: Integer[Array, " G"],
    activation: Callable[..., Array],
    *,
    gated: bool,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "M H"], Float[Array, "M F"]]:
    """Multiplies each group of rows with that group's own matrix, and activates the products.

    `h[m] = lhs[m] @ rhs[g]` for every row m of group g, as `grouped_matmul` computes it, and `a = activation(gate,
    up)` with `gate, up = h[:, :F], h[:, F:]` where it is gated, `a = activation(h)` where it is plain. The activation
    is computed in float32 (float64 for float64 operands), from h as it is rounded to its dtype. Rows past the last
    group give zeros in h. On Hopper both come out of one kernel, which reads h from no memory. Not differentiable: a
    caller that wants gradients keeps h and writes its own backward.

    Args:
        lhs: [M, K], floating point.
        rhs: [G, K, H] of the same dtype, with H = 2F where gated (gate columns first) and H = F where plain.
        group_sizes: int[G], as in `grouped_matmul`.
        activation: an element-wise function of arrays. The Hopper kernel runs what Pallas lowers for Mosaic GPU.
        gated: whether the activation takes two arrays.
        implementation: as in `grouped_matmul`.

    Returns:
        The pre-activations [M, H] and the activations [M, F], in the dtype of the operands.

    Raises:
        ValueError: shapes or dtypes do not fit, or the named implementation cannot run, with the reason.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> h, a = up_projection(
        ...     jnp.ones((3, 2)), jnp.array([[[1.0, -1.0], [1.0, -1.0]]]), jnp.array([2]), jax.nn.relu, gated=False
        ... )
        >>> h.tolist(), a.tolist()
        ([[2.0, -2.0], [2.0, -2.0], [0.0, 0.0]], [[2.0, 0.0], [2.0, 0.0], [0.0, 0.0]])
    """
    num_parts = 2 if gated else 1
    if lhs.ndim != 2 or rhs.ndim != 3 or rhs.dtype != lhs.dtype or rhs.shape[2] % num_parts:
        layout = "[M, K] and [G, K, 2F]" if gated else "[M, K] and [G, K, F]"
        raise ValueError(
            f"lhs is {lhs.dtype}{list(lhs.shape)} and rhs {rhs.dtype}{list(rhs.shape)}; they must be {layout} of one "
            "dtype."
        )
    widths = lhs.shape[1], rhs.shape[2] // num_parts
    name = choose_implementation("up_projection", implementation, widths, lhs.dtype, lhs.dtype)
    if name != "mosaic_gpu" or 0 in (*lhs.shape, *rhs.shape):
        return reference.up_projection(lhs, rhs, group_sizes, activation, num_parts=num_parts, implementation=name)

    @sequential_vmap  # as in grouped_matmul
    def call(lhs: Array, rhs: Array, group_sizes: Array) -> tuple[Array, Array]:
        return mosaic_gpu.up_projection(lhs, rhs, group_sizes, activation, num_parts=num_parts)

    return call(lhs, rhs, jnp.asarray(group_sizes))
