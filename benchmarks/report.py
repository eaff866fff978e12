"""Writes docs/performance.md and its images from the newest results of each program on each device.

`python -m benchmarks.report`, after any change in `benchmarks/results/`; a test compares the page with the results.
"""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import peers, prose
from benchmarks.experts import bounds_ms, by_number_of_experts
from benchmarks.layers import CONFIGURATIONS, EXPERT_SWEEP, ROUTINGS
from benchmarks.markdown import table
from benchmarks.plots import plot_experts, plot_generation, plot_layers, timed_with_random_routing
from benchmarks.record import RESULTS, Record
from benchmarks.scaling import tables
from benchmarks.scaling.plots import plot_simulation
from benchmarks.seeds import routing_table

DOCS = Path(__file__).parents[1] / "docs"
IMAGES = Path("images")

_OPERATIONS = "forward", "backward", "both"


def newest(folder: Path) -> list[Record]:
    """Reads the results; returns the newest of each program and device, ordered by these.

    The layers that differ in the number of experts only are given as those of a program "experts".
    """
    contents: dict[tuple[str, str], Record] = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8")) | {"file": path.name}
        content["program"] = re.findall(r"\w+", content["program"])[-1]
        for part in _parts(content):
            key = part["program"], part["hardware"]["device"]
            if part["records"] and (key not in contents or contents[key]["date"] < part["date"]):
                contents[key] = part
    return [contents[key] for key in sorted(contents)]


def _parts(content: Record) -> list[Record]:
    """Takes the sweep of experts out of results of layers, and leaves out peers that could not be imported."""
    if content["program"] != "layer":
        return [content]
    records = [record for record in content["records"] if "configuration" in record]
    layers = [record for record in records if record["configuration"] not in EXPERT_SWEEP]
    experts = [record for record in records if record["configuration"] in EXPERT_SWEEP]
    return [content | {"records": layers}, content | {"program": "experts", "records": experts}]


def make_page(contents: Sequence[Record]) -> str:
    """Makes the page of what `newest` gives."""

    def of(*programs: str) -> list[Record]:
        return [content for content in contents if content["program"] in programs]

    parts = [
        prose.HEAD,
        prose.LAYER,
        *_each(of("layer"), _layer_tables),
        *([prose.EXPERTS, *_each(of("experts"), _expert_tables)] if of("experts") else []),
        *([prose.GENERATION, *_each(of("generation"), _generation_tables)] if of("generation") else []),
        prose.MEMORY,
        *_each(_newest_memory(of("layer", "memory")), _memory_tables),
        prose.GROUPED_MATMUL,
        *_each(of("grouped_matmul"), _grouped_matmul_tables),
        *([prose.BLOCK_SPARSE, *_each(of("block_sparse"), _block_sparse_tables)] if of("block_sparse") else []),
        prose.TRAIN_STEP,
        *_each(of("train_step"), _train_step_tables),
        *([prose.ROUTING, *_each(of("routing"), _routing_tables)] if of("routing") else []),
        *([prose.SCALING, *_each(of("scaling"), _scaling_tables)] if of("scaling") else []),
        *([prose.SIMULATION, *_each(of("simulate"), _simulation_tables)] if of("simulate") else []),
        prose.REPRODUCE,
    ]
    return "\n".join(parts)


def image_path(content: Record) -> Path:
    """Where the plot of a program's results goes, relative to the page."""
    device = re.sub(r"[^a-z0-9]+", "-", content["hardware"]["device"].lower()).strip("-")
    return IMAGES / f"{content['program']}-{device}.png"


def _each(contents: Sequence[Record], tables: Callable[[Record], list[str]]) -> list[str]:
    if not contents:
        return ["No results yet.\n"]
    return [part for content in contents for part in (_origin(content), *tables(content))]


def _origin(content: Record) -> str:
    hardware, versions = content["hardware"], content["versions"]
    commits = sorted({record["commit"] for record in content["records"] if record.get("commit")})
    commit = f", commit {', '.join(commits)}" if commits else ""
    file = f"[`{content['file']}`](../benchmarks/results/{content['file']})"
    return f"**{hardware['device']}**, {content['date'][:10]}, JAX {versions['jax']}{commit}: {file}.\n"


