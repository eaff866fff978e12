"""Records what MoE layers keep between forward and backward, and what XLA plans for both; it runs neither.

`python -m benchmarks.memory` takes about a minute on one H100. Without a GPU it compiles small layers for XLA:
that the program works, not what a GPU does.
"""

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from rich.console import Console
from rich.table import Table

from benchmarks.jax_layers import CompiledLayer, jmoe_layer
from benchmarks.layers import CONFIGURATIONS, default_names, describe
from benchmarks.record import (
    Record,
    chosen,
    describe_environment,
    describe_failure,
    make_console,
    make_parser,
    new_process,
    open_results,
)

METHOD = """\
x, weights and the gradient of y in bfloat16, float32 logits; route_top_k and moe_mlp.
kept_mib: bytes between forward and backward (the leaves of jax.vjp's pullback) beside x, the parameters and the
logits. peak_mib: what XLA plans for forward and backward in one jit, beside operands and results
(temp_size_in_bytes); output_mib: for the results, which are y and the gradients of x, both weights and the logits."""


def measure(name: str) -> Record:
    """Compiles a configuration in this process, and returns its record."""
    configuration = CONFIGURATIONS[name]
    record = describe(configuration, "jmoe")
    try:
        with ThreadPoolExecutor(2) as pool:
            return record | CompiledLayer(configuration, jmoe_layer(configuration), pool, timed=False).memory()
    except Exception as failure:
        return record | {"failure": describe_failure(failure)}


def show(records: Sequence[Record], title: str, console: Console) -> None:
    """Prints a table of the records."""
    table = Table(title=title, title_justify="left", box=None)
    for name in ("", "kept", "peak", "results"):
        table.add_column(name, justify="right" if name else "left")
    for record in records:
        figures = [record.get(name) for name in ("kept_mib", "peak_mib", "output_mib")]
        table.add_row(record["configuration"], *("-" if figure is None else f"{figure:,.1f}" for figure in figures))
    console.print(table)
    for record in records:
        if "failure" in record:
            console.print(f"{record['configuration']}: {record['failure']}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns 1 if a layer did not compile, and 0 otherwise."""
    parser = make_parser("memory", __doc__)
    parser.add_argument("--only", help=f"names or patterns, separated by commas: {', '.join(CONFIGURATIONS)}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile at a time")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    names = chosen(parser, "--only", options.only, CONFIGURATIONS) if options.only else None
    with new_process() as process:
        environment = process.submit(describe_environment).result()
    console = make_console(environment)
    results = open_results(parser, options, METHOD, environment)
    there = {record["configuration"] for record in results.records}
    missing = [name for name in names or default_names(environment["hardware"]["platform"]) if name not in there]
    for batch in itertools.batched(missing, options.jobs):
        # Compilation is Python for the most part, which threads would not do any faster.
        processes = [new_process() for _ in batch]
        tasks = [process.submit(measure, name) for process, name in zip(processes, batch, strict=True)]
        for process, name, task in zip(processes, batch, tasks, strict=True):
            try:
                record = task.result()
            except BrokenProcessPool:
                record = describe(CONFIGURATIONS[name], "jmoe") | {"failure": "its process died"}
            process.shutdown()
            results.replace([*results.records, record])
    show(results.records, f"{environment['hardware']['device']}, MiB", console)
    console.print(f"Written to {results.path}")
    return int(any("failure" in record for record in results.records))


if __name__ == "__main__":
    raise SystemExit(main())
