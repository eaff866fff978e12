"""Measures the Hopper kernels' configurations for given shapes, and writes the best ones to a table.

    python -m pallas_kernels.tune --layer 32768,2048,1024,64,8 --shape 262144,2048,2048,64

For each shape and kernel it takes the candidates that fit into shared memory and lower, times all of them in
rounds, with groups of equal sizes and with sizes that follow Zipf's law, and keeps the one that takes the least time
relative to the configuration of the rule, in the mean of both, if that is at least 1 % less. Several processes lower
and compile, which takes far longer than the timing does, and when all have finished, they take turns on the device.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import math
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels import tuning
from pallas_kernels.device import has_hopper_gpu
from pallas_kernels.grouped_matmul import mosaic_gpu, mosaic_gpu_weight_gradient
from pallas_kernels.timing import Variant, time_in_rounds

# What is won by less may be the measurement's noise; and a layer's matmuls compute fewer schedules if they agree.
_MARGIN = 0.01
_LONGEST_COMPILATION = 1200  # seconds

# Of the processes that tune side by side; a process alone has none.
_all_compiled: Barrier | None = None
_device: contextlib.AbstractContextManager = contextlib.nullcontext()

type Config = mosaic_gpu.Config | mosaic_gpu_weight_gradient.Config

KERNELS = ("grouped_matmul", "grouped_matmul_transposed", "grouped_weight_gradient")
DISTRIBUTIONS = ("balanced", "zipf")


@dataclasses.dataclass(frozen=True)
class Task:
    """A kernel, and the shape to find its configuration for.

    Attributes:
        kernel: one of `KERNELS`.
        m: rows of `lhs`.
        k: columns of `lhs`.
        n: columns of the result.
        num_groups: G.
        dtype: of operands and result.
        lhs_rows: rows of the array that the rows of `lhs` are gathered from; None: nothing is gathered.
        out_grad_rows: the same of the second operand of a weight gradient.
    """

    kernel: str
    m: int
    k: int
    n: int
    num_groups: int
    dtype: str = "bfloat16"
    lhs_rows: int | None = None
    out_grad_rows: int | None = None

    @property
    def problem(self) -> tuning.Problem:
        """What the table says the configuration is for."""
        return tuning.Problem.of(
            self.kernel,
            dtype=self.dtype,
            out_dtype=self.dtype,
            k=self.k,
            n=self.n,
            num_groups=self.num_groups,
            num_rows=self.m,
        )

    @property
    def rule(self) -> Config:
        """The configuration without a table."""
        kernel = mosaic_gpu_weight_gradient if self.kernel == "grouped_weight_gradient" else mosaic_gpu
        return kernel.Config.for_shape(self.m, self.num_groups, self.n)

    @property
    def operand_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of the two floating-point operands."""
        lhs = (self.lhs_rows or self.m, self.k)
        if self.kernel == "grouped_weight_gradient":
            return lhs, (self.out_grad_rows or self.m, self.n)
        transposed = self.kernel == "grouped_matmul_transposed"
        return lhs, (self.num_groups, *((self.n, self.k) if transposed else (self.k, self.n)))

    def candidates(self) -> Iterator[Config]:
        """Yields the configurations to time, the rule's first.

        Each differs from it in one respect, since the respects hardly act on each other: another width of tiles,
        with the deepest ring that fits into shared memory; a ring of one slot less; other bands.
        """
        yield self.rule
        for block_n in self._widths:
            wide = (dataclasses.replace(self.rule, block_n=block_n, num_stages=stages) for stages in (8, 7, 6, 5, 4, 3))
            yield from itertools.islice((c for c in wide if c != self.rule and c.fits(self.dtype)), 1)
        yield from (
            dataclasses.replace(self.rule, band_rows=rows) for rows in (4, 8, 16) if rows != self.rule.band_rows
        )

    @property
    def _widths(self) -> tuple[int, ...]:
        # Two warpgroups share the columns of a weight gradient's tile.
        return (256, 128) if self.kernel == "grouped_weight_gradient" else (256, 128, 64)

    def run(self, config: Config, first: Array, second: Array, group_sizes: Array, index: Array) -> Array:
        """Runs the kernel; `index` [M] says which rows it gathers, if it does."""
        options: dict[str, Any] = {
            "precision": None,
            "accumulator_dtype": jnp.dtype(jnp.float32),
            "out_dtype": jnp.dtype(self.dtype),
            "config": config,
        }
        lhs_index = None if self.lhs_rows is None else index
        if self.kernel == "grouped_weight_gradient":
            indices = lhs_index, None if self.out_grad_rows is None else index
            return mosaic_gpu_weight_gradient.grouped_weight_gradient(first, second, group_sizes, *indices, **options)
        transpose_rhs = self.kernel == "grouped_matmul_transposed"
        return mosaic_gpu.grouped_matmul(
            first, second, group_sizes, lhs_index, None, transpose_rhs=transpose_rhs, **options
        )


