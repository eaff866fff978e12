import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from benchmarks import report
from benchmarks.scaling import __main__ as scaling
from benchmarks.scaling import simulate
from benchmarks.scaling.calibrate import calibrate, devices, links, model_of, validate
from benchmarks.scaling.time_model import (
    ONE,
    Group,
    Job,
    Link,
    Mesh,
    Network,
    Speeds,
    chunk,
    fullest_device,
    layer_seconds,
    meshes,
    step_gib,
    step_seconds,
)
from jmoe.exchanges import AllToAll
from jmoe.local_mlp import mlp_options
from jmoe.models import PRESETS

GB = 1e9
FLAT = Network({"": Link(100 * GB, 0.0)}, Link(10 * GB, 0.0), node_size=8)
SPEEDS = Speeds(forward=500e12, backward=500e12, other=200e12, dense=800e12, copy=3e12)
OLMOE = Job(PRESETS["olmoe_1b_7b"], batch_size=4, sequence_length=4096)


def test_a_node_takes_what_others_send_it_once():
    inside, across, lone = Group(8, 8), Group(16, 8), Group(16, 1)
    # Bytes that each device puts in, over the rate; between nodes each device brings its share of the node's part.
    assert FLAT.seconds("all_gather", GB, inside) == pytest.approx(7 / 100)
    assert FLAT.seconds("all_gather", GB, across) == pytest.approx(max(15 / 100, 8 / 8 / 10))
    assert FLAT.seconds("all_gather", GB, lone) == pytest.approx(15 / 10)
    assert FLAT.seconds("psum_scatter", 8 * GB, inside) == pytest.approx(7 / 100)
    assert FLAT.seconds("psum", 8 * GB, inside) == pytest.approx(14 / 100)
    assert FLAT.seconds("psum", 16 * GB, across) == pytest.approx(30 / 100)
    assert FLAT.seconds("psum", 16 * GB, lone) == pytest.approx(30 / 10)
    # Every pair has something else to say to each other.
    assert FLAT.seconds("all_to_all", 16 * GB, across) == pytest.approx(8 / 10)
    assert FLAT.seconds("ppermute", GB, inside) == pytest.approx(1 / 100)
    assert FLAT.seconds("ppermute", GB, across) == pytest.approx(1 / 10)
    assert FLAT.seconds("psum", GB, Group(1, 1)) == 0


def test_latency_grows_with_each_doubling_and_is_that_of_the_slowest_link():
    network = Network({"": Link(math.inf, 1.0), "psum": Link(math.inf, 2.0)}, Link(math.inf, 5.0), 8)
    assert network.seconds("all_gather", 1, Group(8, 8)) == 3
    assert network.seconds("psum", 1, Group(8, 8)) == 6
    assert network.seconds("all_gather", 1, Group(32, 8)) == 25
    assert network.seconds("ppermute", 1, Group(32, 8)) == 5


