"""Training steps on all devices, each with as many sequences as one device has alone."""

from collections.abc import Mapping, Sequence

from benchmarks.record import Record
from benchmarks.train_step import measure

_SAME = 0.02  # of the cross entropy of one device, relative


def step_meshes(num_devices: int) -> dict[str, str]:
    """The meshes that are measured, by name: one device first."""
    n = num_devices
    meshes = {"one": "", "expert": f"expert={n}"}
    if n % 2 == 0 and n > 2:
        meshes["data-expert"] = f"data=2,expert={n // 2}"
    return meshes | {"data": f"data={n}", "fsdp": f"fsdp={n}"}


def measure_step(setting: str, mesh: str, asked: Mapping[str, object], *, steps: int, seed: int) -> Record:
    """Runs some training steps on a mesh of all devices, or on one device, and returns their record."""
    return measure(setting, {**asked, "mesh": mesh}, steps=steps, seed=seed)


def compare_steps(records: Sequence[Record]) -> list[Record]:
    """Compares the steps among the records with those of one device, where they are there too: losses and speeds.

    All devices have the sequences of that one device, so that the losses must be its losses.
    """
    steps = [record for record in records if record["part"] == "step"]
    return [_compared(record, steps) if record["part"] == "step" else record for record in records]


def _compared(record: Record, records: Sequence[Record]) -> Record:
    same = "setting", "preset", "num_layers", "batch_size", "sequence_length", "remat", "scan_layers"
    if "failure" in record or not record["mesh"]:
        return record
    one = [other for other in records if not other.get("mesh") and "failure" not in other]
    one = [other for other in one if all(other[key] == record[key] for key in same)]
    if not one:
        return record
    expected, actual = one[-1]["cross_entropies"], record["cross_entropies"]
    if any(abs(a - e) > _SAME * e for a, e in zip(actual, expected, strict=True)):
        return record | {"failure": f"cross entropies of the first steps are {actual}, on one device {expected}"}
    return record | {"of_one_device": one[-1]["seconds_median"] / record["seconds_median"]}