def _layer_tables(content: Record) -> list[str]:
    records = sorted(content["records"], key=_layer_order)
    random = timed_with_random_routing(records)
    rows = []
    for record in records:
        names = record["configuration"], record["routing"], _implementation(record)
        if "failure" in record:
            rows.append((*names, *"------"))
            continue
        beside = random.get(record["configuration"]) if record["implementation"] == "jmoe" else None
        of_random = record["both"]["tflops"] / beside["both"]["tflops"] if beside else None
        rows.append(
            (
                *names,
                *(f"{record[operation]['tflops']:.0f}" for operation in _OPERATIONS),
                f"{record['both']['ratio']:.3f}",
                f"{of_random:.3f}" if of_random and record["routing"] != "random" else "",
                _error(record),
            )
        )
    head = "", "routing", "implementation", *_OPERATIONS, "of dense", "of random", "error"
    parts = [table(head, rows, 3), *_failures(records)]
    if random and content["hardware"]["device"] == peers.DEVICE:
        parts += [prose.BESIDE_LAYERS, table(("", "jmoe", *peers.LAYERS), map(_beside_layers, random.values()), 1)]
    if random:
        parts.append(f"![TFLOP/s of each configuration as bars]({image_path(content).as_posix()})\n")
    return parts


def _beside_layers(record: Record) -> list[str]:
    name = record["configuration"]
    ours = peers.Tflops(*(record[operation]["tflops"] for operation in _OPERATIONS))
    others = [figures.get(name) for figures in peers.LAYERS.values()]
    return [name, *(" / ".join(f"{part:.0f}" if part else "-" for part in tflops or ()) for tflops in (ours, *others))]


def _expert_tables(content: Record) -> list[str]:
    implementations = by_number_of_experts(content["records"])
    ours = implementations.get("jmoe", {})
    bounds = {operation: bounds_ms(ours, operation) for operation in ("forward", "both")}
    rows = []
    for by_experts in implementations.values():
        for E, record in by_experts.items():
            row = [str(E), _implementation(record)]
            for operation, bound in bounds.items():
                row.append(f"{record[operation]['ms_median']:.2f}")
                row.append(f"{bound[E]:.2f}" if by_experts is ours else "")
                row.append(f"{record[operation]['tflops']:.0f}")
            rows.append(row)
    head = "experts", "implementation", "forward", "bound", "TFLOP/s", "both", "bound", "TFLOP/s"
    parts = [table(head, rows, 2), *_failures(content["records"])]
    if rows:
        parts.append(f"![Time against the number of experts]({image_path(content).as_posix()})\n")
    return parts


def _generation_tables(content: Record) -> list[str]:
    records = sorted(content["records"], key=lambda record: (_place(record["configuration"]), record["T"]))
    rows = []
    for record in records:
        names = record["configuration"], str(record["T"])
        if "failure" in record:
            rows.append((*names, *"-------"))
            continue
        rows.append(
            (
                *names,
                str(record["layers"]),
                f"{record['experts']:.1f}",
                f"{record['bytes'] / 1e6:,.1f}",
                f"{record['us_median']:,.1f}",
                f"{record['gb_per_s']:,.0f}",
                f"{record['copy_gb_per_s']:,.0f}",
                f"{record['of_copy']:.3f}",
            )
        )
    head = "", "tokens", "layers", "experts", "MB", "us", "GB/s", "copy", "of copy"
    of_tokens = [record | {"configuration": f"{record['configuration']} with T {record['T']}"} for record in records]
    parts = [table(head, rows, 1), *_failures(of_tokens)]
    if _is_timed(records):
        parts.append(f"![Share of the rate of a copy against the number of tokens]({image_path(content).as_posix()})\n")
    return parts


def _newest_memory(contents: Sequence[Record]) -> list[Record]:
    """The newest results with memory of each device, whichever program made them."""
    by_device: dict[str, Record] = {}
    for content in contents:
        device = content["hardware"]["device"]
        if any("peak_mib" in record for record in content["records"]) and (
            device not in by_device or by_device[device]["date"] < content["date"]
        ):
            by_device[device] = content
    return [by_device[device] for device in sorted(by_device)]


