"""Measures whole MoE layers, given the router's logits: forward alone, and forward with backward.

`python -m benchmarks.layer` takes about two minutes on one H100, half of it compilation. Without a GPU it
measures small layers on XLA: that the program works, not what a GPU does.
"""

import functools
import importlib
import importlib.metadata
import itertools
import os
import time
import types
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.jax_layers import CompiledLayer, JaxLayer, LayerFunction, jmoe_layer, lax_layer, tokamax_layer
from benchmarks.layers import (
    CONFIGURATIONS,
    ERROR_FACTOR,
    ERROR_SLACK,
    PEER_TOLERANCE,
    ROUTINGS,
    Configuration,
    Layer,
    RoutingName,
    default_names,
    describe,
    measure,
)
from benchmarks.record import (
    Record,
    Results,
    chosen,
    describe_environment,
    describe_failure,
    make_console,
    make_parser,
    new_process,
    open_results,
)
from benchmarks.scattermoe_layer import load_scattermoe, scattermoe_layer
from benchmarks.sonicmoe_layer import load_sonicmoe, sonicmoe_layer
from benchmarks.torch_layers import TorchFunction, TorchLayer, grouped_mm_layer
from benchmarks.torch_matmuls import load_torch

METHOD = """\
x, weights and the gradient of y in bfloat16, normal values, made on the device; float32 logits. jmoe: route_top_k
and moe_mlp, in one jit. forward: y. both: y and the gradients of x, both weights and the logits, in one jit.
backward: both - forward, in each round. scattermoe: ScatterMoE's linear layers in fms-acceleration-moe, top-k,
softmax and activation by PyTorch. sonicmoe: SonicMoE's layer given the logits, its matmuls not tuned (tuned=False),
the weights arranged as it wants them beforehand.
Logits: random: independent normal values. balanced: the same, with 20 added to those of chosen experts, so that
each expert gets R / E assignments. zipf: the same, chosen so that the expert of rank r gets about min(T, c / r)
assignments, with the c that makes their sum R; which expert has which rank is random.
FLOPs: 2 R D H + 2 R F D forward, with R = T K and H = 2 F (SwiGLU) or F (GELU), twice that backward. dense: one
matmul [R, D] @ [D, H], as many operations as the up-projection (jmoe's and JAX's: through XLA without its Triton
matmuls, so cuBLAS on NVIDIA GPUs; torch's: torch.matmul). ratio: TFLOP/s over those of dense. copy_gb_per_s: bytes
read and written by a copy of the up-projection's weights, through XLA.
relative_error: of the compiled functions that are timed, before that, against float32 computed by plain JAX (each
token through each expert) for 512 of the tokens; the gradient of y is zero for the others, whose gradients must
be zero. plain_relative_error: the same of that plain computation in bfloat16. More than {factor} times it plus
{slack} is a failure, for a peer more than {peer}.
kept_mib: bytes between forward and backward (the leaves of jax.vjp's pullback) beside x, the parameters and the
logits. peak_mib: what XLA plans for both beside operands and results (temp_size_in_bytes), output_mib: for the
results. peak_with_outputs_mib: PyTorch's counter, operands not counted, results counted.
All is compiled and warmed up first. Then {rounds} rounds, in each of which forward, both, dense and copy have one
turn, in random order: 30 ms of rest, one untimed call, and as many calls as fill about 15 ms, timed together.
ms_median, ms_min and ms_max are of one call, over the rounds; spread is (ms_max - ms_min) / ms_median. Each
configuration of each implementation runs in a process of its own. Seed {seed}."""

OURS = "jmoe"

_JAX_LAYERS: Mapping[str, Callable[[Configuration], LayerFunction]] = {
    OURS: jmoe_layer,
    "jax_ragged_dot": lax_layer,
    "tokamax": tokamax_layer,
}
_TORCH_LAYERS: Mapping[str, Callable[[types.ModuleType, Configuration], TorchFunction]] = {
    "torch_grouped_mm": grouped_mm_layer,
    "scattermoe": scattermoe_layer,
    "sonicmoe": sonicmoe_layer,
}


class _Package(NamedTuple):
    """What a peer is from: its name on the package index, and what imports it."""

    name: str
    load: Callable[[], object]


