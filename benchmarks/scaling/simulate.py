"""Predicts training steps on thousands of GPUs, from recorded results and, where these say nothing, assumptions."""

import argparse
import dataclasses
import math
from collections.abc import Iterator

from rich.console import Console

from benchmarks.record import RESULTS, Record, Results, commit, default_path
from benchmarks.report import newest
from benchmarks.scaling import tables
from benchmarks.scaling.calibrate import calibrate, devices, links, model_of, validate
from benchmarks.scaling.layer import EXCHANGES
from benchmarks.scaling.time_model import ONE, Job, Link, Network, Speeds, meshes, step_gib, step_seconds
from jmoe.models import PRESETS

PROGRAM = "python -m benchmarks.scaling --simulate"
_METHOD = """\
The formulas of docs/scaling.md. Each device has the same number of sequences on any number of devices. Of each size of
the expert axis the fastest of all meshes and exchanges that fit into memory is recorded, best: the fastest of these.
efficiency: over the same step on one device, whether it fits there or not."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `--simulate`; each default that is not measured is an assumption."""
    group = parser.add_argument_group("simulation")
    group.add_argument("--simulate", action="store_true", help="predict steps instead of measuring")
    group.add_argument("--model", choices=PRESETS, default="olmoe_1b_7b")
    group.add_argument("--num-layers", default="4,16", help="one or more, separated by commas")
    group.add_argument("--batch-size", type=int, default=4, help="sequences of each GPU")
    group.add_argument("--sequence-length", type=int, default=4096)
    group.add_argument("--max-gpus", type=int, default=4096)
    group.add_argument("--device", help="whose kernel times are taken: of recorded results")
    group.add_argument("--gpu-gib", type=float, default=72, help="memory of a GPU that a step may take")
    group.add_argument("--gpus-per-node", type=int, default=8)
    group.add_argument("--nvlink-gb", type=float, default=250, help="GB/s that a GPU sends in a node, if not measured")
    group.add_argument("--nvlink-us", type=float, default=15, help="latency in a node, if not measured")
    group.add_argument("--network-gb", type=float, default=40, help="GB/s that a GPU sends to other nodes")
    group.add_argument("--network-us", type=float, default=25, help="latency between nodes")
    group.add_argument(
        "--overlap", type=float, default=0, help="share of the backward that hides gradient sums, 0 to 1"
    )
    group.add_argument("--imbalance", type=float, default=1, help="fullest device over mean, beyond random routing")


def simulate(job: Job, speeds: Speeds, network: Network, max_devices: int, gpu_gib: float) -> Iterator[Record]:
    """Predicts steps on 1, 2, 4 and more devices; yields the fastest mesh and exchange of each expert axis.

    Those that fit into memory come before those that do not.
    """
    alone = sum(step_seconds(job, speeds, network, ONE, "gather").values())
    num_devices = 1
    while num_devices <= max_devices:
        by_expert: dict[int, Record] = {}
        for mesh in meshes(num_devices, job.model.num_experts):
            for exchange in EXCHANGES if mesh.expert > 1 else ("gather",):
                parts = step_seconds(job, speeds, network, mesh, exchange)
                gib, seconds = step_gib(job, mesh, exchange), sum(parts.values())
                record = {
                    "num_devices": num_devices,
                    **mesh._asdict(),
                    "exchange": exchange if mesh.expert > 1 else "",
                    "seconds": seconds,
                    "parts": parts,
                    "gib": gib,
                    "fits": gib <= gpu_gib,
                    "tokens_per_second": num_devices * job.num_tokens / seconds,
                    "efficiency": alone / seconds,
                }
                if mesh.expert not in by_expert or _rank(record) < _rank(by_expert[mesh.expert]):
                    by_expert[mesh.expert] = record
        best = min(by_expert.values(), key=_rank)
        yield from ({**record, "best": record is best} for record in by_expert.values())
        num_devices *= 2