def _memory_tables(content: Record) -> list[str]:
    # A layer's memory does not depend on the routing.
    records = {
        record["configuration"]: record
        for record in content["records"]
        if record["implementation"] == "jmoe" and "peak_mib" in record
    }
    beside = peers.MEMORY if content["hardware"]["device"] == peers.DEVICE else {}
    rows = []
    for name in sorted(records, key=_place):
        record = records[name]
        figures = [record["kept_mib"], record["peak_mib"], record["peak_mib"] + record["output_mib"]]
        others = [figures.get(name) for figures in beside.values()]
        pairs = [f"{other.kept:,} / {other.peak:,}" if other else "" for other in others]
        rows.append((name, *(f"{figure:,.0f}" for figure in figures), *pairs))
    parts = [table(("", "kept", "peak", "with results", *beside), rows, 1)]
    if beside:
        parts.append("Of others: kept / peak above inputs and parameters, by PyTorch's counter.\n")
    return parts


def _grouped_matmul_tables(content: Record) -> list[str]:
    by_key = {
        (record["configuration"], record["operation"], record["implementation"]): record
        for record in content["records"]
    }
    ours = [record for record in content["records"] if record["implementation"] == "pallas_kernels"]
    rows = []
    for record in ours:
        key = record["configuration"], record["operation"]
        names = key[0], key[1].replace("_", " ")
        torch, lax = by_key.get((*key, "torch_grouped_mm"), {}), by_key.get((*key, "jax_ragged_dot"), {})
        if "failure" in record:
            rows.append((*names, *"----"))
            continue
        rows.append(
            (
                *names,
                f"{record['tflops']:.0f}",
                f"{record['ratio']:.3f}" if "ratio" in record else "",
                f"{record['tflops'] / torch['tflops']:.3f}" if "tflops" in torch else "",
                f"{lax['tflops']:.0f}" if "tflops" in lax else lax.get("failure", "").partition(":")[0],
            )
        )
    head = "", "operation", "pallas_kernels", "of cuBLAS", "of grouped_mm", "`jax.lax.ragged_dot`"
    return [table(head, rows, 2), *_failures(ours)]


def _block_sparse_tables(content: Record) -> list[str]:
    cublas = {
        (record["configuration"], record["operation"]): record
        for record in content["records"]
        if record["implementation"] == "jax_batched"
    }
    ours = [record for record in content["records"] if record["implementation"] == "pallas_kernels"]
    rows = []
    for record in ours:
        names = (
            record["configuration"],
            ", ".join(f"{record[letter]:,}" for letter in "MKNG"),
            record["operation"].replace("_", " "),
        )
        if "failure" in record:
            rows.append((*names, *"---"))
            continue
        batched = cublas[record["configuration"], record["operation"]]
        rows.append(
            (
                *names,
                f"{record['tflops']:.0f}",
                f"{batched['tflops']:.0f}" if "tflops" in batched else "",
                f"{record['ratio']:.3f}" if "ratio" in record else "",
            )
        )
    head = "", "M, K, N, E", "operation", "pallas_kernels", "cuBLAS", "of cuBLAS"
    return [table(head, rows, 3), *_failures(content["records"])]


def _routing_tables(content: Record) -> list[str]:
    on_gpu = content["hardware"].get("platform") == "gpu"
    return [routing_table(content["records"], with_times=on_gpu).markdown(), *_failures(content["records"])]


