"""Trains a small model by several ways of routing: time of a step, dropped and padded rows, loss after equal steps.

Dropless top-k beside expert capacities, which drop tokens, and beside token rounding, which fills blocks. `python -m
benchmarks.routing` trains the demo's model on the source of Python's standard library, once for each setting: some
minutes on two CPU cores. On a CPU the times say nothing of a GPU's. For one GPU there is `--preset small`.
"""

import argparse
import contextlib
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

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
from benchmarks.seeds import routing_table
from jmoe.capacity import expert_capacity
from jmoe.models import PRESETS, Transformer, TransformerConfig
from jmoe.routers import LinearRouter, route_token_rounding
from pallas_kernels.device import has_hopper_gpu
from train.config import EvaluationConfig, TrainConfig, preset
from train.evaluate import evaluate, make_eval_step
from train.inputs import corpus_of, tokenizer_of, train_loader, validation_loader
from train.mesh import Placement
from train.optimizer import make_optimizer, make_schedule
from train.step import DeviceBatch, Params, graph_of, init_state, make_train_step

METHOD = """\
The training program's model, optimizer (warmed up for a tenth of the steps at most), text and batches; for each seed
the same initial parameters and batches in every setting, which runs in a process of its own.
dropless: top-k. capacity_c: an expert takes at most ceil(c * T * K / E) assignments of a batch: the first choices of
all tokens first, in the order of the tokens. rounding_*: token rounding of top-k, to whole blocks of block_rows. All
run the same grouped matmuls, in which a dropped assignment has no row; to find what is dropped takes one more sort.
seconds: median and extremes of the steps after the first {warm_up}, waiting for each. dropped_fraction: share of the
router's assignments that a capacity drops, mean over all steps; dropped_fraction_last, cross_entropy_last: over the
last tenth of them. Of the first {batches} batches of held-out text: validation: nats per target, by the model as
trained; validation_top_k: by the same parameters with dropless top-k; experts_per_token: assignments that are computed,
routed as in training; padded_share: rows that only fill blocks of block_rows, as a share of these, of all layers."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a model routes in training.

    Attributes:
        capacity_factor: As of `TransformerConfig`; 0 is dropless.
        rounding: As of `jmoe.routers.route_token_rounding`; None is top-k.
    """

    capacity_factor: float = 0.0
    rounding: str | None = None


SETTINGS = {
    "dropless": Setting(),
    **{f"capacity_{factor}": Setting(capacity_factor=factor) for factor in (1.0, 1.25, 1.5, 2.0)},
    **{f"rounding_{rounding}": Setting(rounding=rounding) for rounding in ("nearest", "up", "down")},
}
_WARM_UP_STEPS = 3


def configure(asked: Record, seed: int) -> TrainConfig:
    """The dropless run: a preset of the training program, with the fields that are asked for."""
    config = preset(asked["preset"])
    # Named, so that it cannot fall back to another.
    model = dataclasses.replace(config.model, moe_implementation="mosaic_gpu" if has_hopper_gpu() else "xla")
    fields = {name: value for name, value in asked.items() if name not in ("preset", "block_rows")}
    fields["data"] = tuple(fields.get("data", ()))
    batches = EvaluationConfig(num_batches=fields.pop("validation_batches"))
    warmup_steps = min(config.optimizer.warmup_steps, asked["steps"] // 10)
    optimizer = dataclasses.replace(config.optimizer, warmup_steps=warmup_steps)
    return dataclasses.replace(config, model=model, optimizer=optimizer, evaluation=batches, seed=seed, **fields)


def measure(setting: str, asked: Record, *, seed: int) -> Record:
    """Trains in one setting on this process's first device, and returns its record.

    Args:
        setting: A key of `SETTINGS`.
        asked: The preset, the rows of a block, and the fields of `TrainConfig` that are not the preset's.
        seed: Of the parameters and the order of the text.
    """
    record: Record = {"setting": setting, "seed": seed, "asked": asked, **asked, "commit": commit()}
    try:
        config = configure(asked, seed)
        capacity_factor = SETTINGS[setting].capacity_factor
        model = dataclasses.replace(config.model, capacity_factor=capacity_factor)
        record |= {
            "batch_size": config.batch_size,
            "sequence_length": config.sequence_length,
            "num_experts": model.num_experts,
            "top_k": model.top_k,
            "dtype": model.dtype,
            "moe_implementation": model.moe_implementation,
        }
        return record | _train(dataclasses.replace(config, model=model), SETTINGS[setting], asked["block_rows"])
    except Exception as failure:
        return record | {"failure": describe_failure(failure)}


def _train(config: TrainConfig, setting: Setting, block_rows: int) -> Record:
    graph = _graph(config.model, setting, block_rows)
    corpus, tokenizer = corpus_of(config), tokenizer_of(config)
    optimizer = make_optimizer(config.optimizer, config.steps)
    schedule = make_schedule(config.optimizer, config.steps)
    state = jax.jit(lambda: init_state(config.model, optimizer, config.seed))()
    step = make_train_step(graph, optimizer, schedule, config.accumulation_steps)
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
        name: evaluate(make_eval_step(graph), state.params, validation, config.evaluation.num_batches).loss
        for name, graph in (
            ("validation", graph),
            ("validation_top_k", graph_of(dataclasses.replace(config.model, capacity_factor=0.0))),
        )
    }
    with contextlib.closing(iter(validation)) as batches:
        batches = itertools.islice(batches, config.evaluation.num_batches)
        rows = _count_rows(graph, config.model, state.params, batches, block_rows)
    return {
        "seconds_median": statistics.median(timed),
        "seconds_min": min(timed),
        "seconds_max": max(timed),
        "dropped_fraction": float(np.mean(dropped)),
        "dropped_fraction_first": dropped[0],
        "dropped_fraction_last": float(np.mean(dropped[last:])),
        "cross_entropy_last": float(np.mean(losses[last:])),
        **validations,
        **rows,
    }