def test_devices_next_to_each_other_differ_in_expert_then_fsdp():
    mesh = Mesh(data=4, fsdp=4, expert=4)
    assert mesh.size == 64
    assert mesh.group(8, "expert") == (4, 4)
    assert mesh.group(8, "fsdp") == (4, 2)
    assert mesh.group(8, "data") == (4, 1)
    assert mesh.group(8, "data", "expert") == (16, 4)
    assert mesh.group(8, "fsdp", "expert") == (16, 8)
    # As JAX lays out devices that are numbered node by node.
    numbers = np.arange(64).reshape(mesh)
    for axes in (("expert",), ("fsdp",), ("data",), ("data", "expert"), ("data", "fsdp", "expert")):
        index = tuple(slice(None) if axis in axes else 0 for axis in Mesh._fields)
        members = numbers[index].ravel()
        assert mesh.group(8, *axes) == (members.size, np.sum(members // 8 == members[0] // 8))


def test_meshes_are_all_that_the_experts_allow():
    found = list(meshes(8, 4))
    assert len(set(found)) == len(found)
    assert set(found) == {
        Mesh(*sizes) for sizes in itertools.product((1, 2, 4, 8), repeat=3) if math.prod(sizes) == 8 and sizes[2] <= 4
    }


@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts", "num_devices"), [(64, 8, 64, 8), (256, 2, 16, 16)])
def test_the_fullest_device_is_that_of_random_routing(num_tokens, top_k, num_experts, num_devices):
    draw = np.random.default_rng(0)
    most = []
    for _ in range(200):
        logits = draw.standard_normal((num_devices * num_tokens, num_experts))
        device = np.argpartition(logits, -top_k, axis=1)[:, -top_k:] // (num_experts // num_devices)
        most.append(np.bincount(device.ravel(), minlength=num_devices).max() / (num_tokens * top_k))
    estimate = fullest_device(num_tokens, top_k, num_experts, num_devices)
    assert estimate - 1 == pytest.approx(np.mean(most) - 1, rel=0.1)
    assert fullest_device(num_tokens, top_k, num_experts, 1) == 1


@pytest.mark.parametrize(("num_experts", "num_devices", "top_k"), [(64, 8, 8), (64, 64, 8), (8, 2, 2), (16, 4, 1)])
def test_the_chunk_is_that_of_the_exchange(num_experts, num_devices, top_k):
    exchange = AllToAll(("expert",), mlp_options((8,), "swiglu", "output", False, None), num_experts)
    actual = exchange.chunk(4096, top_k, num_experts // num_devices)
    assert chunk(4096, top_k, num_experts, num_devices) == pytest.approx(actual, abs=8)


def test_exchanges_take_the_traffic_of_the_documentation():
    n, T, D = 8, OLMOE.num_tokens, 2048
    group, elements = Group(n, n), (n - 1) * T * D * 2
    fast = dataclasses.replace(SPEEDS, forward=1e30, backward=1e30)
    slow = dataclasses.replace(SPEEDS, forward=1e9, backward=1e9)
    for exchange, of_elements in (("gather", 4), ("ring", 5), ("all_to_all", 5 * chunk(T, 8, 64, n) / T)):
        seconds = layer_seconds(OLMOE, fast, FLAT, group, exchange, 1.0)["exchange"]
        assert seconds == pytest.approx(of_elements * elements / (100 * GB))
    # The last step of a pass takes the sums home, and hides behind nothing.
    hidden = layer_seconds(OLMOE, slow, FLAT, group, "ring", 1.0)["exchange"]
    assert hidden == pytest.approx(2 * T * D * 2 / (100 * GB))
    # All wait for the fullest device.
    one = layer_seconds(OLMOE, SPEEDS, FLAT, Group(1, 1), "ring", 1.0)
    assert one == {"experts": pytest.approx(3 * 6 * T * 8 * D * 1024 / 500e12), "exchange": 0.0}
    assert layer_seconds(OLMOE, SPEEDS, FLAT, group, "gather", 1.5)["experts"] == pytest.approx(1.5 * one["experts"])


def test_parameters_and_operations_are_those_of_the_model():
    assert OLMOE.expert_parameters == 16 * 64 * 3 * 2048 * 1024
    total = OLMOE.num_tokens * OLMOE.model.flops_per_token(4096)
    assert 16 * 3 * OLMOE.expert_flops + OLMOE.head_flops + OLMOE.other_flops == pytest.approx(total)
    assert OLMOE.local_parameters(ONE) == OLMOE.model.num_parameters
    others = OLMOE.model.num_parameters - OLMOE.expert_parameters
    assert OLMOE.local_parameters(Mesh(2, 2, 4)) == others / 2 + OLMOE.expert_parameters / 8


def test_axes_change_what_they_are_for():
    def parts(*mesh, job=OLMOE):
        return step_seconds(job, SPEEDS, FLAT, Mesh(*mesh), "all_to_all")

    one, data, fsdp, expert = parts(1, 1, 1), parts(8, 1, 1), parts(1, 8, 1), parts(1, 1, 8)
    assert one["exchange"] == one["weights"] == one["gradients"] == 0
    assert data["update"] == one["update"] == pytest.approx(8 * fsdp["update"])
    assert data["gradients"] == pytest.approx(2 * 7 / 8 * 2 * OLMOE.model.num_parameters / (100 * GB))
    # A reduce-scatter is half a sum; gathering the weights twice is the whole of one.
    assert fsdp["gradients"] == pytest.approx(data["gradients"] / 2)
    assert fsdp["weights"] == pytest.approx(data["gradients"])
    assert expert["exchange"] > 0 == fsdp["exchange"]
    assert expert["gradients"] < data["gradients"] / 5  # those of experts stay where they are
    hidden = parts(8, 1, 1, job=dataclasses.replace(OLMOE, overlap=1.0))
    assert hidden["gradients"] == pytest.approx(max(0, data["gradients"] - 2 / 3 * (data["experts"] + data["other"])))
    assert step_gib(OLMOE, ONE, "gather") == pytest.approx(16 * OLMOE.model.num_parameters / 2**30)
    assert step_gib(OLMOE, Mesh(1, 1, 8), "gather") > step_gib(OLMOE, Mesh(1, 1, 8), "ring")


def test_the_best_mesh_fits_and_is_the_fastest():
    records = list(simulate.simulate(OLMOE, SPEEDS, FLAT, 16, gpu_gib=72))
    assert [record["num_devices"] for record in records if record["best"]] == [1, 2, 4, 8, 16]
    for num_devices in (1, 2, 4, 8, 16):
        of_number = [record for record in records if record["num_devices"] == num_devices]
        assert all(r["data"] * r["fsdp"] * r["expert"] == num_devices for r in of_number)
        fitting = [record["seconds"] for record in of_number if record["fits"]]
        [best] = [record for record in of_number if record["best"]]
        assert best["seconds"] == min(fitting, default=best["seconds"])
    assert not records[0]["fits"]  # 110 GB of parameters, gradients and moments
    assert records[0]["efficiency"] == 1


# A device on which everything follows the model: calibrated on one device, it predicts several exactly.

DEVICE = "NVIDIA H200"
LINKS = {"all_gather": 300.0, "psum_scatter": 280.0, "all_to_all": 260.0, "ppermute": 200.0, "psum": 250.0}


def _timed(seconds, flops):
    return {"ms_median": 1e3 * seconds, "tflops": flops / seconds / 1e12}


def _content(program, records, device=DEVICE, **more):
    content = {"program": program, "date": "2026-01-02T00:00:00+00:00", "records": records, "file": f"{program}.json"}
    return content | {"hardware": {"device": device}, "versions": {"jax": "0.11.2"}, **more}


def _layer_record(job, **more):
    forward, both = job.expert_flops / SPEEDS.forward, job.expert_flops * (1 / SPEEDS.forward + 2 / SPEEDS.backward)
    shape = {"configuration": "olmoe", "T": job.num_tokens, "D": 2048, "F": 1024, "E": 64, "K": 8, "routing": "random"}
    times = {"forward": _timed(forward, job.expert_flops), "both": _timed(both, 3 * job.expert_flops)}
    return shape | times | more


def _step_record(job, seconds, **more):
    shape = {"setting": "bf16", "preset": "olmoe_1b_7b", "num_layers": 4, "batch_size": 4, "sequence_length": 4096}
    plan = {"planned_gib": 8 * job.model.num_parameters / 2**30 + 4, "parameters": job.model.num_parameters}
    speed = {"tokens_per_second": job.num_tokens / seconds, "peak_gib": 9.0}
    return shape | {"part": "step", "remat": "none", "seconds_median": seconds} | plan | speed | more


def _recorded(n=2):
    job = Job(model_of("olmoe_1b_7b", 4, "bf16"), 4, 4096)
    in_node = {name: Link(rate * GB, 0.0) for name, rate in LINKS.items()}
    network = Network(in_node, Link(GB, 0.0), n)
    layer_job = dataclasses.replace(job, batch_size=8)  # T 32768
    dense = {"dense": {"tflops": SPEEDS.dense / 1e12}, "copy_gb_per_s": SPEEDS.copy / 1e9}
    records = [_layer_record(layer_job, part="layer", exchange="one device", num_devices=n)]
    for exchange, fullest in itertools.product(("gather", "ring", "all_to_all"), (1.0, 1.6)):
        seconds = sum(layer_seconds(layer_job, SPEEDS, network, Group(n, n), exchange, fullest).values())
        placed = {"exchange": exchange, "placement": "contiguous", "num_devices": n, "fullest_device": fullest}
        both = _timed(seconds, 3 * layer_job.expert_flops) | {"of_one_device": 0.9}
        records.append(_layer_record(layer_job, part="layer", auto=exchange == "ring", **placed) | {"both": both})
    ragged = {"exchange": "ragged_all_to_all", "placement": "contiguous", "num_devices": n, "fullest_device": 1.0}
    records.append(
        _layer_record(layer_job, part="layer", auto=False, **ragged) | {"both": _timed(9, 1) | {"of_one_device": 0.1}}
    )
    for mesh, sizes in (
        ("", ONE),
        (f"expert={n}", Mesh(1, 1, n)),
        (f"data={n}", Mesh(n, 1, 1)),
        (f"fsdp={n}", Mesh(1, n, 1)),
    ):
        seconds = sum(step_seconds(job, SPEEDS, network, sizes, "ring").values())
        of_one = {"of_one_device": 0.95} if mesh else {}
        records.append(_step_record(job, seconds, mesh=mesh, **of_one))
    for name, rate in LINKS.items():
        link = {"part": "links", "collective": name, "num_devices": n, "gb_per_s": rate}
        records += [
            link | {"mib": mib, "bytes_sent": mib * 2**20, "ms_median": mib * 2**20 / rate / 1e6} for mib in (1, 128)
        ]
    memory = {"part": "memory", "setting": "program", "planned_gib": 120.0, "limit_gib": 130.0}
    records += [memory | {"mesh": "", "num_layers": 19, "parameters": 8_000_000_000}]
    records += [memory | {"mesh": "expert=2", "num_layers": 36, "parameters": 15_000_000_000}]
    records += [{"part": "step", "task": "step-fsdp", "failure": "out of memory: asks for much"}]
    scaling_content = _content("scaling", records, num_devices=n, settings={"XLA_FLAGS": "--a=b"})
    return scaling_content, _content("layer", [_layer_record(layer_job, implementation="jmoe", **dense)])


def test_a_device_that_follows_the_model_is_calibrated_and_predicted_exactly():
    contents = list(_recorded())
    assert devices(contents, "bf16") == [DEVICE]
    assert devices(contents, "program") == []
    model = model_of("olmoe_1b_7b", 16, "bf16")
    speeds, activation_bytes, sources = calibrate(contents, DEVICE, model, "bf16")
    assert dataclasses.asdict(speeds) == pytest.approx(dataclasses.asdict(SPEEDS))
    assert activation_bytes == pytest.approx(4 * 2**30 / 4 / 16384)
    assert any("scaling.json" in source for source in sources)
    measured = links(contents, DEVICE)
    assert {name: link.bandwidth / GB for name, link in measured.items()} == pytest.approx(LINKS)
    compared = validate(contents)
    assert len(compared) == 6 + 3
    # But for the latency that the smallest size is taken for, and the imbalance of random routing.
    assert all(abs(record["error"]) < 0.01 for record in compared)
    with pytest.raises(ValueError, match="no results of layers and of program training steps on NVIDIA H200"):
        calibrate(contents, DEVICE, model, "program")


def test_a_calibration_takes_no_step_of_a_mesh_or_with_remat_and_the_most_memory_of_all_settings():
    job = Job(model_of("olmoe_1b_7b", 4, "bf16"), 4, 4096)
    layers = list(_recorded())[1]
    others = [_step_record(job, 9.0, mesh="data=2"), _step_record(job, 9.0, remat="full")]
    assert devices([layers, _content("train_step", others)], "bf16") == []
    # A program's step whose peak has no activations; 16 bytes for each parameter.
    plain, without = _step_record(job, 2.0), _step_record(job, 3.0, setting="program")
    without["planned_gib"] = 16 * job.model.num_parameters / 2**30 + 1
    contents = [layers, _content("train_step", [*others, without, plain])]
    for setting in ("bf16", "program"):
        _, activation_bytes, _ = calibrate(contents, DEVICE, model_of("olmoe_1b_7b", 16, setting), setting)
        assert activation_bytes == pytest.approx(4 * 2**30 / 4 / 16384)


def test_results_of_several_devices_have_a_section_and_predictions_another(tmp_path):
    assert "## Several GPUs" not in report.make_page([])
    assert "## Predictions" not in report.make_page([])
    contents = list(_recorded())
    prediction = {"kind": "prediction", "preset": "olmoe_1b_7b", "num_layers": 16, "setting": "bf16"}
    prediction |= {"batch_size": 4, "sequence_length": 4096}
    predictions = [prediction | record for record in simulate.simulate(OLMOE, SPEEDS, FLAT, 16, gpu_gib=72)]
    simulated = _content("simulate", [*predictions, *validate(contents)])
    simulated |= {"sources": ["a source"], "assumptions": ["an assumption"]}
    page = report.make_page([contents[0], simulated])
    section = page.partition("## Several GPUs")[2].partition("\n## ")[0]
    assert "2 devices, with `XLA_FLAGS=--a=b`." in section
    rows = section.splitlines()
    assert "| olmoe | random |  | one device | 500 | 500 |  |  |  |" in rows
    assert sum("ring (auto)" in row and "| 0.900 |" in row for row in rows) == 2
    assert "| expert=2 | program | 36 | 15 | 120.0 of 130.0 | 1.88 |" in rows
    assert "| all_gather | 300 | 300 | 3 |" in rows
    assert "- `step-fsdp: out of memory: asks for much`" in rows
    section = page.partition("## Predictions")[2].partition("\n## ")[0]
    assert "- an assumption" in section
    assert sum(row.startswith("| 16 |") for row in section.splitlines()) == 1
    assert "| step olmoe_1b_7b, 4 layers, data=2 | 2 x NVIDIA H200 |" in section
    not_validated = report.make_page([simulated | {"records": predictions}])
    assert "No step on several GPUs has been measured yet" in not_validated

    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    docs.mkdir()
    for content in (contents[0], simulated):
        (results / content["file"]).write_text(json.dumps(content))
    assert report.main(["--results", str(results), "--docs", str(docs)]) == 0
    assert (docs / "images" / "simulate-nvidia-h200.png").read_bytes().startswith(b"\x89PNG")


def test_the_program_predicts_from_the_recorded_results(tmp_path, capsys):
    file = tmp_path / "simulation.json"
    arguments = ["--simulate", "--num-layers", "4", "--max-gpus", "8", "--setting", "bf16", "--out", str(file)]
    assert scaling.main(arguments) == 0
    content = json.loads(file.read_text())
    predictions = [record for record in content["records"] if record["kind"] == "prediction"]
    assert [record["num_devices"] for record in predictions if record["best"]] == [1, 2, 4, 8]
    # On one device it says what was measured.
    steps = [c for c in report.newest(report.RESULTS) if c["program"] in ("scaling", "train_step")]
    of_device = [c for c in steps if c["hardware"] == content["hardware"]]
    measured = [r["seconds_median"] for c in of_device for r in c["records"] if r.get("setting") == "bf16"]
    assert any(predictions[0]["seconds"] == pytest.approx(seconds) for seconds in measured)
    assert "GPUs in a node" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--overlap", "2"], "--overlap must be from 0 to 1"),
        (["--num-layers", "four"], "--num-layers must be numbers"),
        (["--gpus-per-node", "0"], "--gpus-per-node must be a number above 0, got 0"),
        (["--gpu-gib", "nan"], "--gpu-gib must be a number above 0, got nan"),
        (["--nvlink-us", "-5"], "--nvlink-us must be a number from 0, got -5.0"),
        (["--imbalance", "nan"], "--imbalance at least 1"),
        (["--resume"], "it goes without --resume and --only"),
        (["--device", "abacus"], "layers and bf16 steps are recorded for NVIDIA"),
    ],
)
def test_a_bad_argument_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        scaling.main(["--simulate", *arguments])
    assert message in capsys.readouterr().err
