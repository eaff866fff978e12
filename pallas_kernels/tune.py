"""Measures the Hopper kernels' configurations for given shapes, and writes the best ones to a table.

    python -m pallas_kernels.tune --shape 262144,2048,2048,64

For each shape and kernel it takes every candidate that fits into shared memory and lowers, times all of them in
rounds, with groups of equal sizes and with sizes that follow Zipf's law, and keeps the one that takes the least time
relative to the configuration of the rule, in the mean of both.
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
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
    """

    kernel: str
    m: int
    k: int
    n: int
    num_groups: int
    dtype: str = "bfloat16"

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
        if self.kernel == "grouped_weight_gradient":
            return (self.m, self.k), (self.m, self.n)
        transposed = self.kernel == "grouped_matmul_transposed"
        return (self.m, self.k), (self.num_groups, *((self.n, self.k) if transposed else (self.k, self.n)))

    def candidates(self) -> Iterator[Config]:
        """Yields the configurations that fit into shared memory, the rule's first."""
        yield self.rule
        for block_n, num_stages, band_rows in itertools.product(self._widths, (3, 4, 5, 6, 8), (4, 8, 16)):
            config = dataclasses.replace(self.rule, block_n=block_n, num_stages=num_stages, band_rows=band_rows)
            if config != self.rule and config.fits(self.dtype):
                yield config

    @property
    def _widths(self) -> tuple[int, ...]:
        # Two warpgroups share the columns of a weight gradient's tile.
        return (256, 128) if self.kernel == "grouped_weight_gradient" else (256, 128, 64)

    def run(self, config: Config, first: Array, second: Array, group_sizes: Array) -> Array:
        """Runs the kernel."""
        options: dict[str, Any] = {
            "precision": None,
            "accumulator_dtype": jnp.dtype(jnp.float32),
            "out_dtype": jnp.dtype(self.dtype),
            "config": config,
        }
        if self.kernel == "grouped_weight_gradient":
            return mosaic_gpu_weight_gradient.grouped_weight_gradient(first, second, group_sizes, None, None, **options)
        transpose_rhs = self.kernel == "grouped_matmul_transposed"
        return mosaic_gpu.grouped_matmul(first, second, group_sizes, None, None, transpose_rhs=transpose_rhs, **options)


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
    keys = jax.random.split(jax.random.key(0))
    operands = [jax.random.normal(key, s, task.dtype) for key, s in zip(keys, task.operand_shapes, strict=True)]
    sizes = {name: jnp.asarray(group_sizes(name, task.m, task.num_groups)) for name in DISTRIBUTIONS}
    lowered = dict(_lower(task, configs, (*operands, sizes["balanced"])))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = zip(lowered, pool.map(_compile, lowered.values()), strict=True)
        compiled = {config: program for config, program in programs if program is not None}

    def variant(config: Config, distribution: str) -> Variant:
        return Variant(lambda: compiled[config](*operands, sizes[distribution]), jax.block_until_ready)

    variants = {pair: variant(*pair) for pair in itertools.product(compiled, DISTRIBUTIONS)}
    seconds, _ = time_in_rounds(variants, rounds=rounds, seed=0)
    return {
        config: {name: 1e3 * statistics.median(seconds[config, name]) for name in DISTRIBUTIONS}
        for config in compiled
        if all((config, name) in seconds for name in DISTRIBUTIONS)
    }


def _lower(task: Task, configs: Sequence[Config], arrays: tuple[Array, ...]) -> Iterator[tuple[Config, Any]]:
    for config in configs:
        try:
            yield config, jax.jit(lambda *arrays, config=config: task.run(config, *arrays)).lower(*arrays)
        except (ValueError, NotImplementedError):
            continue  # what the formula of shared memory does not see


def _compile(program: Any) -> Any:
    try:
        return program.compile()
    except jax.errors.JaxRuntimeError:
        return None  # what lowering does not see


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
        "--shape", type=_shape, action="append", required=True, metavar="M,K,N,G", help="may be given several times"
    )
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="all, if left out")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5, help="how often each candidate is timed")
    parser.add_argument("--out", type=Path, help=f"the table; by default ${tuning.CACHE_VARIABLE} or the user's cache")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; it must be at least 1")
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
    for (m, k, n, num_groups), kernel in itertools.product(options.shape, options.kernel or KERNELS):
        task = Task(kernel, m, k, n, num_groups, options.dtype)
        entry = tune(task, lambda task, configs: measure(task, configs, rounds=options.rounds))
        if entry is None:
            print(f"{task}: the kernel does not run", file=sys.stderr)
            continue
        entries = [old for old in entries if old["problem"] != entry["problem"]] + [entry]
        tuning.write_entries(path, entries)
        print(f"{task}: {entry['config']}, {entry['ms']} ms, {entry['ms_of_rule']} by the rule")
    print(f"Written to {path}")
    return 0


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) != 4 or min(shape) < 1 or any(width % 64 for width in shape[1:3]):
        raise argparse.ArgumentTypeError(f"{text!r} is not M,K,N,G: four positive numbers, K and N multiples of 64")
    return shape


if __name__ == "__main__":
    sys.exit(main())
