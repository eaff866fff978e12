"""Timing of functions that compete on one device, in rounds: all of them meet the same clocks and heat."""

import dataclasses
import math
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

REST_SECONDS = 0.03
FILL_SECONDS = 0.015
_MAX_CALLS = 1000


@dataclasses.dataclass(frozen=True)
class Variant:
    """A function to time.

    Attributes:
        run: Starts the computation and returns its result, which may still be under way.
        wait: Waits for a result.
    """

    run: Callable[[], Any]
    wait: Callable[[Any], object]


def time_in_rounds[Key](
    variants: Mapping[Key, Variant], *, rounds: int, seed: int
) -> tuple[dict[Key, list[float]], dict[Key, Exception]]:
    """Times each variant once in every round, in an order that is random in each.

    A turn is a rest of 30 ms, one untimed call, and as many calls in a row as fill about 15 ms, timed
    together.
    A variant must have run before, so that nothing is left to compile.

    Args:
        variants: What to time.
        rounds: How often.
        seed: Of the orders.

    Returns:
        The seconds of one call, for each round; and in place of that the error for variants that failed.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in variants}
    failures: dict[Key, Exception] = {}
    calls: dict[Key, int] = {}
    shuffle = random.Random(seed).shuffle
    for _ in range(rounds):
        order = [key for key in variants if key not in failures]
        shuffle(order)
        for key in order:
            time.sleep(REST_SECONDS)
            try:
                if key not in calls:
                    # Twice, since the first calls may have to ask the device for memory.
                    estimate = min(_seconds_per_call(variants[key], 3) for _ in range(2))
                    estimate = max(estimate, FILL_SECONDS / _MAX_CALLS)
                    calls[key] = math.ceil(FILL_SECONDS / estimate)
                _seconds_per_call(variants[key], 1)
                seconds[key].append(_seconds_per_call(variants[key], calls[key]))
            except Exception as error:
                failures[key] = error
                del seconds[key]
    return seconds, failures


def _seconds_per_call(variant: Variant, calls: int) -> float:
    start = time.perf_counter()
    result = None
    for _ in range(calls):
        result = variant.run()
    variant.wait(result)
    return (time.perf_counter() - start) / calls
