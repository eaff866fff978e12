"""What recorded results tell the time model: speeds of one device, links, and how its predictions compare."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from benchmarks.layers import CONFIGURATIONS, Configuration
from benchmarks.record import Record
from benchmarks.scaling.layer import ONE_DEVICE, RAGGED
from benchmarks.scaling.time_model import ONE, Group, Job, Link, Mesh, Network, Speeds, layer_seconds, step_seconds
from jmoe.exchanges import choose_exchange
from jmoe.models import PRESETS, TransformerConfig
from train.mesh import parse_mesh

_PRECISIONS: dict[str, Any] = {
    "bf16": {"dtype": "bfloat16", "param_dtype": "bfloat16"},
    "program": {"dtype": "bfloat16", "param_dtype": "float32"},
}


class Calibration(NamedTuple):
    """What one device does in a step, and where that is from.

    Attributes:
        speeds: Of one device.
        activation_bytes: What each token keeps in each layer.
        sources: What each figure is from.
    """

    speeds: Speeds
    activation_bytes: float
    sources: list[str]


def model_of(preset: str, num_layers: int, setting: str) -> TransformerConfig:
    """A preset with so many layers, in the precision of a setting of `benchmarks.train_step`."""
    return dataclasses.replace(PRESETS[preset], num_layers=num_layers, **_PRECISIONS[setting])


def devices(contents: Sequence[Record], setting: str) -> list[str]:
    """Names the devices that have what `calibrate` needs, those that were measured in a group first."""
    steps = [content for content in contents if content["program"] in ("scaling", "train_step")]
    steps.sort(key=lambda content: content["program"])
    named = dict.fromkeys(content["hardware"]["device"] for content in steps)
    return [
        device
        for device in named
        if _layers(contents, device)
        and any(step["setting"] == setting for _, step in _one_device_steps(contents, device))
    ]


def calibrate(contents: Sequence[Record], device: str, model: TransformerConfig, setting: str) -> Calibration:
    """Takes the speeds of one device from its newest results.

    The speed of experts is that of a recorded layer of the model's shape, or else of olmoe's. What a recorded step
    takes beyond experts, output projection and optimizer gives the speed of all other operations.

    Args:
        contents: Of `benchmarks.report.newest`.
        device: As the results name it.
        model: Whose experts are computed.
        setting: Of the recorded step, as in `benchmarks.train_step`.

    Raises:
        ValueError: A figure has not been recorded.
    """
    layers = _layers(contents, device)
    steps = [(content, step) for content, step in _one_device_steps(contents, device) if step["setting"] == setting]
    # The rates of a dense matmul and of a copy are measured with the layers of benchmarks.layer.
    rates = [(content, record) for content, record in _layers(contents, None) if "dense" in record]
    rates.sort(key=lambda pair: (pair[0]["hardware"]["device"] != device, pair[1]["configuration"] != "olmoe"))
    if not layers or not steps or not rates:
        raise ValueError(f"there are no results of layers and of {setting} training steps on {device}: measure them")
    (content, step), (of_rates, rate) = steps[0], rates[0]
    (of_step_layer, step_layer), (of_layer, layer) = (
        _layer_like(layers, PRESETS[step["preset"]]),
        _layer_like(layers, model),
    )
    dense, copy = 1e12 * rate["dense"]["tflops"], 1e9 * rate["copy_gb_per_s"]
    job = _job_of(step)
    experts = _expert_speeds(step_layer)
    rest = step["seconds_median"] - job.head_flops / dense
    rest -= job.num_moe_layers * job.expert_flops * (1 / experts["forward"] + 2 / experts["backward"])
    rest -= job.update_seconds(Speeds(**experts, other=1, dense=dense, copy=copy), ONE)
    if rest <= 0:
        raise ValueError(f"the step in {content['file']} took less than its experts and matmuls take by themselves")
    other = job.other_flops / rest
    # Activations are the same in every setting. Where float32 gradients and moments are updated, a step can be at its
    # peak without them, so that the most that is found counts.
    alike = [other for _, other in _one_device_steps(contents, device) if other["preset"] == step["preset"]]
    kept = max(_activation_bytes(other) for other in alike)
    return Calibration(
        Speeds(**_expert_speeds(layer), other=other, dense=dense, copy=copy),
        kept,
        [
            f"experts: {_name(layer)}, random routing, in {of_layer['file']}",
            f"other operations and activations: what a {step['setting']} step of {step['num_layers']} layers of "
            f"{step['preset']} in {content['file']} takes beside experts, output projection and optimizer (experts "
            f"there: {_name(step_layer)} in {of_step_layer['file']})",
            f"output projection and optimizer: dense matmul and copy of {_name(rate)} in {of_rates['file']}",
        ],
    )


def links(contents: Sequence[Record], device: str) -> dict[str, Link]:
    """Reads measured links: the largest size gives the bandwidth, the smallest the latency of each doubling."""
    measured: dict[str, Link] = {}
    records = [record for _, record in _scaling(contents, device, "links")]
    for collective in dict.fromkeys(record["collective"] for record in records):
        of_one = sorted((r for r in records if r["collective"] == collective), key=lambda r: r["bytes_sent"])
        small, large = of_one[0], of_one[-1]
        steps = 1 if collective == "ppermute" else math.ceil(math.log2(small["num_devices"]))
        measured[collective] = Link(1e9 * large["gb_per_s"], 1e-3 * small["ms_median"] / steps)
    return measured


def validate(contents: Sequence[Record]) -> list[Record]:
    """Predicts what was measured on several devices, from what was measured of one of them and of links."""
    records = []
    for device in dict.fromkeys(c["hardware"]["device"] for c in contents if c["program"] == "scaling"):
        if not (measured_links := links(contents, device)):
            continue
        # One host; anything not measured there has the links of an all-to-all.
        default = measured_links.get("all_to_all", next(iter(measured_links.values())))
        in_node = {"": default, **measured_links}
        ones = {
            (record["configuration"], record["routing"]): record
            for _, record in _scaling(contents, device, "layer")
            if record["exchange"] == ONE_DEVICE
        }
        for _, record in _scaling(contents, device, "layer"):
            one = ones.get((record["configuration"], record["routing"]))
            if record["exchange"] in (ONE_DEVICE, RAGGED) or one is None:
                continue
            n = record["num_devices"]
            network = Network(in_node, default, n)
            job = _job_of_layer(CONFIGURATIONS[record["configuration"]])
            speeds = Speeds(**_expert_speeds(one), other=1, dense=1, copy=1)
            predicted = layer_seconds(job, speeds, network, Group(n, n), record["exchange"], record["fullest_device"])
            what = f"layer {record['configuration']}, {record['routing']}, {record['exchange']}, {record['placement']}"
            records.append(_compared(device, n, what, record["both"]["ms_median"], predicted))
        for content, record in _scaling(contents, device, "step"):
            if not record["mesh"]:
                continue
            n, sizes = content["num_devices"], parse_mesh(record["mesh"])
            mesh = Mesh(*(sizes.get(axis, 1) for axis in ("data", "fsdp", "expert")))
            job = _job_of(record)
            try:
                speeds = calibrate(contents, device, job.model, record["setting"]).speeds
            except ValueError:
                continue
            network, exchange = Network(in_node, default, n), _auto(job, mesh)
            predicted = step_seconds(job, speeds, network, mesh, exchange)
            what = f"step {record['preset']}, {record['num_layers']} layers, {record['mesh']}"
            records.append(_compared(device, n, what, 1e3 * record["seconds_median"], predicted))
    return records


def _auto(job: Job, mesh: Mesh) -> str:
    return choose_exchange(mesh.expert, job.model.top_k, 2 * job.num_tokens * job.model.embed_dim)


def _compared(device: str, num_devices: int, what: str, measured_ms: float, parts: dict[str, float]) -> Record:
    predicted_ms = 1e3 * sum(parts.values())
    return {
        "kind": "validation",
        "device": device,
        "num_devices": num_devices,
        "what": what,
        "measured_ms": measured_ms,
        "predicted_ms": predicted_ms,
        "error": predicted_ms / measured_ms - 1,
    }


def _scaling(contents: Iterable[Record], device: str, part: str) -> list[tuple[Record, Record]]:
    return [
        (content, record)
        for content in contents
        if content["program"] == "scaling" and content["hardware"]["device"] == device
        for record in content["records"]
        if record["part"] == part and "failure" not in record
    ]


def _layers(contents: Iterable[Record], device: str | None) -> list[tuple[Record, Record]]:
    """Timed layers on one device with random routing, those that were measured beside several devices first."""
    found = []
    for content in sorted(contents, key=lambda content: content["program"] != "scaling"):
        if device in (None, content["hardware"]["device"]):
            ours = {"scaling": ("exchange", ONE_DEVICE), "layer": ("implementation", "jmoe")}
            key, value = ours.get(content["program"], ("", ""))
            found += [
                (content, record)
                for record in content["records"]
                if key and record.get(key) == value and record["routing"] == "random" and "failure" not in record
            ]
    return found


def _one_device_steps(contents: Iterable[Record], device: str) -> list[tuple[Record, Record]]:
    steps = _scaling(contents, device, "step")
    for content in contents:
        if content["program"] == "train_step" and content["hardware"]["device"] == device:
            steps += [(content, record) for record in content["records"] if "failure" not in record]

    def is_plain(record: Record) -> bool:  # on one device, and nothing computed twice
        return not record.get("mesh") and record.get("remat", "none") == "none"

    return [(content, record) for content, record in steps if record.get("planned_gib") and is_plain(record)]


def _layer_like(layers: list[tuple[Record, Record]], model: TransformerConfig) -> tuple[Record, Record]:
    shape = model.embed_dim, model.expert_hidden_dim, model.num_experts, model.top_k
    alike = [pair for pair in layers if tuple(pair[1][key] for key in "DFEK") == shape]
    return (alike or [pair for pair in layers if pair[1]["configuration"] == "olmoe"] or layers)[0]


def _expert_speeds(layer: Record) -> dict[str, float]:
    forward, both = layer["forward"], layer["both"]
    flops = 1e12 * forward["tflops"] * 1e-3 * forward["ms_median"]
    backward = 2 * flops / (1e-3 * (both["ms_median"] - forward["ms_median"]))
    return {"forward": 1e12 * forward["tflops"], "backward": backward}


def _job_of(step: Record) -> Job:
    model = model_of(step["preset"], step["num_layers"], step["setting"])
    return Job(model, step["batch_size"], step["sequence_length"])


def _activation_bytes(step: Record) -> float:
    """What a step is planned to take for each token and layer, beside its state."""
    job = _job_of(step)
    state = job.state_bytes * step["parameters"]
    return max(step["planned_gib"] * 2**30 - state, 0) / job.num_tokens / job.model.num_layers


def _job_of_layer(configuration: Configuration) -> Job:
    c = configuration
    model = dataclasses.replace(
        PRESETS["olmoe_1b_7b"], num_layers=1, embed_dim=c.D, num_experts=c.E, top_k=c.K, expert_hidden_dim=c.F
    )
    return Job(model, 1, c.T)


def _name(layer: Record) -> str:
    return layer["configuration"]
