"""Measures layers, training steps, links and memory on the GPUs of one host, or predicts steps on more of them.

`python -m benchmarks.scaling` is to take less than eight minutes on two H200 GPUs. Without GPUs it measures small
layers and models on XLA's devices: that the program works, not what GPUs do. With `--simulate` it measures nothing.
"""

import argparse
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool

from rich.console import Console

from benchmarks.record import (
    Results,
    chosen,
    describe_failure,
    make_console,
    make_parser,
    new_process,
    open_results,
)
from benchmarks.scaling import simulate, tables
from benchmarks.scaling.layer import RAGGED
from benchmarks.scaling.step import compare_steps
from benchmarks.scaling.tasks import LIMIT_SECONDS, Task, describe_devices, make_tasks, run
from benchmarks.train_step import SETTINGS

METHOD = """\
One process drives all devices; they are one mesh axis "expert" unless a mesh is named. Each group of tasks has a
process of its own, and a task that takes more than {limit} s is ended. Timings as in benchmarks.layer, {rounds} rounds.
layer: operands as in benchmarks.layer, T tokens on each device, experts split; TFLOP/s are those of each device.
of_one_device: the speed of each device over that of one with all experts and T tokens, timed in the same rounds.
auto: whether "auto" is this exchange. fullest_device: its assignments over the mean. relative_error: against one
device that computes the tokens of all, T at a time; more than 2e-2 is a failure. ragged_all_to_all: rows travel by
jax.lax.ragged_all_to_all to experts computed by jmoe; its buffers just hold what the drawn routing needs.
step: benchmarks.train_step; all devices have the same sequences, so that losses are those of one device, and a relative
difference of 2e-2 in the first three is a failure. of_one_device: tokens per second of each device over those of one.
With the setting "program", whose rate of learning rises from 0, this checks little but the forward. links: bytes_sent
by each device, and the rate, gb_per_s. memory: two scanned steps of as many layers as keep to limit_gib by XLA's plan,
compiled without autotuning, one sequence on each device. Seed {seed}. Asked for:
setting {setting}, steps {steps}, scan_layers {scan_layers}, memory_gib {memory_gib}."""


def restrict(num_devices: int) -> None:
    """Lets the processes that this one starts see the first devices only."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else map(str, range(num_devices))
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(list(names)[:num_devices])
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={num_devices}".strip()


def measure(chosen_tasks: Sequence[Task], results: Results, console: Console) -> None:
    """Runs the tasks whose results are not there yet, and keeps those of each as soon as it has ended."""
    started = time.monotonic()
    process, group = None, None
    for task in chosen_tasks:
        of_task = [record for record in results.records if record["task"] == task.name]
        if of_task and not any("failure" in record for record in of_task):
            console.print(f"{task.name}: in {results.path} already")
            continue
        if process is None or group != task.group:
            if process is not None:
                process.shutdown()
            process, group = new_process(), task.group
        try:
            records = process.submit(run, task).result()
        except BrokenProcessPool:
            records = [{"failure": f"its process died, or took more than {LIMIT_SECONDS} s"}]
            process = None
        except Exception as failure:
            records = [{"failure": describe_failure(failure)}]
        records = [{"task": task.name, "part": task.name.partition("-")[0], **record} for record in records]
        # What failed before is replaced, with all that was measured with it.
        kept = [record for record in results.records if record["task"] != task.name]
        results.replace(compare_steps([*kept, *records]))
        failed = sum("failure" in record for record in records)
        console.print(
            f"{time.monotonic() - started:4.0f} s  {task.name}: {len(records) - failed} done, {failed} failed"
        )
    if process is not None:
        process.shutdown()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns 1 if something failed, and 0 otherwise."""
    parser = make_parser("scaling", __doc__)
    parser.add_argument("--only", help="tasks or patterns such as 'layer-*' or 'step-*', separated by commas")
    parser.add_argument("--num-devices", type=int, help="as many as there are if not given")
    parser.add_argument("--rounds", type=int, default=8, help="of timings")
    parser.add_argument("--steps", type=int, default=10, help="training steps that are timed")
    parser.add_argument("--setting", choices=SETTINGS, default="bf16", help="of training steps, as in train_step")
    parser.add_argument("--memory-gib", type=float, help="what a device has, for memory-*; what JAX says if not given")
    parser.add_argument(
        "--scan-layers",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="whether layers are one scanned body",
    )
    simulate.add_options(parser)
    options = parser.parse_args(arguments)
    for name in ("rounds", "steps", "num_devices"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if options.memory_gib is not None and not 0 < options.memory_gib < math.inf:
        parser.error(f"--memory-gib must be a number above 0, got {options.memory_gib}")
    if options.simulate:
        return simulate.main(parser, options)

    if options.num_devices:
        restrict(options.num_devices)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    with new_process() as process:
        environment = process.submit(describe_devices).result()
    n = environment["num_devices"]
    if n < 2 or n != (options.num_devices or n):
        parser.error(f"--num-devices: there are {n}, and scaling needs {options.num_devices or 2}")
    console = make_console(environment)
    tasks = make_tasks(options, environment["hardware"]["platform"], n)
    names = chosen(parser, "--only", options.only, tasks) if options.only else list(tasks)
    method = METHOD.format(limit=LIMIT_SECONDS, **vars(options))
    results = open_results(parser, options, method, environment)
    measure([tasks[name] for name in names], results, console)
    tables.show(results.records, f"{n} x {environment['hardware']['device']}", console)
    console.print(f"Written to {results.path}")
    # The baseline is not ours to mend.
    return int(any("failure" in record and record.get("exchange") != RAGGED for record in results.records))


if __name__ == "__main__":
    raise SystemExit(main())