def _train_step_tables(content: Record) -> list[str]:
    rows = []
    for record in content["records"]:
        layers = f"{record.get('num_layers', '')}{'' if record.get('scan_layers', True) else ', unscanned'}"
        setting = ", ".join(filter(None, (record["setting"], record.get("mesh"))))
        names = setting, record.get("preset", ""), layers, record.get("remat", "")
        if "failure" in record:
            rows.append((*names, "", *"----"))
            continue
        peak = record["peak_gib"]
        rows.append(
            (
                *names,
                f"{record['batch_size']} x {record['sequence_length']}",
                f"{record['tokens_per_second']:,.0f}",
                f"{1e3 * record['seconds_median']:.1f}",
                f"{record['model_tflops']:.0f}",
                "" if peak is None else f"{peak:.1f}",
            )
        )
    head = "", "model", "layers", "remat", "batch", "tokens/s", "ms", "model TFLOP/s", "peak GiB"
    parts = [table(head, rows, 5), *_failures(content["records"])]
    if content["hardware"]["device"] == peers.DEVICE:
        others = [(name, f"{step.tokens_per_second:,}", f"{step.peak_gib:.1f}") for name, step in peers.STEPS.items()]
        parts += [prose.BESIDE_STEPS, table(("", "tokens/s", "peak GiB"), others, 1)]
    return parts


def _scaling_tables(content: Record) -> list[str]:
    settings = ", ".join(f"`{name}={value}`" for name, value in content["settings"].items())
    parts = [f"{content['num_devices']} devices{f', with {settings}' if settings else ''}.\n"]
    for title, shown in tables.scaling_tables(content["records"]).items():
        parts += [f"{title}:\n", shown.markdown()]
    if failures := tables.failures(content["records"]):
        parts += ["Without figures:\n", "".join(f"- `{failure}`\n" for failure in failures)]
    return parts


def _simulation_tables(content: Record) -> list[str]:
    parts = []
    for what in ("sources", "assumptions"):
        parts += [f"{what.capitalize()}:\n", "".join(f"- {line}\n" for line in content[what])]
    for title, shown in tables.simulation_tables(content["records"]).items():
        parts += [f"{title}:\n", shown.markdown()]
    parts.append(f"![Speed and time of a step against the number of GPUs]({image_path(content).as_posix()})\n")
    validation = tables.validation_table(content["records"])
    return [
        *parts,
        *(["Predicted and measured:\n", validation.markdown()] if validation else [tables.NOT_VALIDATED + "\n"]),
    ]


def _layer_order(record: Record) -> tuple[int, bool, str, int]:
    name, implementation = record["configuration"], record["implementation"]
    return _place(name), implementation != "jmoe", implementation, ROUTINGS.index(record["routing"])


def _place(name: str) -> int:
    return list(CONFIGURATIONS).index(name)


def _implementation(record: Record) -> str:
    return " ".join(filter(None, (record["implementation"], record.get("peer_version"))))


def _error(record: Record) -> str:
    plain = record.get("plain_relative_error", {})
    # That of the logits is zero where K = 1.
    ratios = [error / plain[name] for name, error in record["relative_error"].items() if plain.get(name)]
    return f"{max(ratios):.2f}" if ratios else ""


def _is_timed(records: Sequence[Record]) -> bool:
    return any("failure" not in record for record in records)


def _failures(records: Sequence[Record]) -> list[str]:
    lines = []
    for record in records:
        if "failure" in record:
            keys = "setting", "configuration", "routing", "operation", "implementation"
            names = ", ".join(record[key] for key in keys if key in record)
            lines.append(f"- {names}: `{record['failure']}`\n")
    return ["Without figures:\n", "".join(lines)] if lines else []


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program."""
    parser = argparse.ArgumentParser("python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the page")
    options = parser.parse_args(arguments)
    contents = newest(options.results)
    for content in contents:
        if content["program"] == "layer" and timed_with_random_routing(content["records"]):
            plot_layers(content["records"], content["hardware"]["device"], options.docs / image_path(content))
        if content["program"] == "experts" and by_number_of_experts(content["records"]):
            plot_experts(content["records"], content["hardware"]["device"], options.docs / image_path(content))
        if content["program"] == "generation" and _is_timed(content["records"]):
            plot_generation(content["records"], content["hardware"]["device"], options.docs / image_path(content))
        if content["program"] == "simulate":
            plot_simulation(content["records"], options.docs / image_path(content))
    page = options.docs / "performance.md"
    page.write_text(make_page(contents), encoding="utf-8")
    print(f"Written to {page}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
