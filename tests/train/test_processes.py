import json
import signal
import socket
import time

import numpy as np
import pytest

from train.cli import main
from train.processes import ProcessOptions, in_cluster, join

PATIENCE = 600  # seconds for what takes a few on an idle machine
TWO_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}


@pytest.fixture
def start_together(start):
    """Starts the processes of a run, each with two devices."""

    def start_together(num_processes, *arguments):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        together = (*arguments, "--coordinator", address, "--num-processes", num_processes)
        return [start(*together, "--process-id", i, **TWO_DEVICES) for i in range(num_processes)]

    return start_together


def losses(run):
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {(r["step"], name): r[name] for r in records for name in ("train/loss", "validation/loss") if name in r}


def wait_for(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def finish(processes):
    outputs = [process.communicate(timeout=PATIENCE) for process in processes]
    return [process.returncode for process in processes], outputs


@pytest.mark.parametrize("num_processes", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_processes_end_when_one_is_killed_and_continue_stopped_or_not_like_one(
    num_processes, arguments, start_together, tmp_path
):
    run = tmp_path / "run"
    options = [*arguments, "--optimizer.schedule", "constant"]
    mesh = ("--mesh", f"data=2,expert=2,tensor={num_processes // 2}")

    processes = start_together(num_processes, *options, *mesh, "--steps", "100000", "--run-dir", run)
    wait_for(lambda: (run / "checkpoints" / "4").exists())
    processes[-1].kill()
    killed = time.monotonic()
    codes, outputs = finish(processes)
    assert time.monotonic() - killed < 120  # 20 to 40 on an idle machine: see HEARTBEAT_SECONDS
    assert 0 not in codes
    # Whichever notices first: the sum that the dead one is missing from, or the runtime that misses its heartbeat.
    assert "process 0 lost another one" in outputs[0][1] or "another task died" in outputs[0][1]

    processes = start_together(num_processes, "--resume", run)
    wait_for(lambda: "Compiling" in processes[0].stdout.readline())
    time.sleep(1)
    processes[-1].send_signal(signal.SIGTERM)
    codes, outputs = finish(processes)
    assert codes == [143] * num_processes
    assert "Stopped by SIGTERM" in outputs[0][0]
    assert "Run folder" not in outputs[1][0]  # one of them speaks for all

    # Another number of processes, and so of devices: this one has eight.
    last = max(int(path.name) for path in (run / "checkpoints").iterdir()) + 2
    assert main(["--resume", str(run), "--mesh", "data=2,expert=2,tensor=2", "--steps", str(last)]) == 0
    assert main([*options, "--steps", str(last), "--run-dir", str(tmp_path / "alone")]) == 0
    actual, expected = losses(run), losses(tmp_path / "alone")
    assert [key for key in actual if key[1] == "train/loss"] == [key for key in expected if key[1] == "train/loss"]
    common = sorted(actual.keys() & expected.keys())
    np.testing.assert_allclose([actual[key] for key in common], [expected[key] for key in common], rtol=1e-3)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "16"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, True),
    ],
    ids=str,
)
def test_clusters_are_told_by_the_environment(environment, expected, monkeypatch):
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert in_cluster() is expected


@pytest.mark.parametrize(
    "options",
    [
        ProcessOptions(coordinator="localhost:1"),
        ProcessOptions(coordinator="localhost:1", num_processes=2),
        ProcessOptions(num_processes=2, process_id=0),
        ProcessOptions(coordinator="localhost:1", num_processes=2, process_id=2),
        ProcessOptions(coordinator="localhost:1", num_processes=2, process_id=-1),
    ],
    ids=str,
)
def test_half_of_the_options_and_processes_that_are_not_there_are_refused(options):
    with pytest.raises(ValueError, match="must be given together, as in --coordinator host:1234"):
        join(options)
