"""The public combine: argument checks, the choice of implementation, the derivative, batching."""

import functools

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Integer

from pallas_kernels.combine import mosaic_gpu, reference
from pallas_kernels.implementations import Implementation, choose_implementation


def combine(
    rows: Float[Array, "M N"],
    index: Integer[Array, "T K"],
    weight: Float[Array, "T K"] | None = None,
    num_rows: Integer[Array, ""] | int | None = None,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "T N"]:
    """Computes `out[t] = sum_k weight[t, k] * rows[index[t, k]]`.

    The sum is taken in float32 (float64 for float64), in the order of k. Differentiable in rows and weight (the
    derivative runs on XLA); `jax.vmap` runs the batch in sequence on the Hopper kernel.

    Args:
        rows: [M, N], floating point.
        index: [T, K]. Numbers outside [0, `num_rows`) add nothing, even where a row or a weight is NaN.
        weight: [T, K], or None for 1 everywhere.
        num_rows: how many of the rows count, all where there are fewer; None for all.
        implementation: as in `grouped_matmul`; "reference" is the same as "xla". The Hopper kernel takes N that are
            multiples of 128, and K up to 32.

    Returns:
        [T, N] in the dtype of `rows`.

    Raises:
        ValueError: shapes or dtypes do not fit, or the named implementation cannot run, with the reason.

    Example:
        >>> import jax.numpy as jnp
        >>> rows = jnp.array([[1.0, 2.0], [10.0, 20.0]])
        >>> combine(rows, jnp.array([[0, 1], [1, 2]]), jnp.array([[1.0, 0.5], [2.0, 3.0]])).tolist()
        [[6.0, 12.0], [20.0, 40.0]]
    """
    rows, index = jnp.asarray(rows), jnp.asarray(index)
    if rows.ndim != 2 or not jnp.issubdtype(rows.dtype, jnp.floating):
        raise ValueError(f"rows is {rows.dtype}{list(rows.shape)}; it must be a floating-point matrix [M, N].")
    if index.ndim != 2 or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(f"index is {index.dtype}{list(index.shape)}; it must be an integer matrix [T, K].")
    if weight is not None and (weight.shape != index.shape or not jnp.issubdtype(weight.dtype, jnp.floating)):
        raise ValueError(
            f"weight is {weight.dtype}{list(weight.shape)}; it must be floating-point [T, K] = {list(index.shape)}."
        )
    if index.dtype != jnp.int32:
        # Clipped before the cast, which could wrap around, and by bounds that do not.
        bounds = jnp.iinfo(index.dtype)
        index = jnp.clip(index, max(bounds.min, -1), min(bounds.max, rows.shape[0])).astype(jnp.int32)
    num_rows = rows.shape[0] if num_rows is None else num_rows
    return _combine(implementation, rows, index, weight, jnp.asarray(num_rows, jnp.int32))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _combine(implementation, rows, index, weight, num_rows):
    reason = mosaic_gpu.why_unsupported(rows.shape[1], rows.dtype, index.shape[1])
    name = choose_implementation("combine", implementation, reason)
    if name != "mosaic_gpu" or not (rows.size and index.size):
        return reference.combine(rows, index, weight, num_rows)
    return _call_kernel(rows, index, weight, num_rows)


@sequential_vmap
def _call_kernel(rows, index, weight, num_rows):
    return mosaic_gpu.combine(rows, index, weight, num_rows)


@_combine.defjvp
def _derivative(implementation, primals, tangents):
    del implementation
    return jax.jvp(reference.combine, primals, tangents)
