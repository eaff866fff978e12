"""The public block-sparse products: argument checks, the choice of implementation, derivatives and batching."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float

from pallas_kernels.block_sparse import mosaic_gpu, reference, xla
from pallas_kernels.block_sparse.matrix import BlockSparseMatrix
from pallas_kernels.block_sparse.topology import Topology
from pallas_kernels.implementations import Implementation, choose_implementation

Operation = Literal["sdd", "dsd"]

_BACKENDS: dict[Implementation, dict[Operation, Callable[..., Array]]] = {
    "mosaic_gpu": {"sdd": mosaic_gpu.sdd, "dsd": mosaic_gpu.dsd},
    "xla": {"sdd": xla.sdd, "dsd": xla.dsd},
    "reference": {"sdd": reference.sdd, "dsd": reference.dsd},
}


@dataclasses.dataclass(frozen=True)
class _Options:
    """What a product is besides its arrays and which are transposed; hashable, so that it is a static argument."""

    precision: lax.PrecisionLike
    out_dtype: jnp.dtype
    implementation: Implementation | None


def sdd(
    lhs: Float[Array, "_ _"],
    rhs: Float[Array, "_ _"],
    topology: Topology | BlockSparseMatrix,
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    *,
    transpose_lhs: bool = False,
    transpose_rhs: bool = False,
    implementation: Implementation | None = None,
) -> BlockSparseMatrix:
    """Computes the blocks of a product of dense matrices that a topology names: sparse = dense @ dense.

    Only these are computed. Sums are taken in float32 (float64 for float64 operands). Differentiable in reverse mode,
    to any order, in `lhs` and `rhs`; `jax.vmap` runs the batch in sequence. On a mesh call it inside `jax.shard_map`,
    with `check_vma=False`. The operation of this name of MegaBlocks (arXiv 2211.15841, section 5.1) and STK.

    Args:
        lhs: [M, K], or [K, M] with `transpose_lhs`; floating point.
        rhs: [K, N], or [N, K] with `transpose_rhs`; floating point.
        topology: of shape (M, N); of a matrix its topology is taken.
        precision: of each product, as in `jax.lax.dot`; bfloat16 and float16 products are exact in any case.
        preferred_element_type: the dtype of the result, by default the promoted dtype of the operands. The result's
            gradient is cast to theirs, in which that of a float32 result of float16 operands overflows past 65504.
        transpose_lhs: whether `lhs` is the transpose of the operand. No copy is made of it.
        transpose_rhs: whether `rhs` is.
        implementation: "mosaic_gpu" (Hopper GPUs; bfloat16 and float16; blocks of 128 or 64), "xla" and "reference"
            (everywhere; the latter computes the dense product), or None for the fastest that can run here. A named one
            runs or raises.

    Returns:
        A `BlockSparseMatrix` of shape (M, N) whose padding is zero.

    Raises:
        ValueError: shapes or dtypes do not fit, or the named implementation cannot run, with the reason.

    Example:
        >>> import jax.numpy as jnp
        >>> topology = Topology.from_mask(jnp.array([[True, False], [False, True]]), block=1)
        >>> ones = jnp.ones((2, 3))
        >>> sdd(ones, ones, topology, transpose_rhs=True).to_dense().tolist()
        [[3.0, 0.0], [0.0, 3.0]]
    """
    if isinstance(topology, BlockSparseMatrix):
        if topology.is_transposed:
            options = {"transpose_lhs": not transpose_rhs, "transpose_rhs": not transpose_lhs}
            product = sdd(
                rhs, lhs, topology.topology, precision, preferred_element_type, **options, implementation=implementation
            )
            return product.T
        topology = topology.topology
    if not isinstance(topology, Topology):
        raise ValueError(
            f"topology is a {type(topology).__name__}; it must be a Topology, such as of Topology.from_mask, or a "
            "BlockSparseMatrix that has it."
        )
    lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
    _check_matrix("lhs", lhs)
    _check_matrix("rhs", rhs)
    rows, of_lhs = lhs.shape[::-1] if transpose_lhs else lhs.shape
    of_rhs, columns = rhs.shape[::-1] if transpose_rhs else rhs.shape
    if of_lhs != of_rhs or (rows, columns) != topology.shape:
        raise ValueError(
            f"lhs is {list(lhs.shape)} (transpose_lhs={transpose_lhs}) and rhs {list(rhs.shape)} "
            f"(transpose_rhs={transpose_rhs}); their product must exist and have the topology's shape, "
            f"{topology.shape}."
        )
    dtype = jnp.promote_types(lhs.dtype, rhs.dtype)
    options = _Options(precision, _result_dtype(preferred_element_type, dtype), implementation)
    values = _sdd(options, transpose_lhs, transpose_rhs, lhs.astype(dtype), rhs.astype(dtype), topology)
    return BlockSparseMatrix(values, topology)


def dsd(
    sparse: BlockSparseMatrix,
    dense: Float[Array, "_ _"],
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    *,
    transpose_rhs: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "M N"]:
    """Multiplies a block-sparse with a dense matrix: dense = sparse @ dense.

    Differentiable in reverse mode, to any order, in `sparse.values` and `dense`; sums, batches and meshes as in
    `sdd`.

    Args:
        sparse: of shape (M, K), floating point; its `.T` is as fast.
        dense: [K, N], or [N, K] with `transpose_rhs`; floating point.
        precision: as in `sdd`.
        preferred_element_type: as in `sdd`.
        transpose_rhs: whether `dense` is the transpose of the operand. No copy is made of it.
        implementation: as in `sdd`.

    Returns:
        [M, N], zero in rows without blocks.

    Raises:
        ValueError: shapes or dtypes do not fit, or the named implementation cannot run, with the reason.

    Example:
        >>> import jax.numpy as jnp
        >>> sparse = BlockSparseMatrix.from_dense(jnp.array([[0.0, 2.0], [0.0, 0.0]]), block=1)
        >>> dsd(sparse, jnp.array([[1.0], [5.0]])).tolist(), dsd(sparse.T, jnp.array([[1.0], [5.0]])).tolist()
        ([[10.0], [0.0]], [[0.0], [2.0]])
    """
    _check_sparse(sparse)
    dense = jnp.asarray(dense)
    _check_matrix("dense", dense)
    contracted = dense.shape[1 if transpose_rhs else 0]
    if sparse.shape[1] != contracted:
        raise ValueError(
            f"sparse is {sparse.shape} and dense {list(dense.shape)} (transpose_rhs={transpose_rhs}); the one must "
            "have as many columns as the other rows."
        )
    transposes = _Transposes(sparse.is_transposed, transpose_rhs, False)
    return _multiply_sparse(transposes, sparse, dense, precision, preferred_element_type, implementation)


def dds(
    dense: Float[Array, "_ _"],
    sparse: BlockSparseMatrix,
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    *,
    transpose_lhs: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "M N"]:
    """Multiplies a dense with a block-sparse matrix: dense = dense @ sparse.

    Differentiable in reverse mode, to any order, in `dense` and `sparse.values`; sums, batches and meshes as in
    `sdd`.

    Args:
        dense: [M, K], or [K, M] with `transpose_lhs`; floating point.
        sparse: of shape (K, N), floating point; its `.T` is as fast.
        precision: as in `sdd`.
        preferred_element_type: as in `sdd`.
        transpose_lhs: whether `dense` is the transpose of the operand. No copy is made of it.
        implementation: as in `sdd`.

    Returns:
        [M, N], zero in columns without blocks.

    Raises:
        ValueError: shapes or dtypes do not fit, or the named implementation cannot run, with the reason.

    Example:
        >>> import jax.numpy as jnp
        >>> sparse = BlockSparseMatrix.from_dense(jnp.array([[0.0, 2.0], [0.0, 0.0]]), block=1)
        >>> dds(jnp.array([[1.0, 5.0]]), sparse).tolist()
        [[0.0, 2.0]]
    """
    _check_sparse(sparse)
    dense = jnp.asarray(dense)
    _check_matrix("dense", dense)
    contracted = dense.shape[0 if transpose_lhs else 1]
    if contracted != sparse.shape[0]:
        raise ValueError(
            f"dense is {list(dense.shape)} (transpose_lhs={transpose_lhs}) and sparse {sparse.shape}; the one must "
            "have as many columns as the other rows."
        )
    # (sparse.T @ dense.T).T
    transposes = _Transposes(not sparse.is_transposed, not transpose_lhs, True)
    return _multiply_sparse(transposes, sparse, dense, precision, preferred_element_type, implementation)


@dataclasses.dataclass(frozen=True)
class _Transposes:
    """What of `out = sparse @ dense` is stored transposed."""

    sparse: bool
    dense: bool
    out: bool


def _multiply_sparse(transposes, sparse, dense, precision, preferred_element_type, implementation) -> Array:
    dtype = jnp.promote_types(sparse.dtype, dense.dtype)
    options = _Options(precision, _result_dtype(preferred_element_type, dtype), implementation)
    return _dsd(options, transposes, sparse.values.astype(dtype), dense.astype(dtype), sparse.topology)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sdd(
    options: _Options, transpose_lhs: bool, transpose_rhs: bool, lhs: Array, rhs: Array, topology: Topology
) -> Array:
    flags = {"transpose_lhs": transpose_lhs, "transpose_rhs": transpose_rhs}
    width = lhs.shape[0 if transpose_lhs else 1]
    out_shape = (topology.max_num_blocks, topology.block, topology.block)
    return _run("sdd", options, flags, (lhs, rhs), topology, width, out_shape)


def _sdd_fwd(options, transpose_lhs, transpose_rhs, lhs, rhs, topology):
    return _sdd(options, transpose_lhs, transpose_rhs, lhs, rhs, topology), (lhs, rhs, topology)


def _sdd_bwd(options, transpose_lhs, transpose_rhs, residuals, grad: Array):
    lhs, rhs, topology = residuals
    # The kernels want operands of one dtype, and a float32 result of bfloat16 operands has a float32 gradient.
    grad = grad.astype(lhs.dtype)
    options = dataclasses.replace(options, out_dtype=lhs.dtype)
    # grad @ rhs.T and lhs.T @ grad = (grad.T @ lhs).T
    of_lhs = _Transposes(False, not transpose_rhs, transpose_lhs)
    of_rhs = _Transposes(True, transpose_lhs, not transpose_rhs)
    return _dsd(options, of_lhs, grad, rhs, topology), _dsd(options, of_rhs, grad, lhs, topology), None


_sdd.defvjp(_sdd_fwd, _sdd_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dsd(options: _Options, transposes: _Transposes, values: Array, dense: Array, topology: Topology) -> Array:
    flags = {f"transpose_{name}": flag for name, flag in dataclasses.asdict(transposes).items()}
    rows, width = topology.shape[transposes.sparse], dense.shape[0 if transposes.dense else 1]
    out_shape = (width, rows) if transposes.out else (rows, width)
    return _run("dsd", options, flags, (values, dense), topology, width, out_shape)


def _dsd_fwd(options, transposes, values, dense, topology):
    return _dsd(options, transposes, values, dense, topology), (values, dense, topology)


def _dsd_bwd(options, transposes, residuals, grad: Array):
    values, dense, topology = residuals
    grad = grad.astype(values.dtype)
    options = dataclasses.replace(options, out_dtype=values.dtype)
    if transposes.sparse:  # dense @ grad.T
        values_grad = _sdd(options, transposes.dense, not transposes.out, dense, grad, topology)
    else:  # grad @ dense.T
        values_grad = _sdd(options, transposes.out, not transposes.dense, grad, dense, topology)
    of_dense = _Transposes(not transposes.sparse, transposes.out, transposes.dense)
    return values_grad, _dsd(options, of_dense, values, grad, topology), None


_dsd.defvjp(_dsd_fwd, _dsd_bwd)


def _run(
    operation: Operation,
    options: _Options,
    flags: dict[str, bool],
    operands: tuple[Array, Array],
    topology: Topology,
    width: int,
    out_shape: tuple[int, ...],
) -> Array:
    """Runs one of the two operations on the backend that the options name, or the best that can run it here.

    `width` is that of the dense operand beside the topology's rows and columns.
    """
    dtype = operands[0].dtype
    static: dict[str, Any] = {
        "precision": options.precision,
        "accumulator_dtype": jnp.promote_types(dtype, jnp.float32),
        "out_dtype": options.out_dtype,
        **flags,
    }
    reason = mosaic_gpu.why_unsupported(topology, width, dtype, options.out_dtype)
    name = choose_implementation(operation, options.implementation, reason)
    if 0 in (*operands[0].shape, *operands[1].shape, *out_shape):
        return jnp.zeros(out_shape, options.out_dtype)

    # One element of a batch after the other, as for grouped matmuls: no kernel has a batched form.
    @sequential_vmap
    def call(first: Array, second: Array, topology: Topology) -> Array:
        return _BACKENDS[name][operation](first, second, topology, **static)

    return call(*operands, topology)


def _check_matrix(name: str, array: Array) -> None:
    if array.ndim != 2 or not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} is {array.dtype}{list(array.shape)}; it must be a floating-point matrix.")


def _check_sparse(sparse: BlockSparseMatrix) -> None:
    if not isinstance(sparse, BlockSparseMatrix):
        raise ValueError(
            f"sparse is a {type(sparse).__name__}; it must be a BlockSparseMatrix, such as of "
            "BlockSparseMatrix.from_dense. It is the left operand of dsd and the right one of dds."
        )


def _result_dtype(preferred: jax.typing.DTypeLike | None, operands: jnp.dtype) -> jnp.dtype:
    dtype = jnp.dtype(operands if preferred is None else preferred)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"preferred_element_type is {dtype}; it must be a floating-point dtype.")
    return dtype
