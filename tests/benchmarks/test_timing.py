import time

import pytest

from benchmarks.timing import Variant, summarize, time_in_rounds


def _sleeper(seconds, log, name):
    def run():
        log.append(name)
        time.sleep(seconds)

    return Variant(run, lambda _: None)


def test_each_round_gives_every_variant_one_turn_that_is_long_enough():
    log = []
    variants = {"slow": _sleeper(0.02, log, "slow"), "fast": _sleeper(0.004, log, "fast")}
    seconds, failures = time_in_rounds(variants, rounds=3, seed=0)
    assert not failures
    assert {name: len(timings) for name, timings in seconds.items()} == {"slow": 3, "fast": 3}
    assert all(timing >= 0.02 for timing in seconds["slow"])
    assert all(timing >= 0.004 for timing in seconds["fast"])
    # In the first turn six calls for the estimate; in each an untimed call and as many as fill 15 ms.
    assert log.count("slow") == 6 + 3 * 2
    assert 6 + 3 * 2 < log.count("fast") <= 6 + 3 * 5


def test_a_variant_that_fails_is_left_out_and_the_others_go_on():
    calls = []

    def fail_at_last():
        calls.append(0)
        if len(calls) > 8:
            raise RuntimeError("lost the device")
        time.sleep(0.02)

    variants = {"failing": Variant(fail_at_last, lambda _: None), "fine": _sleeper(0.02, [], "fine")}
    seconds, failures = time_in_rounds(variants, rounds=4, seed=1)
    assert failures == {"failing": "RuntimeError: lost the device"}
    assert seconds.keys() == {"fine"}
    assert len(seconds["fine"]) == 4
    assert len(calls) == 9


def test_the_summary_is_of_the_median():
    summary = summarize([0.004, 0.001, 0.002], flops=4 * 10**9)
    assert summary["ms_median"] == pytest.approx(2.0)
    assert (summary["ms_min"], summary["ms_max"]) == (pytest.approx(1.0), pytest.approx(4.0))
    assert summary["spread"] == pytest.approx(1.5)
    assert summary["tflops"] == pytest.approx(2.0)
