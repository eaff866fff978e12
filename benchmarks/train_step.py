"""Measures training steps of a published model cut to a few layers: forward, backward, AdamW, on random tokens.

`python -m benchmarks.train_step` takes about three minutes on one H100. Without a GPU it measures the demo's
model on XLA: that the program works, not what a GPU does. `benchmarks.scaling` measures the same on several GPUs.
"""

import argparse
import dataclasses
import itertools
import math
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import get_args

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

from benchmarks.record import (
    Record,
    chosen,
    commit,
    custom_calls,
    describe_environment,
    describe_failure,
    make_console,
    make_parser,
    new_process,
    open_results,
)
from jmoe.models import PRESETS, TransformerConfig
from jmoe.models.attention import attention_implementation
from jmoe.models.config import DType, Remat
from pallas_kernels.device import has_hopper_gpu
from train.config import OptimizerConfig
from train.mesh import Placement, batch_axes, parse_mesh, shardings_of
from train.optimizer import decayed_parameters, make_optimizer, make_schedule
from train.step import DeviceBatch, Metrics, TrainState, graph_of, init_state, make_train_step

METHOD = """\
One jitted step with donated state, train.step.make_train_step: loss with router losses, gradients, their norm,
AdamW. Random tokens, made on the device, the same in each step and on each device of a mesh; each sequence is one
document. Each setting runs in a process of its own. seconds: medians and extremes of {steps} steps after {warm_up}
untimed ones, each from the end of the step before to its own. A step is started while the one before runs, as the
training program does.
bf16: parameters and moments in bfloat16, no clipping. program: the training program's precision and optimizer, so
float32 master weights and moments, bfloat16 compute (float32 on a CPU), clipping by the global norm.
peak_gib: the most memory that arrays and XLA's buffers took at a time in the process, initialisation and
compilation included; peak_gib_before_steps: before the first step. planned_gib: what XLA plans for the step,
state included. model_tflops: TransformerConfig.flops_per_token times tokens_per_second. Seed {seed}."""