_PACKAGES: Mapping[str, _Package] = {
    "torch_grouped_mm": _Package("torch", functools.partial(importlib.import_module, "torch")),
    "jax_ragged_dot": _Package("jax", functools.partial(importlib.import_module, "jax")),
    "tokamax": _Package("tokamax", functools.partial(importlib.import_module, "tokamax")),
    "scattermoe": _Package("fms-acceleration-moe", load_scattermoe),
    "sonicmoe": _Package("sonic-moe", load_sonicmoe),
}
PEERS = tuple(_PACKAGES)

_THREADS = 4  # that compile the functions of one configuration
_prepared: dict[str, Callable[[int], Layer]] = {}  # of this process: each makes its layer of the seed


def why_not(implementation: str, platform: str) -> str | None:
    """Says why this process cannot measure a peer, if it cannot."""
    try:
        if implementation in _TORCH_LAYERS:
            load_torch(platform)
        _PACKAGES[implementation].load()
    except Exception as failure:  # packages have many ways to fail here
        return f"not importable: {describe_failure(failure)}"
    return None


def prepare(implementation: str, name: str, platform: str) -> None:
    """Does all that leaves the device idle: imports, and compiles a configuration for this process."""
    configuration = CONFIGURATIONS[name]
    if implementation in _TORCH_LAYERS:
        torch = load_torch(platform)
        function = _TORCH_LAYERS[implementation](torch, configuration)
        _prepared[name] = functools.partial(TorchLayer, torch, configuration, function)
        return
    with ThreadPoolExecutor(_THREADS) as pool:
        layer = _JAX_LAYERS[implementation](configuration)
        compiled = CompiledLayer(configuration, layer, pool, ours=implementation == OURS)
    _prepared[name] = functools.partial(JaxLayer, compiled)


def measure_configuration(
    implementation: str, name: str, routings: Sequence[RoutingName], *, rounds: int, seed: int
) -> list[Record]:
    """Measures a configuration that this process prepared, under each routing."""
    configuration = CONFIGURATIONS[name]
    layer = _prepared[name](seed)
    version = {}
    if implementation != OURS:
        version["peer_version"] = importlib.metadata.version(_PACKAGES[implementation].name)
    return [
        measure(layer, configuration, routing, implementation=implementation, rounds=rounds, seed=seed) | version
        for routing in routings
    ]


def failures(implementation: str, name: str, routings: Sequence[RoutingName], reason: str) -> list[Record]:
    """The records of a configuration that could not be measured."""
    record = describe(CONFIGURATIONS[name], implementation)
    return [record | {"routing": routing, "failure": reason} for routing in routings]


class Run:
    """Measures layers and keeps what it finds.

    Each configuration of each implementation has a process of its own. Those of a batch compile at a time, since
    much of that is Python, which threads would not do any faster. Then they measure, one after the other, and end,
    so that each has the device and its memory to itself.

    Args:
        results: Where; what is there is not measured again.
        console: Where to say how it goes.
        platform: JAX's.
        rounds: Turns of each function.
        seed: Of operands, logits and the order of turns.
        jobs: Processes of a batch.
    """

    def __init__(self, results: Results, console: Console, platform: str, *, rounds: int, seed: int, jobs: int):
        self._results, self._console, self._platform = results, console, platform
        self._rounds, self._seed, self._jobs = rounds, seed, jobs
        self._started = time.monotonic()

    def measure(self, implementation: str, names: Sequence[str], routings: Sequence[RoutingName]) -> None:
        """Measures configurations of an implementation."""
        missing = {name: self._missing(implementation, name, routings) for name in names}
        missing = {name: routings for name, routings in missing.items() if routings}
        if len(missing) < len(names):
            self._say(f"{implementation}: {len(names) - len(missing)} of {len(names)} in {self._results.path} already")
        if missing and implementation != OURS and (reason := self._why_not(implementation)):
            self._say(f"{implementation}: {reason}")
            self._keep([{"implementation": implementation, "failure": reason}])
            return
        # Choosing among kernels for dense matmuls runs them, and each of these asks for much memory.
        jobs = 1 if implementation == "jax_ragged_dot" else self._jobs
        for batch in itertools.batched(missing, jobs):
            started = time.monotonic()
            processes = {name: new_process() for name in batch}
            preparing = {
                name: process.submit(prepare, implementation, name, self._platform)
                for name, process in processes.items()
            }
            wait(preparing.values())
            self._say(f"{implementation}: prepared {', '.join(batch)} in {time.monotonic() - started:.0f} s")
            for name, process in processes.items():
                try:
                    preparing[name].result()
                    arguments = implementation, name, missing[name]
                    task = process.submit(measure_configuration, *arguments, rounds=self._rounds, seed=self._seed)
                    records = task.result()
                except BrokenProcessPool:
                    records = failures(implementation, name, missing[name], "its process died")
                except Exception as failure:
                    records = failures(implementation, name, missing[name], describe_failure(failure))
                process.shutdown()
                self._keep(records)
                failed = sum("failure" in record for record in records)
                self._say(f"{implementation}, {name}: {len(records) - failed} timed, {failed} not")

    def _missing(self, implementation: str, name: str, routings: Sequence[RoutingName]) -> list[RoutingName]:
        wanted = {"configuration": name, "implementation": implementation}
        there = {record["routing"] for record in self._results.records if wanted.items() <= record.items()}
        return [routing for routing in routings if routing not in there]

    def _why_not(self, implementation: str) -> str | None:
        with new_process() as process:
            try:
                return process.submit(why_not, implementation, self._platform).result()
            except BrokenProcessPool:
                return "not importable: its process died"

    def _keep(self, records: Sequence[Record]) -> None:
        self._results.replace([*self._results.records, *records])

    def _say(self, what: str) -> None:
        self._console.print(f"{time.monotonic() - self._started:4.0f} s  {what}")