def layer_tasks(
    num_tokens: int, features: int, hidden_features: int, num_experts: int, top_k: int, dtype: str = "bfloat16"
) -> list[Task]:
    """Returns the six matmuls of one mixture of gated MLPs, forward and backward, which gather as the layer does.

    Args:
        num_tokens: T.
        features: D.
        hidden_features: F; an expert's gate and up matrices together have 2F columns.
        num_experts: E.
        top_k: K.
        dtype: of the computation.
    """
    rows, d, f, gate_and_up = num_tokens * top_k, features, hidden_features, 2 * hidden_features
    task = functools.partial(Task, m=rows, num_groups=num_experts, dtype=dtype)
    return [
        task("grouped_matmul", k=d, n=gate_and_up, lhs_rows=num_tokens),
        task("grouped_matmul", k=f, n=d),
        task("grouped_matmul_transposed", k=d, n=f, lhs_rows=num_tokens),
        task("grouped_matmul_transposed", k=gate_and_up, n=d),
        task("grouped_weight_gradient", k=d, n=gate_and_up, lhs_rows=num_tokens),
        task("grouped_weight_gradient", k=f, n=d, out_grad_rows=num_tokens),
    ]


def group_sizes(distribution: str, m: int, num_groups: int) -> np.ndarray:
    """Returns sizes that sum to m, all about equal, or in proportion to 1, 1/2, 1/3, ... in a fixed random order."""
    share = np.ones(num_groups) if distribution == "balanced" else 1 / np.arange(1, num_groups + 1)
    ends = np.round(np.cumsum(share) / share.sum() * m).astype(np.int32)
    sizes = np.diff(ends, prepend=np.int32(0))
    return np.random.default_rng(0).permutation(sizes)


def measure(task: Task, configs: Sequence[Config], *, rounds: int) -> dict[Config, dict[str, float]]:
    """Times configurations on this machine's GPU.

    Returns:
        For each configuration that runs, and each distribution of group sizes, the median in milliseconds.
    """
    compiled = {config: program for config in configs if (program := _compile(task, config)) is not None}
    if _all_compiled is not None:
        _all_compiled.wait(_LONGEST_COMPILATION)  # a busy CPU starts kernels late
    with _device:
        keys = jax.random.split(jax.random.key(0))
        operands = [jax.random.normal(key, s, task.dtype) for key, s in zip(keys, task.operand_shapes, strict=True)]
        rows = task.lhs_rows or task.out_grad_rows or task.m
        index = jax.random.permutation(jax.random.key(1), jnp.arange(task.m, dtype=jnp.int32) % rows)
        sizes = {name: jnp.asarray(group_sizes(name, task.m, task.num_groups)) for name in DISTRIBUTIONS}

        def variant(config: Config, distribution: str) -> Variant:
            return Variant(lambda: compiled[config](*operands, sizes[distribution], index), jax.block_until_ready)

        variants = {pair: variant(*pair) for pair in itertools.product(compiled, DISTRIBUTIONS)}
        runs = {pair: variant for pair, variant in variants.items() if _runs(variant)}
        seconds, _ = time_in_rounds(runs, rounds=rounds, seed=0)
    return {
        config: {name: 1e3 * statistics.median(seconds[config, name]) for name in DISTRIBUTIONS}
        for config in compiled
        if all((config, name) in seconds for name in DISTRIBUTIONS)
    }


def _compile(task: Task, config: Config) -> Callable[..., Array] | None:
    operands = [jax.ShapeDtypeStruct(shape, task.dtype) for shape in task.operand_shapes]
    numbers = [jax.ShapeDtypeStruct((length,), jnp.int32) for length in (task.num_groups, task.m)]
    try:
        return jax.jit(lambda *arrays: task.run(config, *arrays)).lower(*operands, *numbers).compile()
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError):
        return None  # what the formula of shared memory does not see


def _runs(variant: Variant) -> bool:
    try:
        variant.wait(variant.run())  # the first call loads the kernel; timed, it would count for many
        return True
    except jax.errors.JaxRuntimeError:
        return False


