"""What runs that differ in the seed have in common, and how far they are apart."""

import json
import statistics
from collections.abc import Sequence

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