def show(records: Sequence[Record], title: str, console: Console) -> None:
    """Prints a table of the records."""
    table = Table(title=title, title_justify="left", box=None)
    columns = ("", "routing", "implementation", "forward", "backward", "both", "of dense", "spread", "error")
    for name in columns:
        table.add_column(name, justify="left" if name in columns[:3] else "right")
    last = None
    measured = [record for record in records if "configuration" in record]
    for record in sorted(measured, key=lambda record: list(CONFIGURATIONS).index(record["configuration"])):
        if last not in (None, record["configuration"]):
            table.add_row()
        names = record["configuration"] if record["configuration"] != last else "", record["routing"]
        last = record["configuration"]
        if "failure" in record:
            table.add_row(*names, record["implementation"], "-")
            continue
        parts = [record[operation] for operation in ("forward", "backward", "both")]
        table.add_row(
            *names,
            record["implementation"],
            *(f"{part['tflops']:.4g}" for part in parts),
            " ".join(f"{part['ratio']:.3f}" for part in parts),
            f"{record['both']['spread']:.1%}",
            f"{max(record['relative_error'].values()):.1e}",
        )
    console.print(table)
    for record in records:
        if "failure" in record:
            names = [record[key] for key in ("configuration", "routing", "implementation") if key in record]
            console.print(f"{' '.join(names)}: {record['failure']}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns 1 if a layer of this project failed, and 0 otherwise."""
    parser = make_parser("layer", __doc__)
    parser.add_argument("--only", help=f"names or patterns, separated by commas: {', '.join(CONFIGURATIONS)}")
    parser.add_argument("--routing", default="random", help=f"separated by commas: {', '.join(ROUTINGS)}")
    parser.add_argument(
        "--peers",
        nargs="?",
        default="",
        const=",".join(PEERS),
        help=f"measure these too, or all that are there: {', '.join(PEERS)}",
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile at a time")
    options = parser.parse_args(arguments)
    for name in ("rounds", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    routings = chosen(parser, "--routing", options.routing, ROUTINGS)
    peers = chosen(parser, "--peers", options.peers, PEERS) if options.peers else []
    names = chosen(parser, "--only", options.only, CONFIGURATIONS) if options.only else None

    # This process leaves the device alone, and the others take memory as they need it, for they share the device.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    with new_process() as process:
        environment = process.submit(describe_environment).result()
    platform = environment["hardware"]["platform"]
    console = make_console(environment)
    method = METHOD.format(
        rounds=options.rounds, seed=options.seed, factor=ERROR_FACTOR, slack=ERROR_SLACK, peer=PEER_TOLERANCE
    )
    results = open_results(parser, options, method, environment)
    # A peer that was missing may be there now.
    results.replace([record for record in results.records if "configuration" in record])
    run = Run(results, console, platform, rounds=options.rounds, seed=options.seed, jobs=options.jobs)
    names = names or default_names(platform)
    for implementation in (OURS, *peers):
        run.measure(implementation, names, routings)
    show(results.records, f"{environment['hardware']['device']}, bfloat16, TFLOP/s", console)
    console.print(f"Written to {results.path}")
    ours = [record for record in results.records if record["implementation"] == OURS]
    return int(any("failure" in record for record in ours))


if __name__ == "__main__":
    raise SystemExit(main())