def _rank(record: Record) -> tuple[bool, float]:
    return not record["fits"], record["seconds"] if record["fits"] else record["gib"]


def main(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Predicts, prints and records; returns 0."""
    for name in ("batch_size", "sequence_length", "max_gpus", "gpus_per_node", "gpu_gib", "nvlink_gb", "network_gb"):
        if not 0 < getattr(options, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be a number above 0, got {getattr(options, name)}")
    for name in ("nvlink_us", "network_us"):
        if not 0 <= getattr(options, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be a number from 0, got {getattr(options, name)}")
    if options.resume or options.only:
        parser.error("--simulate predicts everything anew; it goes without --resume and --only")
    if not 0 <= options.overlap <= 1 or not 1 <= options.imbalance < math.inf:
        parser.error("--overlap must be from 0 to 1, and --imbalance at least 1")
    if not all(layers.isdecimal() and int(layers) for layers in options.num_layers.split(",")):
        parser.error(f"--num-layers must be numbers, separated by commas, got {options.num_layers!r}")
    contents = newest(RESULTS)
    known = devices(contents, options.setting)
    if not known or (options.device or known[0]) not in known:
        parser.error(f"--device: layers and {options.setting} steps are recorded for {', '.join(known) or 'no device'}")
    device = options.device or known[0]

    measured = links(contents, device)
    in_node = {"": Link(1e9 * options.nvlink_gb, 1e-6 * options.nvlink_us), **measured}
    network = Network(in_node, Link(1e9 * options.network_gb, 1e-6 * options.network_us), options.gpus_per_node)
    records, sources = [], []
    for num_layers in map(int, options.num_layers.split(",")):
        model = model_of(options.model, num_layers, options.setting)
        try:
            speeds, activation_bytes, sources = calibrate(contents, device, model, options.setting)
        except ValueError as error:
            parser.error(str(error))
        job = Job(
            model,
            options.batch_size,
            options.sequence_length,
            imbalance=options.imbalance,
            overlap=options.overlap,
            activation_bytes=activation_bytes,
        )
        what = {"kind": "prediction", "preset": options.model, "num_layers": num_layers, "setting": options.setting}
        what |= {"batch_size": options.batch_size, "sequence_length": options.sequence_length, "commit": commit()}
        predictions = simulate(job, speeds, network, options.max_gpus, options.gpu_gib)
        records += [what | prediction for prediction in predictions]
        measured_speeds = {name: speed / 1e12 for name, speed in dataclasses.asdict(speeds).items()}
        sources = [*sources, f"so, in TFLOP/s (copy: TB/s): {_rounded(measured_speeds)}"]
    records += validate(contents)
    assumptions = [
        f"{options.gpus_per_node} GPUs in a node, {options.gpu_gib:g} GiB of each for a step",
        f"between nodes {options.network_gb:g} GB/s for each GPU, latency {options.network_us:g} us",
        *([] if measured else [f"in a node {options.nvlink_gb:g} GB/s for each GPU, latency {options.nvlink_us:g} us"]),
        f"{options.overlap:.0%} of the backward hides sums of gradients",
        f"fullest device {options.imbalance:g} times what random routing gives it",
    ]
    sources += [
        f"{name} in a node: measured, {link.bandwidth / 1e9:.0f} GB/s, {1e6 * link.latency:.0f} us"
        for name, link in measured.items()
    ]
    of_device = next(content for content in contents if content["hardware"]["device"] == device)
    header = {"program": PROGRAM, "method": " ".join(_METHOD.split()), "sources": sources, "assumptions": assumptions}
    header |= {key: of_device[key] for key in ("hardware", "versions")}
    results = Results(options.out or default_path("simulate", header["hardware"]), header)
    results.replace(records)
    console = Console()
    console = console if console.is_terminal else Console(width=150)
    tables.show_simulation(header | {"records": records}, console)
    console.print(f"Written to {results.path}; python -m benchmarks.report draws it")
    return 0


def _rounded(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {figure:.3g}" for name, figure in figures.items())
