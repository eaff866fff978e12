"""Grouped matmuls through JAX: this project's kernels, cuBLAS as XLA calls it, and `jax.lax.ragged_dot`."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from benchmarks.matmuls import Candidate, Operation, Problem, Sample, draw_sample
from benchmarks.record import custom_calls
from pallas_kernels import Implementation, grouped_matmul, grouped_weight_gradient
from pallas_kernels.device import has_hopper_gpu

# The dense and batched products stand for cuBLAS, so XLA may not choose a Triton kernel of its own for them.
CUBLAS_OPTIONS: Mapping[str, Any] = {"xla_gpu_enable_triton_gemm": False}
NO_AUTOTUNING: Mapping[str, Any] = {"xla_gpu_autotune_level": 0}


class JaxMatmuls:
    """The operands of a problem on JAX's first device, and the candidates that multiply them.

    Args:
        problem: The shapes.
        seed: Of the operands and the group sizes.
    """

    def __init__(self, problem: Problem, seed: int):
        self._problem, self._seed = problem, seed
        self._sizes = problem.random_group_sizes(seed)
        self._lhs, self._rhs, self._out_grad = _operands(problem, seed)

    def candidates(self) -> list[Candidate]:
        """The kernels of this project, and dense and batched products."""
        G, backend = self._problem.G, kernel_implementation()
        kernel = functools.partial(grouped_matmul, implementation=backend)

        def by_group(rows: Array) -> Array:
            return rows.reshape(G, -1, rows.shape[1])

        def batched(equation: str, rows: Array, rhs: Array) -> Array:
            out = jnp.einsum(equation, by_group(rows), rhs)
            return out.reshape(-1, out.shape[2])

        return [
            *self._of(
                "pallas_kernels",
                forward=kernel,
                transposed=functools.partial(kernel, transpose_rhs=True),
                weight_gradient=functools.partial(grouped_weight_gradient, implementation=backend),
                facts={"backend": backend},
            ),
            *self._of(
                "jax_dense",
                forward=lambda lhs, rhs, _: lhs @ rhs,
                transposed=lambda out_grad, rhs, _: out_grad @ rhs.T,
                weight_gradient=lambda lhs, out_grad, _: (lhs.T @ out_grad)[None],
                num_groups=1,
                options=CUBLAS_OPTIONS,
            ),
            *self._of(
                "jax_batched",
                forward=lambda lhs, rhs, _: batched("gmk,gkn->gmn", lhs, rhs),
                transposed=lambda out_grad, rhs, _: batched("gmn,gkn->gmk", out_grad, rhs),
                weight_gradient=lambda lhs, out_grad, _: jnp.einsum("gmk,gmn->gkn", by_group(lhs), by_group(out_grad)),
                num_groups=G,
                options=CUBLAS_OPTIONS,
            ),
        ]

    def ragged_dot_candidates(self) -> list[Candidate]:
        """`jax.lax.ragged_dot` and its transposes, which may ask for more memory than there is."""
        like_lhs, like_rhs = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (self._lhs, self._rhs))

        def transposed(out_grad: Array, rhs: Array, sizes: Array) -> Array:
            return jax.linear_transpose(lambda lhs: lax.ragged_dot(lhs, rhs, sizes), like_lhs)(out_grad)[0]

        def weight_gradient(lhs: Array, out_grad: Array, sizes: Array) -> Array:
            return jax.linear_transpose(lambda rhs: lax.ragged_dot(lhs, rhs, sizes), like_rhs)(out_grad)[0]

        return self._of(
            "jax_ragged_dot",
            forward=lax.ragged_dot,
            transposed=transposed,
            weight_gradient=weight_gradient,
            probe=NO_AUTOTUNING,
        )

    def _of(
        self,
        implementation: str,
        *,
        forward: Callable[..., Array],
        transposed: Callable[..., Array],
        weight_gradient: Callable[..., Array],
        num_groups: int | None = None,
        options: Mapping[str, Any] | None = None,
        probe: Mapping[str, Any] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> list[Candidate]:
        """Describes how an implementation computes the three operations.

        Args:
            implementation: How it is called in the results.
            forward: Called with lhs, rhs (a matrix, if there is one group) and the random group sizes.
            transposed: Called with out_grad, rhs and the group sizes.
            weight_gradient: Called with lhs, out_grad and the group sizes.
            num_groups: How many groups of one size it computes with; None for the random ones.
            options: XLA's, to compile with.
            probe: XLA's, to compile with first, to see if it fits: autotuning what does not waits long for
                memory.
            facts: For the records.
        """
        lhs, rhs, out_grad, sizes = self._lhs, self._rhs, self._out_grad, jnp.asarray(self._sizes)
        groups = self._sizes if num_groups is None else self._problem.equal_group_sizes(num_groups)
        sample = draw_sample(self._problem, groups, self._seed)
        factor = rhs[0] if num_groups == 1 else rhs

        def candidate(operation: Operation, function: Callable[..., Array], *operands: Array) -> Candidate:
            def prepare() -> tuple[Callable[[], Array], dict[str, Any]]:
                lowered = jax.jit(function).lower(*operands)
                if probe is not None:
                    check_memory(lowered.compile(compiler_options=dict(probe)))
                compiled = lowered.compile(compiler_options=dict(options or {}))
                check_memory(compiled)
                return functools.partial(compiled, *operands), {
                    "custom_calls": custom_calls(compiled),
                    **(facts or {}),
                }

            def relative_error(out: Array) -> float:
                if operation == "weight_gradient":
                    return float(_error_of_groups(out, lhs, out_grad, sample))
                return float(_error_of_rows(out, operands[0], rhs, sample, transpose_rhs=operation == "transposed"))

            return Candidate(operation, implementation, prepare, relative_error, jax.block_until_ready)

        return [
            candidate("forward", forward, lhs, factor, sizes),
            candidate("transposed", transposed, out_grad, factor, sizes),
            candidate("weight_gradient", weight_gradient, lhs, out_grad, sizes),
        ]


def kernel_implementation() -> Implementation:
    """The implementation that is measured here: named, so that it cannot fall back to another."""
    return "mosaic_gpu" if has_hopper_gpu() else "xla"


@functools.partial(jax.jit, static_argnums=(0,))
def _operands(problem: Problem, seed: int) -> tuple[Array, Array, Array]:
    lhs, rhs, out_grad = jax.random.split(jax.random.key(seed), 3)
    M, K, N, G = problem.M, problem.K, problem.N, problem.G
    return (
        jax.random.normal(lhs, (M, K), jnp.bfloat16),
        jax.random.normal(rhs, (G, K, N), jnp.bfloat16),
        jax.random.normal(out_grad, (M, N), jnp.bfloat16),
    )


def check_memory(compiled: jax.stages.Compiled) -> None:
    """Raises a MemoryError if a function needs more than is free, which running it finds out more slowly."""
    stats = jax.devices()[0].memory_stats()
    plan = compiled.memory_analysis()
    if not stats or "bytes_limit" not in stats or plan is None:
        return
    asked = plan.temp_size_in_bytes + plan.output_size_in_bytes
    free = stats["bytes_limit"] - stats["bytes_in_use"]
    if asked > free:
        raise MemoryError(
            f"XLA asks for {asked / 2**30:.1f} GiB beside the operands, and {free / 2**30:.1f} GiB are free of the "
            f"{stats['bytes_limit'] / 2**30:.1f} GiB that JAX may use"
        )


@functools.partial(jax.jit, static_argnames="transpose_rhs")
def _error_of_rows(out: Array, lhs: Array, rhs: Array, sample: Sample, *, transpose_rhs: bool) -> Array:
    def product(row_and_group: tuple[Array, Array]) -> Array:
        row, group = row_and_group
        matrix = rhs[group].astype(jnp.float32)
        return jnp.dot(lhs[row].astype(jnp.float32), matrix.T if transpose_rhs else matrix, precision="highest")

    return _relative_error(out[sample.rows], lax.map(product, (sample.rows, sample.row_group)))


@jax.jit
def _error_of_groups(out: Array, lhs: Array, out_grad: Array, sample: Sample) -> Array:
    row = jnp.arange(lhs.shape[0])[:, None]
    columns = lhs[:, sample.columns].astype(jnp.float32)

    def product(bounds: tuple[Array, Array]) -> Array:
        start, end = bounds
        of_group = jnp.where((row >= start) & (row < end), columns, 0)
        return jnp.dot(of_group.T, out_grad.astype(jnp.float32), precision="highest")

    expected = lax.map(product, (sample.start, sample.end))
    return _relative_error(out[sample.groups[:, None], sample.columns[None]], expected)


def _relative_error(actual: Array, expected: Array) -> Array:
    return jnp.linalg.norm(actual.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
