"""Shows the results of `python -m benchmarks.scaling`: on a terminal, and on the page of results."""

from collections.abc import Sequence

from rich.console import Console

from benchmarks.markdown import Table
from benchmarks.record import Record
from benchmarks.scaling.layer import ONE_DEVICE, RAGGED

_PARTS = ("experts", "other", "update", "exchange", "weights", "gradients")


def scaling_tables(records: Sequence[Record]) -> dict[str, Table]:
    """Makes the tables of measurements, by title; only those with figures."""
    timed = [record for record in records if "failure" not in record]
    tables = {
        "Layers, forward and backward": _layers([record for record in timed if record["part"] == "layer"]),
        "Training steps": _steps([record for record in timed if record["part"] == "step"]),
        "The deepest model": _memory([record for record in timed if record["part"] == "memory"]),
        "Links, GB/s that each device sends": _links([record for record in timed if record["part"] == "links"]),
    }
    return {title: table for title, table in tables.items() if table.rows}


def failures(records: Sequence[Record]) -> list[str]:
    """Says what has no figures, and why."""
    keys = "task", "exchange", "placement", "collective"
    return [
        f"{', '.join(str(record[key]) for key in keys if key in record)}: {record['failure']}"
        for record in records
        if "failure" in record
    ]


def show(records: Sequence[Record], title: str, console: Console) -> None:
    """Prints measurements."""
    console.print(title)
    for name, table in scaling_tables(records).items():
        console.print(table.terminal(f"\n{name}"))
    for failure in failures(records):
        console.print(failure, markup=False)


def _layers(records: Sequence[Record]) -> Table:
    ragged = {
        (record["configuration"], record["routing"]): record["both"]["ms_median"]
        for record in records
        if record["exchange"] == RAGGED
    }
    rows = []
    for record in records:
        baseline = ragged.get((record["configuration"], record["routing"]))
        is_alone = record["exchange"] == ONE_DEVICE
        exchange = record["exchange"] + (" (auto)" if record.get("auto") else "")
        rows.append(
            (
                record["configuration"],
                record["routing"],
                record.get("placement", ""),
                exchange,
                f"{record['forward']['tflops']:.3g}",
                f"{record['both']['tflops']:.3g}",
                f"{record['both']['of_one_device']:.3f}" if "of_one_device" in record["both"] else "",
                "" if is_alone else f"{record['fullest_device']:.3f}",
                "" if is_alone or not baseline else f"{baseline / record['both']['ms_median']:.1f}",
            )
        )
    head = "", "routing", "placement", "exchange", "forward", "both", "of one device", "fullest", "of ragged"
    return Table(head, rows, 4)


def _steps(records: Sequence[Record]) -> Table:
    rows = []
    for record in records:
        peak = record["peak_gib"]
        rows.append(
            (
                record["mesh"] or ONE_DEVICE,
                f"{record['preset']}, {record['num_layers']} layers",
                f"{record['batch_size']} x {record['sequence_length']}",
                f"{record['tokens_per_second']:,.0f}",
                f"{1e3 * record['seconds_median']:.1f}",
                f"{record['of_one_device']:.3f}" if "of_one_device" in record else "",
                "" if peak is None else f"{peak:.1f}",
            )
        )
    return Table(("mesh", "model", "batch of each", "tokens/s", "ms", "of one device", "peak GiB"), rows, 3)


def _memory(records: Sequence[Record]) -> Table:
    alone = next((record["parameters"] for record in records if not record["mesh"]), None)
    rows = [
        (
            record["mesh"] or ONE_DEVICE,
            record["setting"],
            str(record["num_layers"]),
            f"{record['parameters'] / 1e9:.3g}",
            f"{record['planned_gib']:.1f} of {record['limit_gib']:.1f}",
            f"{record['parameters'] / alone:.2f}" if alone and record["mesh"] else "",
        )
        for record in records
    ]
    return Table(("mesh", "", "layers", "10^9 parameters", "planned GiB", "of one device"), rows, 2)


def _links(records: Sequence[Record]) -> Table:
    sizes = sorted({record["mib"] for record in records})
    rows = []
    for collective in dict.fromkeys(record["collective"] for record in records):
        of_size = {record["mib"]: record for record in records if record["collective"] == collective}
        cells = [f"{of_size[mib]['gb_per_s']:.3g}" if mib in of_size else "" for mib in sizes]
        least = of_size[min(of_size)]["ms_median"]
        rows.append((collective, *cells, f"{1e3 * least:.0f}"))
    return Table(("", *(f"{mib:g} MiB" for mib in sizes), "us of the least"), rows, 1)


def simulation_tables(records: Sequence[Record]) -> dict[str, Table]:
    """Makes the tables of predictions, by title: the best mesh for each number of GPUs of each model."""
    models: dict[str, list[Record]] = {}
    for record in records:
        if record["kind"] == "prediction" and record["best"]:
            models.setdefault(title_of(record), []).append(record)
    head = "GPUs", "data x fsdp x expert", "exchange", *_PARTS, "ms", "GiB", "tokens/s", "of one GPU"
    return {
        title: Table(
            head,
            [
                (
                    f"{record['num_devices']:,}",
                    f"{record['data']} x {record['fsdp']} x {record['expert']}",
                    record["exchange"],
                    *(f"{1e3 * record['parts'][part]:.1f}" for part in _PARTS),
                    f"{1e3 * record['seconds']:.1f}",
                    f"{record['gib']:.0f}{'' if record['fits'] else ', too much'}",
                    f"{record['tokens_per_second']:,.0f}",
                    f"{record['efficiency']:.3f}",
                )
                for record in of_model
            ],
            3,
        )
        for title, of_model in models.items()
    }


def validation_table(records: Sequence[Record]) -> Table | None:
    """Makes the table of predictions beside measurements, if there are any."""
    rows = [
        (
            record["what"],
            f"{record['num_devices']} x {record['device']}",
            f"{record['measured_ms']:.2f}",
            f"{record['predicted_ms']:.2f}",
            f"{record['error']:+.1%}",
        )
        for record in records
        if record["kind"] == "validation"
    ]
    return Table(("", "devices", "measured, ms", "predicted, ms", "error"), rows, 2) if rows else None


def title_of(record: Record) -> str:
    """Names the model of a prediction."""
    batch = f"{record['batch_size']} x {record['sequence_length']} tokens on each GPU"
    return f"{record['preset']}, {record['num_layers']} layers, {record['setting']}, {batch}"


def show_simulation(content: Record, console: Console) -> None:
    """Prints predictions, what they rest on, and how they compare with measurements."""
    for what in ("sources", "assumptions"):
        console.print(f"{what}:")
        for line in content[what]:
            console.print(f"  {line}", markup=False)
    for title, table in simulation_tables(content["records"]).items():
        console.print(table.terminal(f"\n{title}"))
    table = validation_table(content["records"])
    console.print(table.terminal("\nPredicted and measured") if table else NOT_VALIDATED)


NOT_VALIDATED = "No step on several GPUs has been measured yet, so nothing here has been compared with one."
