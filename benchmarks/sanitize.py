"""Runs each Hopper kernel on a small case under NVIDIA's compute-sanitizer, and records what it finds.

`python -m benchmarks.sanitize` takes about two minutes on one H100. It needs `compute-sanitizer`, which comes with the
CUDA toolkit.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import Record, commit, describe_environment, make_console, make_parser, new_process, open_results
from jmoe.activations import value_and_derivative
from pallas_kernels import activation_gradient, combine, grouped_matmul, grouped_weight_gradient, top_k
from pallas_kernels.block_sparse import BlockSparseMatrix, dds, dsd, expert_topology, sdd
from pallas_kernels.block_sparse.mosaic_gpu import BLOCKS
from pallas_kernels.device import has_hopper_gpu
from pallas_kernels.implementations import Implementation

type Case = tuple[str, Callable[..., jax.Array], tuple[jax.Array, ...]]

METHOD = """\
Each kernel runs once on 250 rows in groups of 101, 0, 77 and 50, with NaN past the groups, or on block-sparse matrices
of such groups and experts of 384, 128, 128 and 256 columns, in blocks of 128 and of 64, with NaN past these, in one
process under compute-sanitizer; memory comes from the driver, array by array, so that accesses outside of one are seen.
Each result is compared with the reference implementation."""

TOOLS = ("memcheck", "racecheck")
_WIDTHS = (384, 128, 128, 256)  # of experts, whose blocks are then 3, 1, 1 and 2, or twice as many
_SIZES, _NUM_ROWS, _NUM_TOKENS = (101, 0, 77, 50), 250, 61
_TOLERANCE = 1e-2  # of bfloat16 results
_ERROR_STATUS = 99
_TIMEOUT_SECONDS = 400


def cases() -> Iterator[Case]:
    """Yields the name of each kernel, a function that runs it by an implementation, and its operands."""
    draw = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(draw.standard_normal(shape).astype(jnp.bfloat16))

    def past_groups_nan(columns: int) -> jax.Array:
        rows = draw.standard_normal((_NUM_ROWS, columns)).astype(jnp.bfloat16)
        rows[sum(_SIZES) :] = np.nan
        return jnp.asarray(rows)

    sizes = jnp.asarray(np.array(_SIZES, np.int32))
    index = jnp.asarray(draw.integers(0, _NUM_TOKENS, _NUM_ROWS).astype(np.int32))
    k, n, num_groups = 128, 192, len(_SIZES)
    matmul, gradient = grouped_matmul, grouped_weight_gradient
    transposed = functools.partial(matmul, transpose_rhs=True)
    rhs, rhs_transposed, tokens = normal(num_groups, k, n), normal(num_groups, n, k), normal(_NUM_TOKENS, k)
    rows, wide_rows = past_groups_nan(k), past_groups_nan(n)
    yield "grouped_matmul", matmul, (rows, rhs, sizes)
    yield "grouped_matmul, transposed", transposed, (rows, rhs_transposed, sizes)
    yield "grouped_matmul, gathered", functools.partial(matmul, lhs_index=index), (tokens, rhs, sizes)
    yield "grouped_weight_gradient", gradient, (rows, wide_rows, sizes)
    yield (
        "grouped_weight_gradient, lhs gathered",
        functools.partial(gradient, lhs_index=index),
        (tokens, wide_rows, sizes),
    )
    yield (
        "grouped_weight_gradient, out_grad gathered",
        functools.partial(gradient, out_grad_index=index),
        (wide_rows, tokens, sizes),
    )

    def go_back(h: jax.Array, out_grad: jax.Array, weight: jax.Array, *, implementation: Implementation) -> jax.Array:
        results = activation_gradient(
            h, out_grad, weight, value_and_derivative("swiglu"), implementation=implementation
        )
        return jnp.concatenate([result.astype(jnp.float32).ravel() for result in results if result is not None])

    weight = jnp.asarray(draw.random(_NUM_ROWS).astype(np.float32))
    yield "activation_gradient", go_back, (normal(_NUM_ROWS, 2 * k), normal(_NUM_ROWS, k), weight)

    places = jnp.asarray(draw.integers(-1, _NUM_ROWS + 1, (_NUM_TOKENS, 3)).astype(np.int32))
    weights = jnp.asarray(draw.random(places.shape).astype(np.float32))
    yield "combine", functools.partial(combine, num_rows=sum(_SIZES)), (rows, places, weights)

    def find(x: jax.Array, *, implementation: Implementation) -> jax.Array:
        return jnp.concatenate(top_k(x, 3, implementation=implementation), axis=1)

    yield "top_k", find, (jnp.asarray(draw.standard_normal((_NUM_TOKENS, 40)).astype(np.float32)),)

    for block in BLOCKS:
        yield from _block_sparse_cases(sizes, n, block, normal)


def _block_sparse_cases(sizes: jax.Array, n: int, block: int, normal: Callable[..., jax.Array]) -> Iterator[Case]:
    topology = expert_topology(sizes, _WIDTHS, num_rows=_NUM_ROWS, block=block)
    rows_of_blocks, columns = topology.shape
    values = jnp.where(topology.is_block[:, None, None], normal(topology.max_num_blocks, block, block), jnp.nan)

    def to_sparse(
        lhs: jax.Array, rhs: jax.Array, sizes: jax.Array, *, implementation: Implementation, **transposes: Any
    ) -> jax.Array:
        topology = expert_topology(sizes, _WIDTHS, num_rows=_NUM_ROWS, block=block)
        return sdd(lhs, rhs, topology, implementation=implementation, **transposes).values

    def of_sparse(
        values: jax.Array, dense: jax.Array, sizes: jax.Array, *, implementation: Implementation, kind: str
    ) -> jax.Array:
        matrix = BlockSparseMatrix(values, expert_topology(sizes, _WIDTHS, num_rows=_NUM_ROWS, block=block))
        if kind == "dds":
            return dds(dense, matrix, implementation=implementation)
        return dsd(matrix.T if kind == "dsd, transposed" else matrix, dense, implementation=implementation)

    yield f"sdd, blocks of {block}", to_sparse, (normal(rows_of_blocks, n), normal(n, columns), sizes)
    both = {"transpose_lhs": True, "transpose_rhs": True}
    yield (
        f"sdd, transposed, blocks of {block}",
        functools.partial(to_sparse, **both),
        (normal(n, rows_of_blocks), normal(columns, n), sizes),
    )
    dense_operands = {
        "dsd": normal(columns, n),
        "dsd, transposed": normal(rows_of_blocks, n),
        "dds": normal(n, rows_of_blocks),
    }
    for kind, dense in dense_operands.items():
        yield f"{kind}, blocks of {block}", functools.partial(of_sparse, kind=kind), (values, dense, sizes)


def run_kernels() -> None:
    """Runs every case, and raises an ArithmeticError where a result is wrong."""
    for name, run, operands in cases():
        actual = np.asarray(run(*operands, implementation="mosaic_gpu"), np.float32)
        with jax.default_device(jax.devices("cpu")[0]):
            on_cpu = [np.asarray(operand) for operand in operands]
            expected = np.asarray(run(*map(jnp.asarray, on_cpu), implementation="reference"), np.float32)
        error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
        if not error <= _TOLERANCE:
            raise ArithmeticError(f"{name}: relative error {error:.2g}, more than {_TOLERANCE}")
        print(f"{name}: ran, relative error {error:.1e}", flush=True)


def sanitize(tool: str) -> Record:
    """Runs all cases under one tool; returns its record."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(_ERROR_STATUS)]
    command += [sys.executable, "-m", "benchmarks.sanitize", "--run"]
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
    record: Record = {"tool": tool, "commit": commit()}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return record | {"failure": f"did not end in {_TIMEOUT_SECONDS} seconds"}
    return record | read_report(done.stdout + done.stderr, done.returncode)


