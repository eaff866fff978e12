"""What the benchmarks make of timings: medians, extremes and speeds; and descriptions of what failed."""

import statistics
from collections.abc import Mapping

from benchmarks.record import Record, describe_failure
from pallas_kernels import timing
from pallas_kernels.timing import FILL_SECONDS, REST_SECONDS, Variant

__all__ = ["FILL_SECONDS", "REST_SECONDS", "Variant", "summarize", "time_in_rounds"]


def time_in_rounds[Key](
    variants: Mapping[Key, Variant], *, rounds: int, seed: int
) -> tuple[dict[Key, list[float]], dict[Key, str]]:
    """Times variants as `pallas_kernels.timing.time_in_rounds` does, and describes the failures."""
    seconds, failures = timing.time_in_rounds(variants, rounds=rounds, seed=seed)
    return seconds, {key: describe_failure(error) for key, error in failures.items()}


def summarize(seconds: list[float], flops: int) -> Record:
    """The median, extremes and spread of some timings of `flops` floating-point operations, and TFLOP/s."""
    median = statistics.median(seconds)
    return {
        "ms_median": 1e3 * median,
        "ms_min": 1e3 * min(seconds),
        "ms_max": 1e3 * max(seconds),
        "spread": (max(seconds) - min(seconds)) / median,
        "tflops": flops / median / 1e12,
    }
