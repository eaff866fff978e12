"""The public gather of rows: argument checks, the choice of implementation, its derivative and batching."""

import functools

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Integer

from pallas_kernels.gather_rows import mosaic_gpu, reference
from pallas_kernels.implementations import Implementation, choose_implementation


def gather_rows(
    x: Float[Array, "N D"],
    index: Integer[Array, " M"],
    position: Integer[Array, "N C"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "M D"]:
    """Copies every row of x to C places: `out[position[n, c]] = x[n]`, which is `out[m] = x[index[m]]`.

    The two index arrays are the same map, seen from the places and from the rows: each implementation uses the one
    that serves it. Differentiable in x, in reverse mode; `jax.vmap` runs the batch in sequence. It has the role of
    MegaBlocks' `padded_gather` (arXiv 2211.15841, section 5), without the padding.

    Args:
        x: [N, D], floating point.
        index: int[M] with M = N * C, the row of x that each row of the result is a copy of.
        position: int[N, C], the places of each row; all numbers from 0 to M - 1, each once. Nothing is promised of
            the result where they are not, or where `index` says something else.
        implementation: as in `grouped_matmul`; "reference" is the same as "xla".

    Returns:
        [M, D], in x's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit, or the named implementation cannot run, with the reason.

    Example:
        >>> import jax.numpy as jnp
        >>> x, position = jnp.array([[1.0], [2.0]]), jnp.array([[1, 3], [0, 2]])
        >>> gather_rows(x, jnp.array([1, 0, 1, 0]), position).ravel().tolist()
        [2.0, 1.0, 2.0, 1.0]
    """
    x, index, position = jnp.asarray(x), jnp.asarray(index), jnp.asarray(position)
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype}{list(x.shape)}; it must be a floating-point matrix [N, D].")
    if position.ndim != 2 or position.shape[0] != x.shape[0] or not jnp.issubdtype(position.dtype, jnp.integer):
        raise ValueError(
            f"position is {position.dtype}{list(position.shape)}; it must be integers [N, C] with N = {x.shape[0]}."
        )
    if index.shape != (position.size,) or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(f"index is {index.dtype}{list(index.shape)}; it must be integers [N * C] = [{position.size}].")
    return _gather_rows(implementation, x, index, position)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather_rows(implementation: Implementation | None, x: Array, index: Array, position: Array) -> Array:
    name = choose_implementation("gather_rows", implementation, x.shape[1:], x.dtype, x.dtype)
    if name != "mosaic_gpu" or 0 in (*x.shape, *position.shape):
        return reference.gather_rows(x, index, position)
    return sequential_vmap(mosaic_gpu.gather_rows)(x, index, position.astype(jnp.int32))


def _gather_rows_fwd(implementation: Implementation | None, x: Array, index: Array, position: Array):
    return _gather_rows(implementation, x, index, position), position


def _gather_rows_bwd(implementation: Implementation | None, position: Array, out_grad: Array):
    del implementation
    wide = jnp.promote_types(out_grad.dtype, jnp.float32)
    return out_grad[position].astype(wide).sum(axis=1).astype(out_grad.dtype), None, None


_gather_rows.defvjp(_gather_rows_fwd, _gather_rows_bwd)