def read_report(output: str, status: int) -> Record:
    """Reads which kernels ran, and what the tool says in the end."""
    summaries = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", output, re.MULTILINE)
    report: Record = {
        "kernels": re.findall(r"^(.+): ran, relative error", output, re.MULTILINE),
        "summary": summaries[-1] if summaries else None,
    }
    if status or not summaries:
        lines = [line for line in output.splitlines() if line.strip()]
        report["failure"] = f"exit status {status}: " + " | ".join(lines[-8:])
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns 1 if a tool found something, 2 if it cannot run, and 0 otherwise."""
    parser = make_parser("sanitize", __doc__)
    parser.add_argument("--run", action="store_true", help="run the kernels in this process, without a sanitizer")
    options = parser.parse_args(arguments)
    if options.run:
        run_kernels()
        return 0
    if shutil.which("compute-sanitizer") is None:
        parser.error("there is no compute-sanitizer on the PATH; it comes with the CUDA toolkit")
    with new_process() as process:
        if not process.submit(has_hopper_gpu).result():
            parser.error("the kernels run on Hopper GPUs only, and there is none")
        environment = process.submit(describe_environment).result()
    console = make_console(environment)
    results = open_results(parser, options, METHOD, environment)
    there = {record["tool"] for record in results.records}
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        for record in pool.map(sanitize, [tool for tool in TOOLS if tool not in there]):
            results.replace([*results.records, record])
    for record in results.records:
        console.print(f"{record['tool']}: {record.get('failure') or record['summary']}")
    console.print(f"Written to {results.path}")
    return int(any("failure" in record for record in results.records))


if __name__ == "__main__":
    raise SystemExit(main())
