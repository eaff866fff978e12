"""Trains a small model dropless and with expert capacities: time of a step, dropped share, loss after equal steps.

`python -m benchmarks.capacity` trains the demo's model on the source of Python's standard library, once for each
setting: a few minutes on two CPU cores. On a CPU the times say nothing of a GPU's.
"""

import argparse
import contextlib
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.record import (
    Record,
    chosen,
    commit,
    describe_environment,
    describe_failure,
    make_console,
    make_parser,
    new_process,
    open_results,
)
from jmoe.models import PRESETS
from pallas_kernels.device import has_hopper_gpu
from train.config import EvaluationConfig, TrainConfig, preset
from train.evaluate import evaluate, make_eval_step
from train.inputs import corpus_of, tokenizer_of, train_loader, validation_loader
from train.mesh import Placement
from train.optimizer import make_optimizer, make_schedule
from train.step import graph_of, init_state, make_train_step

METHOD = """\
The training program's model, optimizer (warmed up for a tenth of the steps at most), text and batches; the same
initial parameters and batches in each setting, which runs in a process of its own. An expert takes at most
ceil(capacity_factor * T * K / E) assignments of a batch: the first choices of all tokens first, in the order of the
tokens; dropless takes all. Both run the same grouped matmuls, in which a dropped assignment has no row; to find what
is dropped takes one more sort. seconds: median and extremes of the steps after the first {warm_up}, waiting for each.
dropped_fraction: mean over all steps; dropped_fraction_last, cross_entropy_last: over the last tenth of them.
validation: nats per target of held-out text, {batches} batches, by the model as trained; validation_dropless: by the
same parameters without a capacity. Seed {seed}."""

SETTINGS = {"dropless": 0.0, "1.0": 1.0, "1.25": 1.25, "1.5": 1.5, "2.0": 2.0}
_WARM_UP_STEPS = 3