def _graph(config: TransformerConfig, setting: Setting, block_rows: int) -> nnx.GraphDef[Transformer]:
    """The model without its parameters, whose routers round where the setting says so."""
    if setting.rounding is None:
        return graph_of(config)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    for _, router in nnx.iter_modules(model):
        if isinstance(router, LinearRouter):
            options: dict[str, Any] = dict(router.options) | {"rounding": setting.rounding, "block_rows": block_rows}
            if options.pop("score_order") != "before_top_k":
                raise ValueError("token rounding has the score before top-k; choose another preset")
            router.route, router.options = route_token_rounding, tuple(sorted(options.items()))
    return nnx.graphdef(model)


def _count_rows(
    graph: nnx.GraphDef[Transformer],
    config: TransformerConfig,
    params: Params,
    batches: Iterable[DeviceBatch],
    block_rows: int,
) -> Record:
    """Counts the rows of experts in batches, and those that only fill blocks."""

    @jax.jit
    def assignments(params: Params, batch: DeviceBatch) -> tuple[Float[Array, "L E"], Int[Array, ""]]:
        inputs = {"positions": batch["positions"], "segment_ids": batch["segment_ids"]}
        _, aux = nnx.merge(graph, params).hidden(batch["tokens"], **inputs)
        num_tokens = (batch["segment_ids"] != 0).sum()
        return aux.expert_load * aux.experts_per_token[:, None] * num_tokens, num_tokens

    rows = padding = tokens = 0
    for batch in batches:
        counts, num_tokens = assignments(params, batch)
        counts = np.rint(counts).astype(np.int64)
        if config.capacity_factor:
            asked = batch["tokens"].size * config.top_k
            counts = np.minimum(counts, expert_capacity(config.capacity_factor, asked, config.num_experts))
        rows, padding = rows + int(counts.sum()), padding + int((-counts % block_rows).sum())
        tokens += int(num_tokens) * len(counts)
    return {"experts_per_token": rows / tokens, "padded_share": padding / max(rows, 1)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns 1 if a setting failed, and 0 otherwise."""
    parser = make_parser("routing", __doc__)
    parser.add_argument("--only", help=f"settings or patterns, separated by commas: {', '.join(SETTINGS)}")
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--steps", type=_positive, default=200)
    parser.add_argument("--batch-size", type=_positive, help="sequences; the preset's if none is given")
    parser.add_argument("--sequence-length", type=_positive, help="tokens; the preset's if none is given")
    parser.add_argument("--block-rows", type=_positive, default=128, help="rows of a block")
    parser.add_argument("--num-seeds", type=_positive, default=1, help="models of each setting")
    parser.add_argument("--validation-batches", type=_positive, default=16)
    parser.add_argument("--data", nargs="+", default=[], help="text files, folders or globs")
    options = parser.parse_args(arguments)
    settings = chosen(parser, "--only", options.only, SETTINGS) if options.only else list(SETTINGS)
    names = ("preset", "steps", "batch_size", "sequence_length", "block_rows", "validation_batches", "data")
    asked = {name: value for name in names if (value := getattr(options, name))}

    with new_process() as process:
        environment = process.submit(describe_environment).result()
    console = make_console(environment)
    method = METHOD.format(warm_up=_WARM_UP_STEPS, batches=options.validation_batches)
    results = open_results(parser, options, method, environment)
    for seed, setting in itertools.product(range(options.seed, options.seed + options.num_seeds), settings):
        wanted = {"setting": setting, "seed": seed, "asked": asked}
        there = [record for record in results.records if {name: record.get(name) for name in wanted} == wanted]
        if any("failure" not in record for record in there):
            console.print(f"{setting}, seed {seed}: in {results.path} already")
            continue
        try:
            with new_process() as process:
                record = process.submit(measure, setting, asked, seed=seed).result()
        except BrokenProcessPool:
            record = {**asked, **wanted, "failure": "its process died"}
        results.replace([*(record for record in results.records if record not in there), record])
        console.print(f"{setting}, seed {seed}: {record.get('failure', 'done')}")
    console.print(routing_table(results.records, with_times=True).terminal(environment["hardware"]["device"]))
    console.print(f"Written to {results.path}")
    return int(any("failure" in record for record in results.records))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"it must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
