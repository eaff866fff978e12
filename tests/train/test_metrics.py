import json
import resource
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from train.metrics import METRICS_FILE, TENSORBOARD_FOLDER, MetricsWriter, read_metrics, truncate_metrics


def write(run_dir, steps):
    writer = MetricsWriter(run_dir)
    for step in steps:
        writer.write(step, {"train/loss": 1 / (step + 1)})
    writer.close()


def read_events(run_dir):
    """Events of all files, oldest file first; a record is length, checksum, data, checksum."""
    events = []
    for path in sorted((run_dir / TENSORBOARD_FOLDER).iterdir(), key=lambda path: path.name.split(".")[-1]):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("Q", data[:8])
            events.append(vars(event_pb2)["Event"].FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return events


def test_what_is_written_is_read_back(tmp_path):
    writer = MetricsWriter(tmp_path / "run")
    load = np.array([[0.25, 0.75], [0.5, 0.5]], np.float32)
    writer.write(3, {"loss": np.float32(1.5), "rate": 0.1, "expert_load": load})
    writer.write(4, {"loss": float("nan")})
    records = read_metrics(tmp_path / "run")
    assert [record["step"] for record in records] == [3, 4]
    assert records[0] | {"time": 0} == {
        "step": 3,
        "time": 0,
        "loss": 1.5,
        "rate": 0.1,
        "expert_load": load.tolist(),
    }
    assert np.isnan(records[1]["loss"])
    assert records[0]["time"] > 1.7e9
    writer.close()


def test_tensorboard_gets_scalars_and_histograms(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(5, {"loss": 2.5, "load": np.array([[1.0, 2.0], [3.0, 6.0]]), "broken": np.array([np.nan, 1])})
    writer.close()
    values = {value.tag: (event.step, value) for event in read_events(tmp_path) for value in event.summary.value}
    assert values.keys() == {"loss", "load"}
    assert (values["loss"][0], values["loss"][1].simple_value) == (5, 2.5)
    assert (values["load"][1].histo.num, values["load"][1].histo.sum) == (4, 12)


def test_a_torn_last_line_is_left_out_and_the_next_run_writes_on(tmp_path):
    write(tmp_path, range(3))
    path = tmp_path / METRICS_FILE
    path.write_bytes(path.read_bytes()[:-7])
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1]
    write(tmp_path, [2, 3])
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2, 3]


def test_truncating_drops_the_records_after_a_step(tmp_path):
    truncate_metrics(tmp_path, 3)
    assert read_metrics(tmp_path) == []
    write(tmp_path, range(6))
    before = read_metrics(tmp_path)
    truncate_metrics(tmp_path, 3)
    assert read_metrics(tmp_path) == before[:4]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [METRICS_FILE]


def test_tensorboard_hides_the_steps_that_a_resumed_run_writes_anew(tmp_path):
    write(tmp_path, range(6))
    truncate_metrics(tmp_path, 3)
    write(tmp_path, [4])
    starts = [event.step for event in read_events(tmp_path) if event.HasField("session_log")]
    assert starts == [0, 4]


def test_a_killed_process_leaves_whole_records(tmp_path):
    program = """
import itertools, sys
import numpy as np
from train.metrics import MetricsWriter
writer = MetricsWriter(sys.argv[1])
for step in itertools.count():
    writer.write(step, {"load": np.full((16, 64), step / 7)})
    if step == 20:
        print("running", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"running\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    records = read_metrics(tmp_path)
    assert len(records) > 20
    assert [record["step"] for record in records] == list(range(len(records)))


def test_a_file_that_takes_no_more_is_reported_to_the_caller(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(0, {"loss": 1.0})
    size = (tmp_path / METRICS_FILE).stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            writer.write(1, {"loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [record["step"] for record in read_metrics(tmp_path)] == [0]
    writer.close()


def test_a_corrupt_line_within_the_file_is_an_error(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"step": 0}\n{"st\n' + json.dumps({"step": 1}) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl must hold one JSON object a line"):
        read_metrics(tmp_path)
