"""What runs that differ in the seed have in common, and how far they are apart."""

import json
import statistics
from collections.abc import Sequence

from benchmarks.markdown import Table
from benchmarks.record import Record


def joined_over_seeds(records: Sequence[Record], spread_of: str) -> list[Record]:
    """Joins the records of one setting, asked for with the same values.

    Args:
        records: Each has "setting", "asked" and "seed"; those that failed are left out.
        spread_of: The field whose smallest and largest value are kept, as "spread".

    Returns:
        For each setting the first seed's record with the mean of every float, and with "seeds", their number.
    """
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if "failure" not in record:
            groups.setdefault((record["setting"], json.dumps(record["asked"], sort_keys=True)), []).append(record)
    joined = []
    for group in groups.values():
        means = {
            name: statistics.fmean(record[name] for record in group)
            for name, value in group[0].items()
            if isinstance(value, float)
        }
        values = [record[spread_of] for record in group]
        joined.append(group[0] | means | {"spread": (min(values), max(values)), "seeds": len(group)})
    return joined


def routing_table(records: Sequence[Record], *, with_times: bool) -> Table:
    """Makes a table of the records of `python -m benchmarks.routing`: means over seeds, extremes of the loss."""
    rows = []
    for record in joined_over_seeds(records, "validation_top_k"):
        low, high = record["spread"]
        rows.append(
            (
                record["setting"].replace("_", " "),
                record["preset"],
                f"{record['num_experts']}, {record['top_k']}",
                f"{record['batch_size']} x {record['sequence_length']}",
                f"{record['steps']:,}",
                str(record["block_rows"]),
                f"{1e3 * record['seconds_median']:.1f}" if with_times else "",
                f"{record['dropped_fraction']:.1%}",
                f"{record['padded_share']:.1%}",
                f"{record['experts_per_token']:.3f}",
                f"{record['validation']:.3f}",
                f"{record['validation_top_k']:.3f} ({low:.3f} to {high:.3f})",
                str(record["seeds"]),
            )
        )
    head = (
        "",
        "model",
        "E, K",
        "batch",
        "steps",
        "block",
        "ms",
        "dropped",
        "padded",
        "experts",
        "loss",
        "by top-k",
        "seeds",
    )
    return Table(head, rows, 4)
