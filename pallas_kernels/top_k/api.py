"""The public top-k: argument checks, the choice of implementation, the derivative, batching."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Int32

from pallas_kernels.implementations import Implementation, choose_implementation
from pallas_kernels.top_k import mosaic_gpu, reference


def top_k(
    x: Float[Array, "M N"], k: int, *, implementation: Implementation | None = None
) -> tuple[Float[Array, "M k"], Int32[Array, "M k"]]:
    """Finds the k largest entries of each row, in descending order; of equal ones the one further left comes first.

    As `jax.lax.top_k`, but that NaN of either sign is the largest. Differentiable in x, forward and backward;
    `jax.vmap` runs the batch in sequence on the Hopper kernel.

    Args:
        x: [M, N], floating point.
        k: between 0 and N.
        implementation: as in `grouped_matmul`; "reference" is the same as "xla". The Hopper kernel takes float32, up
            to 1024 columns, and k up to 32.

    Returns:
        The entries, in the dtype of x, and their columns.

    Raises:
        ValueError: `x` or `k` does not fit, or the named implementation cannot run, with the reason.

    Example:
        >>> import jax.numpy as jnp
        >>> largest, column = top_k(jnp.array([[1.0, 3.0, 2.0, 3.0]]), 3)
        >>> largest.tolist(), column.tolist()
        ([[3.0, 3.0, 2.0]], [[1, 3, 2]])
    """
    x = jnp.asarray(x)
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype}{list(x.shape)}; it must be a floating-point matrix [M, N].")
    if not 0 <= k <= x.shape[1]:
        raise ValueError(f"k is {k}; it must be between 0 and the number of columns, {x.shape[1]}.")
    return _top_k(k, implementation, x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _top_k(k, implementation, x):
    reason = mosaic_gpu.why_unsupported(x.shape[1], x.dtype, k)
    name = choose_implementation("top_k", implementation, reason)
    if name != "mosaic_gpu" or not x.shape[0] or not k:
        return reference.top_k(x, k)
    return sequential_vmap(lambda x: mosaic_gpu.top_k(x, k))(x)


@_top_k.defjvp
def _derivative(k, implementation, primals, tangents):
    (x,), (dx,) = primals, tangents
    largest, column = _top_k(k, implementation, x)
    of_column = np.zeros(column.shape, jax.dtypes.float0)
    return (largest, column), (_look_up(dx, column), of_column)


@functools.partial(jax.checkpoint, prevent_cse=False)  # for a backward, columns are kept and not what is made of them
def _look_up(x, column):
    """Takes entries of each row by comparing: the transpose is a sum, where that of a gather is a scatter."""
    is_taken = column[:, :, None] == jnp.arange(x.shape[1], dtype=column.dtype)  # [M, k, N]
    return jnp.sum(jnp.where(is_taken, x[:, None, :], 0), axis=2, dtype=x.dtype)
