"""Time against the number of experts, beside what compute and the traffic of the weights allow."""

from collections.abc import Mapping, Sequence

from benchmarks.layers import EXPERT_SWEEP
from benchmarks.record import Record

# Forward reads the weights; backward reads them once more and writes their gradients.
_WEIGHT_PASSES = {"forward": 1, "both": 3}


def by_number_of_experts(records: Sequence[Record]) -> dict[str, dict[int, Record]]:
    """Orders the timed records of the sweep with random routing by implementation, jmoe first, and by experts."""
    timed = [
        record
        for record in records
        if record["configuration"] in EXPERT_SWEEP and record["routing"] == "random" and "failure" not in record
    ]
    timed.sort(key=lambda record: (record["implementation"] != "jmoe", record["implementation"], record["E"]))
    ordered: dict[str, dict[int, Record]] = {}
    for record in timed:
        ordered.setdefault(record["implementation"], {})[record["E"]] = record
    return ordered


def bounds_ms(by_experts: Mapping[int, Record], operation: str) -> dict[int, float]:
    """What "forward" or "both" would take if experts cost nothing, or their weights' traffic did not hide.

    That is the time at the speed of the fewest experts, or that in which the device copies as many bytes as the
    weights' passes have, if that was measured and is longer.
    """
    if not by_experts:
        return {}
    speed = by_experts[min(by_experts)][operation]["tflops"]
    # The largest copy, for the device's cache holds much of a small one.
    rate = by_experts[max(by_experts)].get("copy_gb_per_s")
    bounds = {}
    for E, record in by_experts.items():
        configuration = EXPERT_SWEEP[record["configuration"]]
        compute = configuration.flops(operation) / speed / 1e9
        traffic = _WEIGHT_PASSES[operation] * configuration.weight_bytes / rate / 1e6 if rate else 0
        bounds[E] = max(compute, traffic)
    return bounds