def configure(asked: Record, seed: int) -> TrainConfig:
    """The dropless run: a preset of the training program, with the fields that are asked for."""
    config = preset(asked["preset"])
    # Named, so that it cannot fall back to another.
    model = dataclasses.replace(config.model, moe_implementation="mosaic_gpu" if has_hopper_gpu() else "xla")
    fields = {name: value for name, value in asked.items() if name != "preset"}
    fields["data"] = tuple(fields.get("data", ()))
    batches = EvaluationConfig(num_batches=fields.pop("validation_batches"))
    warmup_steps = min(config.optimizer.warmup_steps, asked["steps"] // 10)
    optimizer = dataclasses.replace(config.optimizer, warmup_steps=warmup_steps)
    return dataclasses.replace(config, model=model, optimizer=optimizer, evaluation=batches, seed=seed, **fields)


def measure(setting: str, asked: Record, *, seed: int) -> Record:
    """Trains in one setting on this process's first device, and returns its record.

    Args:
        setting: A key of `SETTINGS`.
        asked: The preset, and the fields of `TrainConfig` that are not the preset's.
        seed: Of the parameters and the order of the text.
    """
    record: Record = {"setting": setting, "asked": asked, **asked, "commit": commit()}
    try:
        config = configure(asked, seed)
        model = dataclasses.replace(config.model, capacity_factor=SETTINGS[setting])
        record |= {
            "batch_size": config.batch_size,
            "sequence_length": config.sequence_length,
            "num_experts": model.num_experts,
            "top_k": model.top_k,
            "dtype": model.dtype,
            "moe_implementation": model.moe_implementation,
        }
        return record | _train(dataclasses.replace(config, model=model))
    except Exception as failure:
        return record | {"failure": describe_failure(failure)}


def _train(config: TrainConfig) -> Record:
    corpus, tokenizer = corpus_of(config), tokenizer_of(config)
    optimizer = make_optimizer(config.optimizer, config.steps)
    schedule = make_schedule(config.optimizer, config.steps)
    state = jax.jit(lambda: init_state(config.model, optimizer, config.seed))()
    step = make_train_step(graph_of(config.model), optimizer, schedule, config.accumulation_steps)
    seconds, losses, dropped = [], [], []
    with contextlib.closing(iter(train_loader(config, corpus, tokenizer, Placement("")))) as batches:
        for batch in itertools.islice(batches, config.steps):
            jax.block_until_ready(batch)
            started = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - started)
            losses.append(float(metrics["cross_entropy"]))
            dropped.append(float(metrics["dropped_fraction"]))
    if not all(map(math.isfinite, losses)):
        raise ArithmeticError(f"the loss was {losses[-1]} after {config.steps} steps")

    timed, last = seconds[_WARM_UP_STEPS:] or seconds, -max(config.steps // 10, 1)
    validation = validation_loader(config, corpus, tokenizer, Placement(""))
    validations = {
        name: evaluate(make_eval_step(graph_of(model)), state.params, validation, config.evaluation.num_batches).loss
        for name, model in (
            ("validation", config.model),
            ("validation_dropless", dataclasses.replace(config.model, capacity_factor=0.0)),
        )
    }
    return {
        "seconds_median": statistics.median(timed),
        "seconds_min": min(timed),
        "seconds_max": max(timed),
        "dropped_fraction": float(np.mean(dropped)),
        "dropped_fraction_first": dropped[0],
        "dropped_fraction_last": float(np.mean(dropped[last:])),
        "cross_entropy_last": float(np.mean(losses[last:])),
        **validations,
    }


def show(records: Sequence[Record], title: str, console: Console) -> None:
    """Prints a table of the records."""
    table = Table(title=title, title_justify="left", box=None)
    columns = ("capacity", "steps", "ms", "dropped %", "dropped % (last)", "train", "validation", "validated dropless")
    for name in columns:
        table.add_column(name, justify="right" if name != "capacity" else "left")
    for record in records:
        if "failure" in record:
            table.add_row(record["setting"], str(record["steps"]), record["failure"][:100])
            continue
        table.add_row(
            record["setting"],
            str(record["steps"]),
            f"{1e3 * record['seconds_median']:.1f}",
            f"{100 * record['dropped_fraction']:.2f}",
            f"{100 * record['dropped_fraction_last']:.2f}",
            *(f"{record[name]:.3f}" for name in ("cross_entropy_last", "validation", "validation_dropless")),
        )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns 1 if a setting failed, and 0 otherwise."""
    parser = make_parser("capacity", __doc__)
    parser.add_argument("--only", help=f"settings, separated by commas: {', '.join(SETTINGS)}")
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--steps", type=_positive, default=200)
    parser.add_argument("--batch-size", type=_positive, help="sequences; the preset's if none is given")
    parser.add_argument("--sequence-length", type=_positive, help="tokens; the preset's if none is given")
    parser.add_argument("--validation-batches", type=_positive, default=16)
    parser.add_argument("--data", nargs="+", default=[], help="text files, folders or globs")
    options = parser.parse_args(arguments)
    settings = chosen(parser, "--only", options.only, SETTINGS) if options.only else list(SETTINGS)
    names = ("preset", "steps", "batch_size", "sequence_length", "validation_batches", "data")
    asked = {name: value for name in names if (value := getattr(options, name))}

    with new_process() as process:
        environment = process.submit(describe_environment).result()
    console = make_console(environment)
    method = METHOD.format(warm_up=_WARM_UP_STEPS, batches=options.validation_batches, seed=options.seed)
    results = open_results(parser, options, method, environment)
    for setting in settings:
        wanted = {"setting": setting, "asked": asked}
        there = [record for record in results.records if {name: record.get(name) for name in wanted} == wanted]
        if any("failure" not in record for record in there):
            console.print(f"{setting}: in {results.path} already")
            continue
        try:
            with new_process() as process:
                record = process.submit(measure, setting, asked, seed=options.seed).result()
        except BrokenProcessPool:
            record = {**asked, **wanted, "failure": "its process died"}
        results.replace([*(record for record in results.records if record not in there), record])
        console.print(f"{setting}: {record.get('failure', 'done')}")
    show(results.records, environment["hardware"]["device"], console)
    console.print(f"Written to {results.path}")
    return int(any("failure" in record for record in results.records))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"it must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
