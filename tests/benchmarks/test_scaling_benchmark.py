import argparse
import dataclasses
import functools
import json
import math
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from benchmarks.layers import CONFIGURATIONS, Configuration, draw_logits
from benchmarks.scaling import __main__ as scaling
from benchmarks.scaling import layer as scaling_layer
from benchmarks.scaling.layer import (
    EXCHANGES,
    ONE_DEVICE,
    RAGGED,
    Placement,
    ScaledLayer,
    measure_layer,
    placements,
    sharded_ragged_layer,
)
from benchmarks.scaling.links import COLLECTIVES, measure_links
from benchmarks.scaling.memory import CompiledStep, DeepModel, measure_memory
from benchmarks.scaling.ragged import rows_received
from benchmarks.scaling.step import compare_steps, step_meshes
from benchmarks.scaling.tasks import Task, make_tasks
from benchmarks.train_step import Workload


def in_terms_of_all_gather(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What `jax.lax.ragged_all_to_all` does; XLA's CPU has none."""
    shard = lax.axis_index(axis_name)
    operands, *plans = (
        lax.all_gather(array, axis_name) for array in (operand, input_offsets, send_sizes, output_offsets)
    )
    row = jnp.arange(len(output))
    for sender in range(lax.axis_size(axis_name)):
        source, size, target = (plan[sender, shard] for plan in plans)
        place = row - target
        rows = operands[sender].at[source + place].get(mode="fill", fill_value=0)
        output = jnp.where(((place >= 0) & (place < size))[:, None], rows, output)
    return output


SMALL = Configuration("small", T=16, D=16, F=8, E=8, K=2)


@pytest.fixture(scope="module")
def layer():
    return ScaledLayer(SMALL, seed=0)


def logits_of(routing):
    return draw_logits(dataclasses.replace(SMALL, T=8 * SMALL.T), routing, 0)


@pytest.mark.parametrize("exchanges", [("gather",), pytest.param(EXCHANGES, marks=pytest.mark.exhaustive)], ids=len)
def test_a_layer_is_compared_with_one_device_and_timed(exchanges, layer, monkeypatch):
    monkeypatch.setitem(CONFIGURATIONS, "small", SMALL)
    monkeypatch.setattr(scaling_layer, "_prepared", lambda name, seed: layer)
    # XLA's CPU has no ragged_all_to_all: that fails alone.
    placement = Placement("contiguous", np.arange(8), 1.5, (*exchanges, RAGGED))
    monkeypatch.setattr(scaling_layer, "placements", lambda *_: [placement])
    one, *others, ragged = measure_layer("small", "zipf", rounds=1, seed=0)
    assert one["exchange"] == ONE_DEVICE
    assert "ragged" in ragged["failure"]
    assert [record["exchange"] for record in others] == list(exchanges)
    for record in others:
        assert "failure" not in record
        assert max(record["relative_error"].values()) < 2e-2
        assert record["auto"] == (record["exchange"] == "all_to_all")  # 8 devices, K is 2
        assert record["fullest_device"] == 1.5
        ratio = one["both"]["ms_median"] / record["both"]["ms_median"]
        assert record["both"]["of_one_device"] == pytest.approx(ratio)
    json.dumps(others)
    # Experts that are not where they are said to be give other results.
    logits, order = logits_of("zipf"), np.roll(np.arange(8), 1)
    wrong = layer.errors(("gather", "contiguous"), layer.operands(logits, order), order, layer.expected(logits))
    assert min(wrong.values()) > 0.1


def test_plans_are_measured_beside_contiguous_experts():
    contiguous, planned, replicated = placements(np.array([9, 2, 1, 0]), 2, "ring")
    assert contiguous.order.tolist() == [0, 1, 2, 3]
    assert (contiguous.fullest, contiguous.exchanges) == (pytest.approx(11 / 6), EXCHANGES)
    assert planned.fullest == pytest.approx(9 / 6)  # the hottest expert beside the idle one
    assert tuple(planned.order.tolist()) == planned.options["expert_placement"].order == (0, 3, 1, 2)
    assert replicated.options["expert_placement"].num_replicas == 1
    assert replicated.fullest < planned.fullest
    assert planned.exchanges == replicated.exchanges == ("ring",)
    assert [placement.name for placement in placements(np.ones(4), 2, "ring")] == ["contiguous", "planned"]


def test_a_plan_gives_the_results_of_contiguous_experts(layer):
    logits = logits_of("zipf")
    load = np.bincount(np.argsort(logits, axis=1)[:, -2:].ravel(), minlength=8)
    plan = placements(load, 8, "gather")[-1]
    layer.compile(plan, max_rows=0)
    operands = layer.operands(logits, plan.order)
    errors = layer.errors(("gather", plan.name), operands, plan.order, layer.expected(logits))
    assert max(errors.values()) < 2e-2


@pytest.mark.parametrize("routing", ["zipf", pytest.param("random", marks=pytest.mark.exhaustive)])
def test_the_ragged_baseline_computes_the_layer(routing, layer, monkeypatch):
    logits = logits_of(routing)
    max_rows = rows_received(np.argsort(logits, axis=1)[:, -2:], 8, 8)
    assert max_rows >= SMALL.T * SMALL.K
    of_devices = functools.partial(sharded_ragged_layer, ragged_all_to_all=in_terms_of_all_gather)
    monkeypatch.setattr(scaling_layer, "sharded_ragged_layer", of_devices)
    placement = Placement("contiguous", np.arange(8), 1.0, (RAGGED,))
    layer.compile(placement, max_rows=max_rows)
    operands = layer.operands(logits, placement.order)
    errors = layer.errors((RAGGED, "contiguous"), operands, placement.order, layer.expected(logits))
    assert max(errors.values()) < 2e-2


def test_links_are_checked_and_timed():
    records = measure_links(rounds=1, seed=0)
    assert [record["collective"] for record in records] == list(COLLECTIVES)
    assert not [record for record in records if "failure" in record]
    by_name = {record["collective"]: record for record in records}
    bytes_of_each = by_name["ppermute"]["bytes_sent"]
    assert bytes_of_each == 2**16
    assert by_name["all_gather"]["bytes_sent"] == 7 * bytes_of_each
    assert by_name["psum_scatter"]["bytes_sent"] == by_name["all_to_all"]["bytes_sent"] == 7 * bytes_of_each // 8
    for record in records:
        assert record["gb_per_s"] == pytest.approx(record["bytes_sent"] / record["ms_median"] / 1e6)


def test_a_collective_that_loses_rows_fails(monkeypatch):
    wrong = COLLECTIVES["psum"]._replace(run=lambda rows: rows)
    monkeypatch.setattr("benchmarks.scaling.links.COLLECTIVES", {"psum": wrong})
    [record] = measure_links(rounds=1, seed=0)
    assert record["failure"] == "ArithmeticError: the devices got other rows than they were sent"


TINY = Workload(preset="tiny", num_layers=1, batch_size=1, sequence_length=16)


@pytest.mark.exhaustive
def test_the_deepest_model_is_trained():
    record = measure_memory(TINY, "program", limit_gib=0.06)
    assert "failure" not in record
    assert record["planned_gib"] <= 0.06
    assert record["num_layers"] > 4


def _search(monkeypatch, plan, runs=lambda layers: None):
    def prepare(self, layers):
        return CompiledStep(layers, 100 * layers, plan(layers), functools.partial(runs, layers))

    monkeypatch.setattr(DeepModel, "prepare", prepare)
    return measure_memory(TINY, "program", limit_gib=10.0)


def test_the_deepest_model_is_found_by_plans_that_are_nearly_straight(monkeypatch):
    record = _search(monkeypatch, lambda layers: 1 + 0.9 * layers)
    assert (record["num_layers"], record["parameters"], record["plans"].keys()) == (10, 1000, {"2", "4", "10"})
    record = _search(monkeypatch, lambda layers: 1 + 0.9 * min(layers, 4) + 0.5 * max(layers - 4, 0))
    assert record["num_layers"] == 14
    record = _search(monkeypatch, lambda layers: 1 + 0.9 * min(layers, 9) + 0.95 * max(layers - 9, 0))
    assert record["num_layers"] == 9
    record = _search(monkeypatch, lambda layers: 1 + 0.9 * layers + (0.5 if layers > 9 else 0))
    assert (record["num_layers"], record["too_deep"].keys()) == (9, {"10"})


def test_a_model_that_the_device_has_no_room_for_is_too_deep(monkeypatch):
    def runs(layers):
        if layers > 9:
            raise MemoryError("no room")

    record = _search(monkeypatch, lambda layers: 1 + 0.9 * layers, runs)
    assert (record["num_layers"], record["too_deep"]) == (9, {"10": "out of memory: no room"})
    for least in (2, 4):  # of these, plans are made first
        assert _search(monkeypatch, lambda layers, least=least: 10 + (layers - least) / 10)["num_layers"] == least
    record = _search(monkeypatch, lambda layers: 11 + layers)
    assert record["failure"].startswith("out of memory: nothing fits into 10.00 GiB")


def _step(mesh, seconds, losses, **more):
    shape = {"preset": "tiny", "num_layers": 1, "batch_size": 1, "sequence_length": 8, "remat": "none"}
    shape |= {"setting": "bf16", "scan_layers": False, "mesh": mesh, "part": "step"}
    return shape | {"seconds_median": seconds, "cross_entropies": losses} | more


def test_steps_are_compared_with_one_device():
    good, bad = _step("data=2", 2.5, [6.0, 5.01, 4.05]), _step("data=2", 2.5, [6.0, 5.0, 4.5])
    # With others nothing is to be compared.
    others = [
        _step("data=2", 2.5, [6.0, 5.0, 4.0], num_layers=2),
        {"part": "step", "failure": "its process died"},
        {"part": "links"},
    ]
    one = _step("", 2.0, [6.0, 5.0, 4.0])  # measured last, as where its first try failed
    compared = compare_steps([good, bad, *others, one])
    assert compared[0]["of_one_device"] == 0.8
    assert "on one device [6.0, 5.0, 4.0]" in compared[1]["failure"]
    assert compared[2:] == [*others, one]


def test_meshes_are_of_all_devices():
    assert step_meshes(2) == {"one": "", "expert": "expert=2", "data": "data=2", "fsdp": "fsdp=2"}
    assert step_meshes(8)["data-expert"] == "data=2,expert=4"


def _options(**options):
    fixed = {"rounds": 1, "seed": 0, "steps": 1, "setting": "bf16", "scan_layers": False, "memory_gib": None}
    return argparse.Namespace(**fixed | options)


def test_the_most_important_is_measured_first():
    tasks = list(make_tasks(_options(), "gpu", 2))
    assert tasks[:2] == ["layer-olmoe-random", "layer-olmoe-zipf"]
    assert tasks.index("step-one") < tasks.index("step-expert") < tasks.index("memory-one")


def test_the_program_keeps_each_result_and_measures_again_what_failed(monkeypatch, tmp_path, capsys):
    measured = []

    def task(name, group, *, fails=False):
        def measure():
            measured.append(name)
            if fails and measured.count(name) == 1:
                raise ValueError("no luck")
            if group == "step":
                mesh = "" if name == "step-one" else "data=8"
                steps = {"tokens_per_second": 8.0, "peak_gib": None}
                return [_step(mesh, 1.0, [6.0, 5.0, 4.0]) | steps]
            return [
                {"collective": "psum", "mib": 1, "bytes_sent": 10, "num_devices": 8, "ms_median": 1.0, "gb_per_s": 1e-5}
            ]

        return Task(name, group, measure)

    tasks = [task("links", "links", fails=True), task("other", "other")]
    tasks += [task("step-one", "step"), task("step-data", "step")]
    monkeypatch.setattr(scaling, "make_tasks", lambda *_: {task.name: task for task in tasks})
    monkeypatch.setattr(scaling, "new_process", lambda: ThreadPoolExecutor(1))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    file = tmp_path / "results.json"
    assert scaling.main(["--out", str(file)]) == 1
    content = json.loads(file.read_text())
    assert content["num_devices"] == 8
    assert content["settings"]["NCCL_DEBUG"] == "WARN"
    assert "--xla_force_host_platform_device_count=8" in content["settings"]["XLA_FLAGS"]
    failed, other, one, data = content["records"]
    assert failed == {"task": "links", "part": "links", "failure": "ValueError: no luck"}
    assert (one["part"], data["of_one_device"]) == ("step", 1.0)
    assert "no luck" in capsys.readouterr().out

    # What is not chosen stays as it is, even if it failed.
    assert scaling.main(["--out", str(file), "--resume", "--only", "other"]) == 1
    assert json.loads(file.read_text())["records"] == content["records"]
    assert scaling.main(["--out", str(file), "--resume", "--only", "links"]) == 0
    assert measured == ["links", "other", "step-one", "step-data", "links"]
    with pytest.raises(SystemExit):  # other steps are another measurement
        scaling.main(["--out", str(file), "--resume", "--steps", "3"])
    *others, links = json.loads(file.read_text())["records"]
    assert others == [other, one, data]
    assert math.isclose(links["gb_per_s"], 1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--only", "speed"], "there is no 'speed'; there are layer-tiny-random"),
        (["--memory-gib", "nan"], "--memory-gib must be a number above 0, got nan"),
        (["--memory-gib", "0"], "--memory-gib must be a number above 0, got 0.0"),
    ],
)
def test_a_bad_argument_is_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "new_process", lambda: ThreadPoolExecutor(1))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    with pytest.raises(SystemExit):
        scaling.main(arguments)
    assert message in capsys.readouterr().err
