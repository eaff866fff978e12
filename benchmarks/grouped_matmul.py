"""Measures grouped matmuls beside cuBLAS, PyTorch's grouped_mm and `jax.lax.ragged_dot`, in one run.

`python -m benchmarks.grouped_matmul` takes about three minutes on one H100. Without a GPU it measures a small
problem on XLA: that the program works, not what a GPU does.
"""

import gc
import os
import time
import types
from collections.abc import Sequence

# PyTorch needs room on the same device.
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
from rich.console import Console
from rich.table import Table

from benchmarks.jax_matmuls import JaxMatmuls
from benchmarks.matmuls import TOLERANCE, Candidate, Problem
from benchmarks.record import (
    Record,
    Results,
    commit,
    describe_environment,
    describe_failure,
    make_console,
    make_parser,
    open_results,
)
from benchmarks.timing import Variant, summarize, time_in_rounds
from benchmarks.torch_matmuls import TorchMatmuls, load_torch

PROBLEMS = {
    problem.name: problem
    for problem in (
        # Up-projections of published layers: tokens times experts per token, D, width of the projection, E.
        Problem("olmoe", 262_144, 2048, 2048, 64),
        Problem("qwen3", 262_144, 2048, 1536, 128),
        Problem("mixtral", 16_384, 4096, 28_672, 8),
        Problem("7B_n256", 196_608, 1536, 512, 128),
        Problem("small", 4096, 256, 512, 8),
        Problem("tiny", 256, 64, 128, 4),
    )
}
_ON_GPU, _ELSEWHERE = ("olmoe", "qwen3", "mixtral", "7B_n256"), ("small",)

CUBLAS = ("jax_dense", "jax_batched", "torch_dense", "torch_batched")
"""The implementations that, on an NVIDIA GPU, are cuBLAS."""

METHOD = """\
bfloat16 operands and results, standard normal values, made on the device; group sizes drawn from a uniform
multinomial.
forward: [M, K] @ [G, K, N] by groups. transposed: [M, N] @ [G, K, N]^T by groups (transpose_rhs=True), the
gradient of the left operand. weight_gradient: [M, K]^T @ [M, N] by groups. Each takes 2 M K N operations.
dense: one matmul of as many operations. batched: G equal groups. On NVIDIA GPUs both are cuBLAS (XLA's own Triton
matmuls are off for them); on others what the framework has.
relative_error: of a sample of rows or groups, against float32 products, before anything is timed.
All is compiled and warmed up first. Then {rounds} rounds, in each of which every implementation of every
operation has one turn, in random order: 30 ms of rest, one untimed call, and as many calls as fill about 15 ms,
timed together. jax_ragged_dot has rounds of its own, after all others, and the share of the memory that JAX takes
by default. ms_median, ms_min and ms_max are of one
call, over the rounds; spread is (ms_max - ms_min) / ms_median. ratio: the least ms_median of dense and batched of
the same operation, through JAX or PyTorch, divided by this ms_median. Seed {seed}."""


def measure(candidates: Sequence[Candidate], problem: Problem, *, rounds: int, seed: int) -> list[Record]:
    """Checks, then times the candidates; returns a record for each, with its timings or what failed."""
    records: dict[tuple[str, str], Record] = {}
    variants: dict[tuple[str, str], Variant] = {}
    for candidate in candidates:
        key = candidate.operation, candidate.implementation
        shape = {name: getattr(problem, name) for name in "MKNG"}
        records[key] = {"configuration": problem.name, **shape, "operation": key[0], "implementation": key[1]}
        records[key]["commit"] = commit()
        try:
            run, facts = candidate.prepare()
            records[key] |= facts
            error = candidate.relative_error(run())
            if not error <= TOLERANCE:  # also where it is NaN
                raise ArithmeticError(f"relative error {error:.2g}, more than {TOLERANCE:.2g}")
        except Exception as failure:
            records[key]["failure"] = describe_failure(failure)
        else:
            records[key]["relative_error"] = error
            variants[key] = Variant(run, candidate.wait)
    seconds, failures = time_in_rounds(variants, rounds=rounds, seed=seed)
    for key, timings in seconds.items():
        records[key] |= summarize(timings, problem.flops)
    for key, failure in failures.items():
        records[key]["failure"] = failure
    return list(records.values())


def with_ratios(records: Sequence[Record]) -> list[Record]:
    """Adds to each timed record the time of the fastest cuBLAS of its operation, divided by its own."""
    fastest: dict[tuple[str, str], float] = {}
    for record in records:
        if record["implementation"] in CUBLAS and "ms_median" in record:
            key = record["configuration"], record["operation"]
            fastest[key] = min(fastest.get(key, float("inf")), record["ms_median"])
    return [
        record | {"ratio": fastest[key] / record["ms_median"]}
        if "ms_median" in record and (key := (record["configuration"], record["operation"])) in fastest
        else record
        for record in records
    ]


