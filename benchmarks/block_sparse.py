"""Measures block-sparse products beside batched ones of as many operations on cuBLAS, in one run.

The products are those of dropless MoE layers as MegaBlocks measured them (arXiv 2211.15841, section 6.3): the two of an
expert MLP and their four gradients. `python -m benchmarks.block_sparse` takes about two minutes on one H100. Without
a GPU it measures a small problem on XLA: that the program works, not what a GPU does.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from rich.console import Console

from benchmarks.grouped_matmul import measure, show, with_ratios
from benchmarks.jax_matmuls import CUBLAS_OPTIONS, check_memory, kernel_implementation
from benchmarks.matmuls import Candidate, Problem
from benchmarks.record import chosen, custom_calls, describe_environment, make_console, make_parser, open_results
from pallas_kernels.block_sparse import BlockSparseMatrix, Topology, dds, dsd, expert_topology, sdd

PROBLEMS = {
    problem.name: problem
    for problem in (
        # Rows of all experts, contracted width, columns of one expert, experts.
        Problem("megablocks_xs", 65_536, 512, 2048, 64),
        Problem("megablocks_small", 32_768, 768, 3072, 64),
        Problem("megablocks_medium", 8192, 1024, 4096, 64),
        Problem("four_experts", 8192, 4096, 16_384, 4),
        Problem("tiny", 512, 64, 256, 2),
    )
}
_ON_GPU, _ELSEWHERE = ("megablocks_xs", "megablocks_small", "megablocks_medium", "four_experts"), ("tiny",)

# What each operation multiplies, by experts e: rows m of inputs x and output gradients y of width k, matrices u and
# d of the up- and down-projection, hidden values h of width n.
EQUATIONS = {
    "sdd": ("emk,ekn->emn", "x", "u"),
    "sdd_lhs_gradient": ("emn,ekn->emk", "h", "u"),
    "sdd_rhs_gradient": ("emk,emn->ekn", "x", "h"),
    "dsd": ("emn,enk->emk", "h", "d"),
    "dsd_lhs_gradient": ("emk,enk->emn", "y", "d"),
    "dsd_rhs_gradient": ("emn,emk->enk", "h", "y"),
}

METHOD = """\
bfloat16 operands and results, standard normal values, made on the device; M / G rows for each of G experts, whole
blocks of 128.
sdd: dense @ dense at the blocks of a block-diagonal topology, G experts of [M / G, K] @ [K, N]. dsd: sparse @ dense,
[M / G, N] @ [N, K]. Their gradients: of the left and of the right operand of each; of dense ones dense, of sparse ones
sparse. Each takes 2 M K N operations. The topology is made before. As many rows of zeros belong to no expert as the
static bound leaves over where groups are whole blocks, and results for them are cleared.
jax_batched: the same by a batched matmul of G equal groups. On NVIDIA GPUs that is cuBLAS (XLA's own Triton matmuls are
off for it).
relative_error: of the first and the last expert's part, against float32 products, before anything is timed.
All is compiled and warmed up first. Then {rounds} rounds, in each of which every implementation of every operation has
one turn, in random order: 30 ms of rest, one untimed call, and as many calls as fill about 15 ms, timed together.
ms_median, ms_min and ms_max are of one call, over the rounds; spread is (ms_max - ms_min) / ms_median. ratio: the
ms_median of jax_batched of the same operation divided by this one. Seed {seed}."""


class BlockSparseProducts:
    """The operands of a problem on JAX's first device, and the candidates that multiply them.

    Args:
        problem: The shapes.
        seed: Of the operands.
    """

    def __init__(self, problem: Problem, seed: int):
        self._problem = problem
        self._operands, self._flat, self._topology = _make_operands(problem, seed)

    def candidates(self) -> list[Candidate]:
        """The kernels of this project, and batched products."""
        backend = kernel_implementation()
        run: dict[str, Any] = {"implementation": backend}

        def sparse(values: Array, topology: Topology) -> BlockSparseMatrix:
            return BlockSparseMatrix(values, topology)

        products: dict[str, Callable[[Array, Array, Topology], Array]] = {
            "sdd": lambda x, u, topology: sdd(x, u, topology, **run).values,
            "sdd_lhs_gradient": lambda h, u, topology: dsd(sparse(h, topology), u, transpose_rhs=True, **run),
            "sdd_rhs_gradient": lambda x, h, topology: dds(x, sparse(h, topology), transpose_lhs=True, **run),
            "dsd": lambda h, d, topology: dsd(sparse(h, topology), d, **run),
            "dsd_lhs_gradient": lambda y, d, topology: sdd(y, d, topology, transpose_rhs=True, **run).values,
            "dsd_rhs_gradient": lambda h, y, topology: dsd(sparse(h, topology).T, y, **run),
        }
        candidates = []
        for operation, (equation, left, right) in EQUATIONS.items():
            operands = self._flat[left], self._flat[right], self._topology
            part = functools.partial(self._expert_of_flat, equation.partition("->")[2])
            facts = {"backend": backend}
            candidates.append(self._candidate(operation, "pallas_kernels", products[operation], operands, part, facts))
            operands = self._operands[left], self._operands[right]
            batched = functools.partial(jnp.einsum, equation)
            part = functools.partial(lambda out, expert: out[expert])
            candidates.append(
                self._candidate(operation, "jax_batched", batched, operands, part, {}, dict(CUBLAS_OPTIONS))
            )
        return candidates

    def _candidate(
        self,
        operation: str,
        implementation: str,
        function: Callable[..., Array],
        operands: tuple[Any, ...],
        part_of_expert: Callable[[Array, int], Array],
        facts: dict[str, Any],
        options: dict[str, Any] | None = None,
    ) -> Candidate:
        def prepare() -> tuple[Callable[[], Array], dict[str, Any]]:
            compiled = jax.jit(function).lower(*operands).compile(compiler_options=options)
            check_memory(compiled)
            return functools.partial(compiled, *operands), {"custom_calls": custom_calls(compiled), **facts}

        def relative_error(out: Array) -> float:
            equation, left, right = EQUATIONS[operation]
            of_experts = equation.replace("e", "")
            errors = []
            for expert in (0, self._problem.G - 1):
                lhs, rhs = (self._operands[name][expert] for name in (left, right))
                errors.append(float(_relative_error(part_of_expert(out, expert), lhs, rhs, of_experts)))
            return max(errors)

        return Candidate(operation, implementation, prepare, relative_error, jax.block_until_ready)

    def _expert_of_flat(self, letters: str, out: Array, expert: int) -> Array:
        """Cuts the part of an expert out of a result of the kernels, given the letters of its axes."""
        rows, columns = self._problem.M // self._problem.G, self._problem.N
        if letters == "emn":
            height, width, block = rows // self._topology.block, columns // self._topology.block, self._topology.block
            blocks = out[expert * height * width : (expert + 1) * height * width]
            return blocks.reshape(height, width, block, block).swapaxes(1, 2).reshape(rows, columns)
        if letters == "ekn":
            return out[:, expert * columns : (expert + 1) * columns]
        size = rows if letters == "emk" else columns
        return out[expert * size : (expert + 1) * size]


@functools.partial(jax.jit, static_argnums=(0,))
def _make_operands(problem: Problem, seed: int) -> tuple[dict[str, Array], dict[str, Array], Topology]:
    """Makes the operands by experts, the same as the kernels take them, and the topology."""
    M, K, N, G = problem.M, problem.K, problem.N, problem.G
    rows = M // G
    topology = expert_topology(jnp.full(G, rows, jnp.int32), [N] * G, num_rows=M)
    shapes = {"x": (G, rows, K), "y": (G, rows, K), "u": (G, K, N), "d": (G, N, K), "h": (G, rows, N)}
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    by_expert = {
        name: jax.random.normal(key, shape, jnp.bfloat16)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    block = topology.block
    blocks = by_expert["h"].reshape(M // block, block, N // block, block).swapaxes(1, 2).reshape(-1, block, block)

    def pad(array: Array, size: int) -> Array:
        return jnp.pad(array, ((0, size - array.shape[0]), *((0, 0),) * (array.ndim - 1)))

    flat = {
        "x": pad(by_expert["x"].reshape(M, K), topology.shape[0]),
        "y": pad(by_expert["y"].reshape(M, K), topology.shape[0]),
        "u": by_expert["u"].swapaxes(0, 1).reshape(K, G * N),
        "d": by_expert["d"].reshape(G * N, K),
        "h": pad(blocks, topology.max_num_blocks),
    }
    return by_expert, flat, topology


@functools.partial(jax.jit, static_argnums=3)
def _relative_error(actual: Array, lhs: Array, rhs: Array, equation: str) -> Array:
    expected = jnp.einsum(equation, lhs.astype(jnp.float32), rhs.astype(jnp.float32), precision="highest")
    return jnp.linalg.norm(actual.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)


def _measure(problem: Problem, results: Any, console: Console, *, rounds: int, seed: int) -> None:
    if any(record["configuration"] == problem.name for record in results.records):
        console.print(f"{problem.name} is in {results.path} already")
        return
    records = measure(BlockSparseProducts(problem, seed).candidates(), problem, rounds=rounds, seed=seed)
    results.replace(with_ratios([*results.records, *records]))
    failed = sum("failure" in record for record in records)
    console.print(f"{problem.name}: {len(records) - failed} timed, {failed} not")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns 1 if a kernel of this project failed, and 0 otherwise."""
    parser = make_parser("block_sparse", __doc__)
    parser.add_argument("--only", help=f"problems or patterns, separated by commas: {', '.join(PROBLEMS)}")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    names = _ON_GPU if jax.devices()[0].platform == "gpu" else _ELSEWHERE
    if options.only:
        names = chosen(parser, "--only", options.only, PROBLEMS)
    environment = describe_environment()
    console = make_console(environment)
    method = METHOD.format(rounds=options.rounds, seed=options.seed)
    results = open_results(parser, options, method, environment)
    for name in names:
        _measure(PROBLEMS[name], results, console, rounds=options.rounds, seed=options.seed)
    show(results.records, f"{environment['hardware']['device']}, bfloat16", console, problems=list(PROBLEMS))
    console.print(f"Written to {results.path}")
    ours = [record for record in results.records if record["implementation"] == "pallas_kernels"]
    return int(any("failure" in record for record in ours))


if __name__ == "__main__":
    raise SystemExit(main())