def tune(
    task: Task, measure: Callable[[Task, Sequence[Config]], dict[Config, dict[str, float]]]
) -> dict[str, Any] | None:
    """Finds the best configuration.

    Args:
        task: the kernel and the shape.
        measure: gives the milliseconds of configurations with each distribution of group sizes.

    Returns:
        An entry for the table, or None where the rule's configuration did not run.
    """
    times = measure(task, list(task.candidates()))
    if task.rule not in times:
        return None

    def relative_time(config: Config) -> float:
        return math.prod(times[config][name] / times[task.rule][name] for name in DISTRIBUTIONS)

    best = min(times, key=relative_time)
    if relative_time(best) > (1 - _MARGIN) ** len(DISTRIBUTIONS):
        best = task.rule
    return {
        "problem": dataclasses.asdict(task.problem),
        "config": dataclasses.asdict(best),
        "num_rows": task.m,
        "ms": times[best],
        "ms_of_rule": times[task.rule],
        "candidates": len(times),
        "jax": jax.__version__,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.tune", description="Measures the Hopper kernels' configurations."
    )
    parser.add_argument(
        "--layer",
        type=_layer,
        action="append",
        default=[],
        metavar="T,D,F,E,K",
        help="the matmuls of a mixture of gated MLPs, forward and backward; may be given several times",
    )
    parser.add_argument(
        "--shape", type=_shape, action="append", default=[], metavar="M,K,N,G", help="may be given several times"
    )
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="all, if left out")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5, help="how often each candidate is timed")
    parser.add_argument("--jobs", type=int, help="processes that lower and compile; by default half of the CPUs")
    parser.add_argument("--out", type=Path, help=f"the table; by default ${tuning.CACHE_VARIABLE} or the user's cache")
    options = parser.parse_args(arguments)
    for name in ("rounds", "jobs"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} is {value}; it must be at least 1")
    dtype = options.dtype
    tasks = [task for t, d, f, e, k in options.layer for task in layer_tasks(t, d, f, e, k, dtype)]
    tasks += [Task(kernel, m, k, n, g, dtype) for m, k, n, g in options.shape for kernel in KERNELS]
    tasks = [task for task in tasks if task.kernel in (options.kernel or KERNELS)]
    if not tasks:
        parser.error("name what to tune: --layer T,D,F,E,K or --shape M,K,N,G")
    # Each process takes as much of the device's memory as it needs, not three quarters from the start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if not has_hopper_gpu():
        print("tuning measures the Hopper kernels, and computations here run on no Hopper GPU.", file=sys.stderr)
        return 2
    path = options.out or tuning.cache_path()
    try:
        entries = tuning.read_entries(path)
        tuning.write_entries(path, entries)  # that it cannot be written is to be known before it is measured
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    jobs = min(options.jobs or max((os.cpu_count() or 1) // 2, 1), len(tasks))
    for task, entry in zip(tasks, _tune_all(tasks, options.rounds, jobs), strict=True):
        if entry is None:
            print(f"{task}: the kernel does not run", file=sys.stderr)
            continue
        entries = [old for old in entries if old["problem"] != entry["problem"]] + [entry]
        tuning.write_entries(path, entries)
        print(f"{task}: {entry['config']}, {entry['ms']} ms, {entry['ms_of_rule']} by the rule")
    print(f"Written to {path}")
    return 0


def _tune_all(tasks: Sequence[Task], rounds: int, jobs: int) -> Iterator[dict[str, Any] | None]:
    if jobs == 1:
        yield from (_tune(task, rounds) for task in tasks)
        return
    processes = multiprocessing.get_context("spawn")  # a fork would share this process's use of the GPU
    for side_by_side in itertools.batched(tasks, jobs):
        shared = processes.Barrier(len(side_by_side)), processes.Lock()
        # A process ends after its task, and so gives the device's memory back.
        with concurrent.futures.ProcessPoolExecutor(
            len(side_by_side), processes, _take_turns, shared, max_tasks_per_child=1
        ) as pool:
            yield from pool.map(_tune, side_by_side, itertools.repeat(rounds))


def _take_turns(all_compiled: Barrier, device: contextlib.AbstractContextManager) -> None:
    global _all_compiled, _device
    _all_compiled, _device = all_compiled, device


def _tune(task: Task, rounds: int) -> dict[str, Any] | None:
    return tune(task, functools.partial(measure, rounds=rounds))


def _numbers(text: str, names: str, *widths: int) -> tuple[int, ...]:
    """Reads as many positive numbers as there are names; those at `widths` must be multiples of 64."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != len(names.split(",")) or min(numbers) < 1 or any(numbers[i] % 64 for i in widths):
        multiples = " and ".join(names.split(",")[i] for i in widths)
        raise argparse.ArgumentTypeError(f"{text!r} is not {names}: positive numbers, {multiples} multiples of 64")
    return numbers


def _layer(text: str) -> tuple[int, ...]:
    return _numbers(text, "T,D,F,E,K", 1, 2)


def _shape(text: str) -> tuple[int, ...]:
    return _numbers(text, "M,K,N,G", 1, 2)


if __name__ == "__main__":
    sys.exit(main())