class Run:
    """Measures problems, and keeps what it finds.

    Args:
        results: Where; what is there is not measured again.
        console: Where to say how it goes.
        rounds: Turns of each implementation.
        seed: Of operands, group sizes and the order of turns.
    """

    def __init__(self, results: Results, console: Console, *, rounds: int, seed: int):
        self._results, self._console, self._rounds, self._seed = results, console, rounds, seed
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the run started."""
        return time.monotonic() - self._started

    def measure_all_but_ragged_dot(self, problem: Problem, torch: types.ModuleType | None) -> None:
        """Measures this project's kernels, dense and batched products, and PyTorch's grouped_mm if it is there."""
        if self._has(problem, "pallas_kernels"):
            return
        candidates = JaxMatmuls(problem, self._seed).candidates()
        torch_matmuls = TorchMatmuls(torch, problem, self._seed) if torch else None
        if torch_matmuls:
            candidates += torch_matmuls.candidates()
        self._measure(candidates, problem)
        del candidates
        gc.collect()
        if torch_matmuls:
            torch_matmuls.free()

    def measure_ragged_dot(self, problem: Problem) -> None:
        """Measures `jax.lax.ragged_dot`."""
        if not self._has(problem, "jax_ragged_dot"):
            self._measure(JaxMatmuls(problem, self._seed).ragged_dot_candidates(), problem)
            gc.collect()

    def _has(self, problem: Problem, implementation: str) -> bool:
        wanted = {"configuration": problem.name, "implementation": implementation}
        found = any(wanted.items() <= record.items() for record in self._results.records)
        if found:
            self._console.print(f"{problem.name}: {implementation} is in {self._results.path} already")
        return found

    def _measure(self, candidates: Sequence[Candidate], problem: Problem) -> None:
        records = measure(candidates, problem, rounds=self._rounds, seed=self._seed)
        self._results.replace(with_ratios([*self._results.records, *records]))
        failed = sum("failure" in record for record in records)
        self._console.print(f"{self.seconds:4.0f} s  {problem.name}: {len(records) - failed} timed, {failed} not")


def show(records: Sequence[Record], title: str, console: Console, *, problems: Sequence[str] = tuple(PROBLEMS)) -> None:
    """Prints a table of the records, in the order of the problems."""
    table = Table(title=title, title_justify="left", box=None)
    for name in ("", "operation", "implementation", "ms", "spread", "TFLOP/s", "ratio", "error"):
        table.add_column(name, justify="left" if name in ("", "operation", "implementation") else "right")
    last = None
    for record in sorted(records, key=lambda record: (problems.index(record["configuration"]), record["operation"])):
        group = record["configuration"], record["operation"]
        if last not in (None, group):
            table.add_row()
        names = (*(group if group != last else ("", "")), record["implementation"])
        last = group
        if "failure" in record:
            table.add_row(*names, "-")
            continue
        table.add_row(
            *names,
            f"{record['ms_median']:.3f}",
            f"{record['spread']:.1%}",
            f"{record['tflops']:.4g}",
            f"{record['ratio']:.3f}" if "ratio" in record else "",
            f"{record['relative_error']:.1e}",
        )
    console.print(table)
    for record in records:
        if "failure" in record:
            names = record["configuration"], record["operation"], record["implementation"]
            console.print(f"{' '.join(names)}: {record['failure']}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns 1 if a kernel of this project failed, and 0 otherwise."""
    parser = make_parser("grouped_matmul", __doc__)
    parser.add_argument("--only", help=f"problems, separated by commas: {', '.join(PROBLEMS)}")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--time-limit", type=float, default=170, help="seconds until jax.lax.ragged_dot is skipped")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    platform = jax.devices()[0].platform
    names = options.only.split(",") if options.only else _ON_GPU if platform == "gpu" else _ELSEWHERE
    if unknown := [name for name in names if name not in PROBLEMS]:
        parser.error(f"--only: there is no problem {unknown[0]!r}; there are {', '.join(PROBLEMS)}")

    try:
        torch, without_torch = load_torch(platform), None
    except Exception as failure:
        torch, without_torch = None, describe_failure(failure)
    environment = describe_environment(torch)
    console = make_console(environment)
    if without_torch:
        console.print(f"Without PyTorch: {without_torch}")
    method = METHOD.format(rounds=options.rounds, seed=options.seed)
    results = open_results(parser, options, method, environment)
    run = Run(results, console, rounds=options.rounds, seed=options.seed)
    for name in names:
        run.measure_all_but_ragged_dot(PROBLEMS[name], torch)
    for name in names:
        # Last, for it may take long to find that memory does not suffice.
        if run.seconds < options.time_limit:
            run.measure_ragged_dot(PROBLEMS[name])
        else:
            console.print(f"{name}: no jax.lax.ragged_dot, after more than {options.time_limit:.0f} s")
    show(results.records, f"{environment['hardware']['device']}, bfloat16", console)
    console.print(f"Written to {results.path}")
    ours = [record for record in results.records if record["implementation"] == "pallas_kernels"]
    return int(any("failure" in record for record in ours))


if __name__ == "__main__":
    raise SystemExit(main())
