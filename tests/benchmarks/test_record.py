import datetime
import json

import pytest

from benchmarks.record import Results, default_path, describe_environment, describe_failure


def test_results_are_named_after_the_device_and_the_day():
    path = default_path("train_step", {"device": "NVIDIA H100 80GB HBM3"})
    assert path.name == f"train_step-nvidia-h100-80gb-hbm3-{datetime.date.today().isoformat()}.json"
    assert path.parent.parts[-2:] == ("benchmarks", "results")


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
    results = Results(tmp_path / "new" / "results.json", {"program": "p"})
    results.replace([{"ms": 1.0}])
    before = results.path.read_text()
    with pytest.raises(ValueError, match="JSON"):
        results.replace([{"ms": float("nan")}])
    assert results.path.read_text() == before
    assert json.loads(before)["records"] == [{"ms": 1.0}]


def test_results_of_another_machine_are_not_continued(tmp_path):
    path = tmp_path / "results.json"
    Results(path, {"program": "p", "hardware": "a"}).replace([{"ms": 1.0}])
    assert Results(path, {"program": "p", "hardware": "a"}, resume=True).records == [{"ms": 1.0}]
    assert Results(path, {"program": "p", "hardware": "b"}).records == []
    with pytest.raises(ValueError, match="differs from this run in hardware; choose another file with --out"):
        Results(path, {"program": "p", "hardware": "b"}, resume=True)


def test_the_environment_names_the_device_and_the_versions():
    environment = describe_environment()
    assert environment["hardware"]["device"]
    assert {"python", "jax", "jaxlib"} <= environment["versions"].keys()
    json.dumps(environment)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError("asks for 64 GiB"), "out of memory: asks for 64 GiB"),
        (RuntimeError("CUDA out of memory. Tried\nmore"), "out of memory: CUDA out of memory. Tried"),
        (ValueError("bad\nshape"), "ValueError: bad"),
        (KeyError(), "KeyError: "),
    ],
)
def test_failures_are_one_line(error, expected):
    assert describe_failure(error) == expected