_WARM_UP_STEPS = 3
_RUN_STEPS = 10_000  # of the run whose learning-rate schedule the steps start


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What a step works on.

    Attributes:
        preset: A key of `jmoe.models.PRESETS`.
        num_layers: Layers that the model is cut to.
        batch_size: Sequences of each device.
        sequence_length: Tokens of each.
        remat: `TransformerConfig.remat`.
        scan_layers: `TransformerConfig.scan_layers`.
        mesh: As in `train.config.TrainConfig`; one device if empty.
    """

    preset: str
    num_layers: int
    batch_size: int
    sequence_length: int
    remat: Remat = "none"
    scan_layers: bool = True
    mesh: str = ""

    @property
    def num_batches(self) -> int:
        """The devices that sequences are divided over: each gets `batch_size`, and the same ones."""
        sizes = parse_mesh(self.mesh)
        return math.prod(sizes[axis] for axis in batch_axes(sizes))

    @property
    def num_tokens(self) -> int:
        """Tokens of a step, on all devices."""
        return self.num_batches * self.batch_size * self.sequence_length

    def model(self, *, dtype: DType, param_dtype: DType) -> TransformerConfig:
        """The model, with its experts on the kernels wherever these can run."""
        return dataclasses.replace(
            PRESETS[self.preset],
            num_layers=self.num_layers,
            dtype=dtype,
            param_dtype=param_dtype,
            remat=self.remat,
            scan_layers=self.scan_layers,
            # Named, so that it cannot fall back to another.
            moe_implementation="mosaic_gpu" if has_hopper_gpu() else "xla",
        )

    def batch(self, model: TransformerConfig, seed: int) -> DeviceBatch:
        """Random tokens, and the next of each as its target.

        Each device has the same sequences, so that losses and gradients are those of one device.
        """
        shape = self.batch_size, self.sequence_length + 1
        tokens = jax.random.randint(jax.random.key(seed), shape, 0, model.vocab_size)
        tokens = jnp.tile(tokens, (self.num_batches, 1))
        mask = jnp.ones((len(tokens), self.sequence_length), bool)
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask}


_ON_GPU = Workload(preset="olmoe_1b_7b", num_layers=4, batch_size=4, sequence_length=4096)
_ELSEWHERE = Workload(preset="tiny", num_layers=2, batch_size=2, sequence_length=128)


def bf16_setting(
    workload: Workload,
) -> tuple[TransformerConfig, optax.GradientTransformation, optax.Schedule]:
    """Parameters, moments and computation in bfloat16, AdamW at a constant rate."""
    config = OptimizerConfig()
    optimizer = optax.adamw(
        config.learning_rate,
        config.beta1,
        config.beta2,
        config.epsilon,
        weight_decay=config.weight_decay,
        mask=decayed_parameters,
    )
    model = workload.model(dtype="bfloat16", param_dtype="bfloat16")
    return model, optimizer, optax.constant_schedule(config.learning_rate)


def program_setting(
    workload: Workload,
) -> tuple[TransformerConfig, optax.GradientTransformation, optax.Schedule]:
    """What the training program does if nothing else is asked for."""
    config = OptimizerConfig()
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    model = workload.model(dtype=dtype, param_dtype="float32")
    return model, make_optimizer(config, _RUN_STEPS), make_schedule(config, _RUN_STEPS)


SETTINGS = {"bf16": bf16_setting, "program": program_setting}


def measure(setting: str, asked: Record, *, steps: int, seed: int) -> Record:
    """Runs some steps on this process's first device or, with a mesh, on all of them, and returns their record.

    Args:
        setting: A key of `SETTINGS`.
        asked: Fields of the `Workload` that are not the default.
        steps: How many are timed.
        seed: Of the parameters and tokens.
    """
    workload = dataclasses.replace(_ON_GPU if jax.default_backend() == "gpu" else _ELSEWHERE, **asked)
    record: Record = {"setting": setting, **dataclasses.asdict(workload), "commit": commit()}
    try:
        model, optimizer, schedule = SETTINGS[setting](workload)
        record |= {
            "moe_implementation": model.moe_implementation,
            "attention_implementation": attention_implementation(
                model.attention_implementation, model.dtype, model.head_dim
            ),
            "dtype": model.dtype,
            "param_dtype": model.param_dtype,
        }
        placement = Placement(workload.mesh)
        with placement.active():
            shapes = placement.shapes(lambda: init_state(model, optimizer, seed))
            state = jax.jit(lambda: init_state(model, optimizer, seed), out_shardings=shardings_of(shapes))()
            record["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(state.params))
            batch = jax.jit(lambda: workload.batch(model, seed), out_shardings=placement.batch_sharding)()

            started = time.perf_counter()
            step = make_train_step(graph_of(model), optimizer, schedule, shardings=shardings_of(shapes))
            step = step.lower(state, batch).compile()
            record["compile_seconds"] = time.perf_counter() - started
            record |= {"custom_calls": custom_calls(step), "planned_gib": planned_gib(step)}
            record["peak_gib_before_steps"] = peak_gib()
            record |= _time_steps(step, state, batch, model, steps)
        record["peak_gib"] = peak_gib()
        record["tokens_per_second"] = workload.num_tokens / record["seconds_median"]
        flops = model.flops_per_token(workload.sequence_length) * record["tokens_per_second"]
        record["model_tflops"] = flops / 1e12
    except Exception as failure:
        record["failure"] = describe_failure(failure)
    return record


def _time_steps(
    step: jax.stages.Compiled, state: TrainState, batch: DeviceBatch, model: TransformerConfig, steps: int
) -> Record:
    ends, losses = [], []

    def end(metrics: Metrics) -> None:
        losses.append(float(metrics["cross_entropy"]))
        ends.append(time.perf_counter())

    state, metrics = step(state, batch)
    for _ in range(_WARM_UP_STEPS + steps - 1):
        before = metrics
        state, metrics = step(state, batch)
        end(before)
    end(metrics)
    seconds = [end - start for start, end in itertools.pairwise(ends)]
    # A model that has learned nothing is about as good as chance, or it is broken, and so are its figures.
    chance = math.log(model.vocab_size)
    if not abs(losses[0] - chance) < 1 or not math.isfinite(losses[-1]):
        raise ArithmeticError(
            f"the cross entropy was {losses[0]:.3f} at the first step, where chance is {chance:.3f}, and "
            f"{losses[-1]:.3f} at the last"
        )
    timed = seconds[_WARM_UP_STEPS - 1 :]
    return {
        "cross_entropies": losses[:3],
        "cross_entropy_first": losses[0],
        "cross_entropy_last": losses[-1],
        "cross_entropy_of_chance": chance,
        "seconds_median": statistics.median(timed),
        "seconds_min": min(timed),
        "seconds_max": max(timed),
    }


def planned_gib(step: jax.stages.Compiled) -> float | None:
    """What XLA plans for a step on each device, state and batch included."""
    plan = step.memory_analysis()
    if plan is None:
        return None
    arguments_and_results = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return (arguments_and_results + plan.temp_size_in_bytes) / 2**30


def peak_gib() -> float | None:
    """The most that the process has had on one of its devices."""
    peaks = [stats["peak_bytes_in_use"] for device in jax.local_devices() if (stats := device.memory_stats())]
    return max(peaks) / 2**30 if peaks else None


def show(records: Sequence[Record], title: str, console: Console) -> None:
    """Prints a table of the records."""
    table = Table(title=title, title_justify="left", box=None)
    columns = (
        "setting",
        "mesh",
        "remat",
        "layers",
        "experts on",
        "parameters",
        "tokens/s",
        "ms",
        "TFLOP/s",
        "peak GiB",
        "compile s",
    )
    for name in columns:
        table.add_column(name, justify="left" if name in columns[:5] else "right")
    for record in records:
        # A file that is continued may have records from before the choice, when layers were always scanned.
        layers = "scanned" if record.get("scan_layers", True) else "unscanned"
        mesh = record.get("mesh") or "one device"
        if "failure" in record:
            table.add_row(record["setting"], mesh, record["remat"], layers, record["failure"][:100])
            continue
        peak = record["peak_gib"]
        table.add_row(
            record["setting"],
            mesh,
            record["remat"],
            layers,
            record["moe_implementation"],
            f"{record['parameters']:,}",
            f"{record['tokens_per_second']:,.0f}",
            f"{1e3 * record['seconds_median']:.1f}",
            f"{record['model_tflops']:.4g}",
            "" if peak is None else f"{peak:.1f}",
            f"{record['compile_seconds']:.1f}",
        )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns 1 if a setting failed, and 0 otherwise."""
    parser = make_parser("train_step", __doc__)
    parser.add_argument("--only", help=f"settings, separated by commas: {', '.join(SETTINGS)}")
    parser.add_argument("--preset", choices=PRESETS, help="olmoe_1b_7b on a GPU, tiny elsewhere")
    parser.add_argument("--num-layers", type=int, help="4 on a GPU, 2 elsewhere")
    parser.add_argument("--batch-size", type=int, help="of each device: 4 on a GPU, 2 elsewhere")
    parser.add_argument("--sequence-length", type=int, help="4096 on a GPU, 128 elsewhere")
    parser.add_argument(
        "--mesh", default="", help="axes and sizes of all devices, as for jmoe-train; one device if not given"
    )
    parser.add_argument("--remat", choices=get_args(Remat), default="none", help="what the backward pass recomputes")
    parser.add_argument(
        "--scan-layers", action=argparse.BooleanOptionalAction, default=True, help="whether layers are one scanned body"
    )
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    options = parser.parse_args(arguments)

    settings = chosen(parser, "--only", options.only, SETTINGS) if options.only else list(SETTINGS)
    try:
        parse_mesh(options.mesh)
    except ValueError as error:
        parser.error(f"--mesh: {error}")
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    fields = [field.name for field in dataclasses.fields(Workload)]
    asked = {name: value for name in fields if (value := getattr(options, name)) is not None}

    # This process leaves the device alone: the one that measures may have nearly all of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    process = new_process()
    environment = process.submit(describe_environment).result()
    console = make_console(environment)
    method = METHOD.format(steps=options.steps, warm_up=_WARM_UP_STEPS, seed=options.seed)
    results = open_results(parser, options, method, environment)
    for setting in settings:
        wanted = {"setting": setting, **asked}
        # Records from before there were meshes are of one device.
        there = [record for record in results.records if wanted.items() <= ({"mesh": ""} | record).items()]
        if any("failure" not in record for record in there):
            console.print(f"{setting}: in {results.path} already")
            continue
        try:
            with process:
                task = process.submit(measure, setting, asked, steps=options.steps, seed=options.seed)
                record = task.result()
        except BrokenProcessPool:
            record = wanted | {"failure": "its process died"}
        process = new_process()
        results.replace([*(record for record in results.records if record not in there), record])
        console.print(f"{setting}: {record.get('failure', 'done')}")
    show(results.records, environment["hardware"]["device"], console)
    console.print(f"Written to {results.path}")
    return int(any("failure" in record for record in results.records))


if __name__ == "__main__":
    raise SystemExit(main())
