"""The public grouped matmuls: argument checks, the choice of implementation, derivatives and batching."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Integer

from pallas_kernels import hopper
from pallas_kernels.grouped_matmul import mosaic_gpu, mosaic_gpu_weight_gradient, reference, xla
from pallas_kernels.implementations import Implementation, choose_implementation
from pallas_kernels.rows import clip_index, sum_rows

Operation = Literal["grouped_matmul", "grouped_weight_gradient"]

_BACKENDS: dict[Implementation, dict[Operation, Callable[..., Array]]] = {
    "mosaic_gpu": {
        "grouped_matmul": mosaic_gpu.grouped_matmul,
        "grouped_weight_gradient": mosaic_gpu_weight_gradient.grouped_weight_gradient,
    },
    "xla": {
        "grouped_matmul": xla.grouped_matmul,
        "grouped_weight_gradient": xla.grouped_weight_gradient,
    },
    "reference": {
        "grouped_matmul": reference.grouped_matmul,
        "grouped_weight_gradient": reference.grouped_weight_gradient,
    },
}


@dataclasses.dataclass(frozen=True)
class _Options:
    """What a grouped matmul is besides its arrays; hashable, so that it is a static argument."""

    transpose_rhs: bool
    precision: lax.PrecisionLike
    out_dtype: jnp.dtype
    implementation: Implementation | None


def grouped_matmul(
    lhs: Float[Array, "_ K"],
    rhs: Float[Array, "_ _ _"],
    group_sizes: Integer[Array, " G"],
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    group_offset: None = None,
    *,
    transpose_rhs: bool = False,
    lhs_index: Integer[Array, " M"] | None = None,
    rhs_index: Integer[Array, " G"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "M N"]:
    """Multiplies each group of rows of `lhs` with that group's own matrix.

    `out[m] = lhs[m] @ rhs[g]` for every row m of group g. The groups lie end to end from row 0. Rows past the last
    group give zeros and get zero gradients, whatever memory there holds. Sums are taken in float32 (float64 for
    float64 operands). Differentiable in reverse mode, to any order, in `lhs` and `rhs`; `jax.vmap` runs the batch in
    sequence. A drop-in for `jax.lax.ragged_dot`.

    With `lhs_index` row m is `lhs[lhs_index[m]]`. On Hopper the kernel reads these rows where they are, and no
    `lhs[lhs_index]` is ever in memory (ScatterMoE, arXiv 2403.08245, section 3.1). The gradient of `lhs` then takes as
    many passes over it as the most frequent number occurs.

    Args:
        lhs: [M, K], floating point; [T, K] with `lhs_index`.
        rhs: [G, K, N], or [G, N, K] with `transpose_rhs`; floating point. Any number of matrices with `rhs_index`.
        group_sizes: int[G], the rows of each group; a negative size counts as 0, and sizes that sum to more than M
            are clipped there.
        precision: of each product, as in `jax.lax.dot`; bfloat16 and float16 products are exact in any case.
        preferred_element_type: the dtype of the result, by default the promoted dtype of the operands. The result's
            gradient is cast to theirs, in which that of a float32 result of float16 operands overflows past 65504.
        group_offset: not supported; slice `rhs` and `group_sizes` instead.
        transpose_rhs: whether `rhs` holds its matrices transposed.
        lhs_index: int[M], which row of `lhs` each row is, clipped to [0, T); None for row m itself.
        rhs_index: int[G], which matrix of `rhs` each group's is, clipped to those that there are; None for matrix g
            itself.
        implementation: "mosaic_gpu" (Hopper GPUs; bfloat16 and float16), "xla" (everywhere), "reference" (everywhere,
            with G times the work and memory), or None for the fastest that can run here. A named one runs or raises.

    Returns:
        [M, N] in `preferred_element_type`.

    Raises:
        ValueError: shapes or dtypes do not fit, or the named implementation cannot run, with the reason.

    Example:
        >>> import jax.numpy as jnp
        >>> lhs, rhs = jnp.ones((4, 2)), jnp.array([[[1.0], [1.0]], [[5.0], [5.0]]])
        >>> grouped_matmul(lhs, rhs, jnp.array([1, 2])).tolist()
        [[2.0], [10.0], [10.0], [0.0]]
        >>> grouped_matmul(lhs[:1], rhs, jnp.array([1, 1]), lhs_index=jnp.array([0, 0])).tolist()
        [[2.0], [10.0]]
    """
    if group_offset is not None:
        raise ValueError("group_offset is not supported: slice rhs and group_sizes instead.")
    lhs, rhs, group_sizes = jnp.asarray(lhs), jnp.asarray(rhs), jnp.asarray(group_sizes)
    _check_matrix("lhs", lhs, "[M, K]")
    _check_group_sizes(group_sizes)
    lhs_index = _check_index("lhs", lhs, lhs_index)
    if rhs.ndim != 3 or not jnp.issubdtype(rhs.dtype, jnp.floating):
        raise ValueError(f"rhs is {_describe(rhs)}; it must be a floating-point array [G, K, N].")
    rhs_index = _check_index("rhs", rhs, rhs_index)
    if rhs_index is not None and rhs_index.size != group_sizes.size:
        raise ValueError(f"rhs_index has {rhs_index.size} groups and group_sizes {group_sizes.size}; they must agree.")
    if rhs_index is None and rhs.shape[0] != group_sizes.size:
        raise ValueError(f"rhs has {rhs.shape[0]} groups and group_sizes {group_sizes.size}; they must agree.")
    contracted = rhs.shape[2 if transpose_rhs else 1]
    if lhs.shape[1] != contracted:
        layout = "[G, N, K]" if transpose_rhs else "[G, K, N]"
        raise ValueError(
            f"lhs is [M, K] = {list(lhs.shape)} and rhs {layout} = {list(rhs.shape)} (transpose_rhs={transpose_rhs}); "
            "they must have the same K."
        )
    dtype = jnp.promote_types(lhs.dtype, rhs.dtype)
    options = _Options(transpose_rhs, precision, _result_dtype(preferred_element_type, dtype), implementation)
    return _grouped_matmul(options, lhs.astype(dtype), rhs.astype(dtype), group_sizes, lhs_index, rhs_index)


def grouped_weight_gradient(
    lhs: Float[Array, "_ K"],
    out_grad: Float[Array, "_ N"],
    group_sizes: Integer[Array, " G"],
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    *,
    lhs_index: Integer[Array, " M"] | None = None,
    out_grad_index: Integer[Array, " M"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "G K N"]:
    """Computes the gradient of a grouped matmul's `rhs`: for each group, the sum of outer products of its rows.

    `out[g] = lhs[rows of g].T @ out_grad[rows of g]`, exactly zero for an empty group. Rows past the last group and
    rows of other groups never enter, even where they hold NaN. Sums are taken in float32 (float64 for float64
    operands). Differentiable in reverse mode, to any order, in both operands.

    Args:
        lhs: [M, K], floating point; [T, K] with `lhs_index`.
        out_grad: [M, N], floating point; [T, N] with `out_grad_index`.
        group_sizes: int[G], as in `grouped_matmul`.
        precision: as in `grouped_matmul`.
        preferred_element_type: as in `grouped_matmul`.
        lhs_index: int[M], as in `grouped_matmul`.
        out_grad_index: int[M], the same for `out_grad`. On Hopper the rows of one operand can be read where they are;
            where both have an index, those of `out_grad` are copied first.
        implementation: as in `grouped_matmul`.

    Returns:
        [G, K, N] in `preferred_element_type`.

    Raises:
        ValueError: shapes or dtypes do not fit, or the named implementation cannot run, with the reason.

    Example:
        >>> import jax.numpy as jnp
        >>> rows = jnp.array([[1.0], [2.0], [3.0]])
        >>> grouped_weight_gradient(rows, rows, jnp.array([1, 0, 2])).ravel().tolist()
        [1.0, 0.0, 13.0]
    """
    lhs, out_grad, group_sizes = jnp.asarray(lhs), jnp.asarray(out_grad), jnp.asarray(group_sizes)
    _check_matrix("lhs", lhs, "[M, K]")
    _check_matrix("out_grad", out_grad, "[M, N]")
    _check_group_sizes(group_sizes)
    lhs_index, out_grad_index = _check_index("lhs", lhs, lhs_index), _check_index("out_grad", out_grad, out_grad_index)
    num_left, num_right = _num_rows(lhs, lhs_index), _num_rows(out_grad, out_grad_index)
    if num_left != num_right:
        raise ValueError(f"lhs has {num_left} rows and out_grad {num_right}; they must agree.")
    dtype = jnp.promote_types(lhs.dtype, out_grad.dtype)
    options = _Options(False, precision, _result_dtype(preferred_element_type, dtype), implementation)
    operands = lhs.astype(dtype), out_grad.astype(dtype)
    return _grouped_weight_gradient(options, *operands, group_sizes, lhs_index, out_grad_index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(
    options: _Options,
    lhs: Array,
    rhs: Array,
    group_sizes: Array,
    lhs_index: Array | None = None,
    rhs_index: Array | None = None,
) -> Array:
    return _run("grouped_matmul", options, lhs, rhs, group_sizes, lhs_index, rhs_index)


def _grouped_matmul_fwd(options: _Options, *operands: Array | None):
    return _grouped_matmul(options, *operands), operands


def _grouped_matmul_bwd(options: _Options, residuals, out_grad: Array):
    lhs, rhs, group_sizes, lhs_index, rhs_index = residuals
    # The kernels want operands of one dtype, and a float32 result of bfloat16 operands has a float32 gradient.
    out_grad = out_grad.astype(lhs.dtype)
    of_lhs = dataclasses.replace(options, transpose_rhs=not options.transpose_rhs, out_dtype=lhs.dtype)
    of_rhs = dataclasses.replace(options, transpose_rhs=False, out_dtype=rhs.dtype)
    lhs_rows = _grouped_matmul(of_lhs, out_grad, rhs, group_sizes, None, rhs_index)
    left, right = (lhs, lhs_index), (out_grad, None)
    if options.transpose_rhs:
        left, right = right, left
    of_groups = _grouped_weight_gradient(of_rhs, left[0], right[0], group_sizes, left[1], right[1])
    rhs_grad = _to_sources(of_groups.reshape(group_sizes.size, -1), rhs_index, rhs).reshape(rhs.shape)
    return _to_sources(lhs_rows, lhs_index, lhs), rhs_grad, None, None, None


_grouped_matmul.defvjp(_grouped_matmul_fwd, _grouped_matmul_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_weight_gradient(
    options: _Options,
    lhs: Array,
    out_grad: Array,
    group_sizes: Array,
    lhs_index: Array | None = None,
    out_grad_index: Array | None = None,
) -> Array:
    return _run("grouped_weight_gradient", options, lhs, out_grad, group_sizes, lhs_index, out_grad_index)


def _grouped_weight_gradient_fwd(options: _Options, *operands: Array | None):
    return _grouped_weight_gradient(options, *operands), operands


def _grouped_weight_gradient_bwd(options: _Options, residuals, grad: Array):
    lhs, out_grad, group_sizes, lhs_index, out_grad_index = residuals
    of_rows = dataclasses.replace(options, out_dtype=lhs.dtype)
    transposed = dataclasses.replace(of_rows, transpose_rhs=True)
    grad = grad.astype(lhs.dtype)
    lhs_rows = _grouped_matmul(transposed, out_grad, grad, group_sizes, out_grad_index)
    out_grad_rows = _grouped_matmul(of_rows, lhs, grad, group_sizes, lhs_index)
    gradients = _to_sources(lhs_rows, lhs_index, lhs), _to_sources(out_grad_rows, out_grad_index, out_grad)
    return *gradients, None, None, None


_grouped_weight_gradient.defvjp(_grouped_weight_gradient_fwd, _grouped_weight_gradient_bwd)


def _run(
    operation: Operation,
    options: _Options,
    first: Array,
    second: Array,
    group_sizes: Array,
    *indices: Array | None,
) -> Array:
    """Runs one of the two operations on the backend that the options name, or the best that can run it here.

    `indices` are of the rows of `first`, and of the matrices or rows of `second`.
    """
    static: dict[str, Any] = {
        "precision": options.precision,
        "accumulator_dtype": jnp.promote_types(first.dtype, jnp.float32),
        "out_dtype": options.out_dtype,
    }
    if operation == "grouped_matmul":
        static["transpose_rhs"] = options.transpose_rhs
        out_shape = (_num_rows(first, indices[0]), second.shape[1 if options.transpose_rhs else 2])
    else:
        out_shape = (group_sizes.size, first.shape[1], second.shape[1])
    widths = *first.shape[1:], *second.shape[1:]
    reason = hopper.why_unsupported(widths, first.dtype, options.out_dtype)
    name = choose_implementation(operation, options.implementation, reason)
    if 0 in (*first.shape, *second.shape, *(index.size for index in indices if index is not None)):
        return jnp.zeros(out_shape, options.out_dtype)

    # A kernel has no batched form of its own, and a batched loop over blocks would run every element for as long as
    # the longest: one element after the other is the right order for both.
    @sequential_vmap
    def call(first: Array, second: Array, group_sizes: Array, indices: list[Array | None]) -> Array:
        return _BACKENDS[name][operation](first, second, group_sizes, *indices, **static)

    return call(first, second, group_sizes, list(indices))


def _to_sources(rows: Array, index: Array | None, sources: Array) -> Array:
    """Takes the gradient of gathered rows to where they came from."""
    if index is None:
        return rows
    return sum_rows(rows, clip_index(index, sources), sources.shape[0]).astype(sources.dtype)


def _num_rows(matrix: Array, index: Array | None) -> int:
    return matrix.shape[0] if index is None else index.size


def _check_index(name: str, matrix: Array, index: Any) -> Array | None:
    if index is None:
        return None
    index = jnp.asarray(index)
    if index.ndim != 1 or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(f"{name}_index is {_describe(index)}; it must be a vector of integers, [M].")
    if index.size and not matrix.shape[0]:
        raise ValueError(f"{name} has no rows and {name}_index {index.size}; there must be some to choose from.")
    # What a cast could wrap around is clipped before it, and the rest where it is used.
    return index if index.dtype == jnp.int32 else clip_index(index, matrix).astype(jnp.int32)


def _describe(array: Array) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _check_matrix(name: str, array: Array, layout: str) -> None:
    if array.ndim != 2 or not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} is {_describe(array)}; it must be a floating-point matrix {layout}.")


def _check_group_sizes(group_sizes: Array) -> None:
    if group_sizes.ndim != 1 or not group_sizes.size or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"group_sizes is {_describe(group_sizes)}; it must be a vector of integers, [G].")


def _result_dtype(preferred: jax.typing.DTypeLike | None, operands: jnp.dtype) -> jnp.dtype:
    dtype = jnp.dtype(operands if preferred is None else preferred)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"preferred_element_type is {dtype}; it must be a floating-point dtype.")
    return dtype
