"""What `python -m benchmarks.scaling` measures, in the order of importance."""

import argparse
import dataclasses
import functools
import os
import signal
from collections.abc import Callable
from typing import NamedTuple

import jax

from benchmarks.record import Record, describe_environment
from benchmarks.scaling.layer import measure_layer
from benchmarks.scaling.links import measure_links
from benchmarks.scaling.memory import measure_memory
from benchmarks.scaling.step import measure_step, step_meshes
from benchmarks.train_step import Workload

LIMIT_SECONDS = 240

_SHAPES = {
    True: {"preset": "olmoe_1b_7b", "num_layers": 4, "batch_size": 4, "sequence_length": 4096},
    False: {"preset": "tiny", "num_layers": 1, "batch_size": 1, "sequence_length": 64},
}
_LAYERS = {True: ("olmoe", "qwen3"), False: ("tiny",)}


class Task(NamedTuple):
    """Something to measure.

    Attributes:
        name: In the records, and on the command line.
        group: Tasks of one group share a process, and what it has compiled.
        measure: Returns the records.
    """

    name: str
    group: str
    measure: Callable[[], list[Record]]


def describe_devices() -> Record:
    """Describes the devices, the software, and the settings of XLA and NCCL."""
    settings = {name: value for name, value in sorted(os.environ.items()) if name.startswith(("XLA_", "NCCL_"))}
    return describe_environment() | {"num_devices": jax.device_count(), "settings": settings}


def make_tasks(options: argparse.Namespace, platform: str, num_devices: int) -> dict[str, Task]:
    """Lists what can be measured on JAX's platform, "gpu" or another, by name."""
    on_gpu, timing = platform == "gpu", {"rounds": options.rounds, "seed": options.seed}
    shape = _SHAPES[on_gpu]
    tasks = [
        Task(f"layer-{name}-{routing}", f"layer-{name}", functools.partial(measure_layer, name, routing, **timing))
        for name in _LAYERS[on_gpu]
        for routing in ("random", "zipf")
    ]

    def add(name: str, measure: Callable[..., Record], *arguments: object, **more: object) -> None:
        tasks.append(Task(name, name, functools.partial(_as_list, measure, *arguments, **more)))

    def add_step(name: str) -> None:
        asked = shape | {"scan_layers": options.scan_layers}
        timing = {"steps": options.steps, "seed": options.seed}
        add(f"step-{name}", measure_step, options.setting, meshes[name], asked, **timing)

    meshes = step_meshes(num_devices)
    for name in ("one", "expert", "data", "data-expert"):
        if name in meshes:
            add_step(name)
    tasks.append(Task("links", "links", functools.partial(measure_links, **timing)))
    deep = Workload(**{**shape, "batch_size": 1})
    for name in ("one", "expert"):
        workload = dataclasses.replace(deep, mesh=meshes[name])
        add(f"memory-{name}", measure_memory, workload, "program", limit_gib=options.memory_gib)
    add_step("fsdp")
    return {task.name: task for task in tasks}


def run(task: Task) -> list[Record]:
    """Measures, in a process that dies if it takes too long: nothing else ends a collective that waits for ever."""
    signal.alarm(LIMIT_SECONDS)
    try:
        return task.measure()
    finally:
        signal.alarm(0)


def _as_list(measure: Callable[..., Record], *arguments: object, **more: object) -> list[Record]:
    return [measure(*arguments, **more)]
