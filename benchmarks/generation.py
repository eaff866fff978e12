"""Measures the layer for few tokens, as in generation: how near it comes to the time of reading its weights.

Most of what `python -m benchmarks.generation` takes is compilation. Without a GPU it measures small layers on XLA:
that the program works, not what a GPU does.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks.layers import CONFIGURATIONS, ERROR_FACTOR, ERROR_SLACK, describe, judge
from benchmarks.record import (
    Record,
    Results,
    chosen,
    describe_environment,
    describe_failure,
    make_console,
    make_parser,
    open_results,
)
from benchmarks.stacks import MAX_BYTES, MIN_LAYERS, NUM_CHECKED, Plain, Stack, draw_experts, draw_weights
from benchmarks.timing import Variant, time_in_rounds

METHOD = """\
moe_mlp given the routing, in bfloat16: several layers in one jit, each with weights of its own, the input of each
the output of the one before, and nothing else between them but an optimization barrier, which keeps a layer's
dispatch from starting before its input is there. Routing: K different experts for each token, drawn independently
for each token and layer, all with weight 1 / K.
layers: as many as it takes until the weights of the experts that were chosen have {chosen_gb:g} GB, so that no cache
holds them until the next call, but at least {min_layers}; all weights of all layers have {max_gb:g} GB at most.
Weights: normal values; those of w_down such that outputs are about as large as inputs. SwiGLU about squares what a
layer deviates from that, so that the outputs of many layers may be much larger or smaller (last_rms: that of the
last).
experts: different ones that were chosen, bytes: of their weights in bfloat16; both are means over the layers.
us_median, us_min and us_max are of one layer, over the rounds: the time of a call over the number of layers.
gb_per_s: bytes over us_median. copy_gb_per_s: bytes read and written by a copy of {copied_mib:g} MiB through XLA, over
the median of its time in the same rounds. of_copy: gb_per_s over copy_gb_per_s.
relative_error: of the first layer's output of the compiled function that is timed, before that, against float32
computed by plain JAX (each token through each expert) for {num_checked} of the tokens, or all. plain_relative_error:
the same of that plain computation in bfloat16. More than {factor} times it plus {slack} is a failure.
All is compiled and warmed up first. Then {rounds} rounds, in each of which every number of tokens of a configuration
and the copy have one turn, in random order: 30 ms of rest, one untimed call, and as many calls as fill about 15 ms,
timed together. Seed {seed}."""


class Extent(NamedTuple):
    """How much is measured on a device.

    Attributes:
        names: Configurations.
        tokens: Numbers of tokens.
        chosen_bytes: Bytes that the chosen experts' weights have at least, over all layers.
        copied_bytes: Bytes of the array that is copied.
    """

    names: tuple[str, ...]
    tokens: tuple[int, ...]
    chosen_bytes: int
    copied_bytes: int


ON_GPU = Extent(("olmoe", "mixtral"), (1, 2, 4, 8, 16, 32, 64, 128, 256, 512), 10**9, 2**30)
ELSEWHERE = Extent(("tiny", "tiny-gelu"), (1, 4), 0, 2**20)


def measure(name: str, tokens: Sequence[int], extent: Extent, *, rounds: int, seed: int) -> list[Record]:
    """Checks, then times a configuration with each number of tokens; returns their records."""
    configurations = {T: dataclasses.replace(CONFIGURATIONS[name], T=T) for T in tokens}
    records = {T: describe(configuration, "jmoe") for T, configuration in configurations.items()}
    experts = {}
    for T, configuration in configurations.items():
        with _failure_kept(records[T]):
            experts[T] = draw_experts(configuration, extent.chosen_bytes, seed)
    if not experts:
        return list(records.values())
    try:
        weights = draw_weights(CONFIGURATIONS[name], max(map(len, experts.values())), seed)
        stacks: dict[int, Stack] = {}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            plain = Plain(CONFIGURATIONS[name], weights[0], pool)
            for T, of_layers in experts.items():
                with _failure_kept(records[T]):
                    stacks[T] = Stack(configurations[T], weights[: len(of_layers)], of_layers, pool, seed)
        variants: dict[int | str, Variant] = {"copy": _copy(extent.copied_bytes, seed)}
        for T, stack in stacks.items():
            with _failure_kept(records[T]):
                records[T] |= stack.facts() | _check(stack, plain)
                variants[T] = Variant(stack.start, jax.block_until_ready)
        seconds, failures = time_in_rounds(variants, rounds=rounds, seed=seed)
        for T in stacks:
            if reason := failures.get("copy") or failures.get(T):
                records[T].setdefault("failure", reason)
            elif T in seconds:
                copy_rate = 2 * extent.copied_bytes / statistics.median(seconds["copy"]) / 1e9
                records[T] |= summarize_stack(seconds[T], records[T]["layers"], records[T]["bytes"], copy_rate)
    except Exception as failure:
        for record in records.values():
            record.setdefault("failure", describe_failure(failure))
    return list(records.values())


def summarize_stack(seconds: Sequence[float], num_layers: int, num_bytes: float, copy_gb_per_s: float) -> Record:
    """Summarises timings of layers that read so many bytes each, beside the rate of a copy."""
    us = [1e6 * of_call / num_layers for of_call in seconds]
    median = statistics.median(us)
    rate = num_bytes / median / 1e3
    return {
        "us_median": median,
        "us_min": min(us),
        "us_max": max(us),
        "spread": (max(us) - min(us)) / median,
        "gb_per_s": rate,
        "copy_gb_per_s": copy_gb_per_s,
        "of_copy": rate / copy_gb_per_s,
    }


@contextlib.contextmanager
def _failure_kept(record: Record) -> Iterator[None]:
    try:
        yield
    except Exception as failure:
        record["failure"] = describe_failure(failure)


def _check(stack: Stack, plain: Plain) -> Record:
    error, plain_error, rms = stack.check(plain)
    judge({"y": error}, {"y": plain_error})
    if not math.isfinite(rms):
        raise ArithmeticError("the last layer's output is not finite")
    return {"relative_error": {"y": error}, "plain_relative_error": {"y": plain_error}, "last_rms": rms}


def _copy(num_bytes: int, seed: int) -> Variant:
    draw = jax.jit(functools.partial(jax.random.normal, shape=(num_bytes // 2,), dtype=jnp.bfloat16))
    source = draw(jax.random.key(seed))
    run = functools.partial(jax.jit(jnp.copy).lower(source).compile(), source)
    jax.block_until_ready(run())
    return Variant(run, jax.block_until_ready)


def by_configuration_and_tokens(record: Record) -> tuple[int, int]:
    """The key to sort records by."""
    return list(CONFIGURATIONS).index(record["configuration"]), record["T"]


def show(records: Sequence[Record], title: str, console: Console) -> None:
    """Prints a table of the records."""
    table = Table(title=title, title_justify="left", box=None)
    for name in ("", "tokens", "layers", "experts", "MB", "us", "spread", "GB/s", "copy GB/s", "of copy", "error"):
        table.add_column(name, justify="right" if name else "left")
    last = None
    for record in sorted(records, key=by_configuration_and_tokens):
        if last not in (None, record["configuration"]):
            table.add_row()
        names = record["configuration"] if record["configuration"] != last else "", str(record["T"])
        last = record["configuration"]
        if "failure" in record:
            table.add_row(*names, "-")
            continue
        table.add_row(
            *names,
            str(record["layers"]),
            f"{record['experts']:.1f}",
            f"{record['bytes'] / 1e6:.4g}",
            f"{record['us_median']:.1f}",
            f"{record['spread']:.1%}",
            f"{record['gb_per_s']:.4g}",
            f"{record['copy_gb_per_s']:.4g}",
            f"{record['of_copy']:.3f}",
            f"{record['relative_error']['y']:.1e}",
        )
    console.print(table)
    for record in records:
        if "failure" in record:
            console.print(f"{record['configuration']}, {record['T']} tokens: {record['failure']}")


def _numbers_of_tokens(value: str) -> list[int]:
    if not all(part.isdecimal() and int(part) for part in value.split(",")):
        raise argparse.ArgumentTypeError(f"must be positive numbers, separated by commas, got {value!r}")
    return list(dict.fromkeys(map(int, value.split(","))))


def _measure_missing(
    name: str, tokens: Sequence[int], results: Results, extent: Extent, console: Console, *, rounds: int, seed: int
) -> None:
    there = {record["T"] for record in results.records if record["configuration"] == name}
    missing = [T for T in tokens if T not in there]
    if len(missing) < len(tokens):
        console.print(f"{name}: {len(tokens) - len(missing)} of {len(tokens)} in {results.path} already")
    if missing:
        records = measure(name, missing, extent, rounds=rounds, seed=seed)
        results.replace([*results.records, *records])
        failed = sum("failure" in record for record in records)
        console.print(f"{name}: {len(records) - failed} timed, {failed} not")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns 1 if a number of tokens failed, and 0 otherwise."""
    parser = make_parser("generation", __doc__)
    parser.add_argument("--only", help=f"names or patterns, separated by commas: {', '.join(CONFIGURATIONS)}")
    parser.add_argument("--tokens", type=_numbers_of_tokens, help="numbers of tokens, separated by commas")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    names = chosen(parser, "--only", options.only, CONFIGURATIONS) if options.only else None

    environment = describe_environment()
    extent = ON_GPU if environment["hardware"]["platform"] == "gpu" else ELSEWHERE
    console = make_console(environment)
    method = METHOD.format(
        chosen_gb=extent.chosen_bytes / 1e9,
        min_layers=MIN_LAYERS,
        max_gb=MAX_BYTES / 1e9,
        copied_mib=extent.copied_bytes / 2**20,
        num_checked=NUM_CHECKED,
        factor=ERROR_FACTOR,
        slack=ERROR_SLACK,
        rounds=options.rounds,
        seed=options.seed,
    )
    results = open_results(parser, options, method, environment)
    tokens = options.tokens or extent.tokens
    for name in names or extent.names:
        _measure_missing(name, tokens, results, extent, console, rounds=options.rounds, seed=options.seed)
        gc.collect()  # the weights, before the next configuration's
    show(results.records, f"{environment['hardware']['device']}, bfloat16, few tokens", console)
    console.print(f"Written to {results.path}")
    return int(any("failure" in record for record in results.records))


if __name__ == "__main__":
    raise SystemExit(main())
