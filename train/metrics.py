"""Metrics of a run: JSON lines for programs, TensorBoard events for people."""

import json
import os
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

# The metrics that the plots are drawn from.
TRAIN_BITS_PER_BYTE = "train/bits_per_byte"
VALIDATION_BITS_PER_BYTE = "validation/bits_per_byte"
EXPERT_LOAD = "train/expert_load"

# protobuf makes these classes at run time, where type checkers cannot see them.
_Event, _SessionLog = vars(event_pb2)["Event"], vars(event_pb2)["SessionLog"]


class MetricsWriter:
    """Appends metrics to `metrics.jsonl` and to TensorBoard event files in a run folder.

    Each record is one line, handed to the operating system before `write` returns: a killed process loses at
    most the line it was writing, and `read_metrics` leaves out a torn last line. On a resumed run, call
    `truncate_metrics` first.

    tensorboardX's own writer hands events to a thread that dies unseen when the disk is full and then blocks
    training; this one writes them itself, so that the error reaches the caller.

    Args:
        run_dir: Folder of the run, created if missing.

    Raises:
        OSError: From any method, if the disk cannot take the metrics.
    """

    def __init__(self, run_dir: Path | str):
        run_dir = Path(run_dir)
        (run_dir / TENSORBOARD_FOLDER).mkdir(parents=True, exist_ok=True)
        records = read_metrics(run_dir)
        _drop_torn_line(run_dir / METRICS_FILE)
        # The buffer makes one line one system call.
        self._lines = (run_dir / METRICS_FILE).open("ab", buffering=2**20)
        # Event files of one run must differ in name, also when two start in the same second.
        suffix = f".{os.getpid()}.{time.time_ns()}"
        self._events = EventsWriter(str(run_dir / TENSORBOARD_FOLDER / "events"), suffix)
        # TensorBoard hides what an earlier, killed session wrote at steps from this one on.
        first_step = records[-1]["step"] + 1 if records else 0
        session = _SessionLog(status="START")
        self._events.write_event(_Event(wall_time=time.time(), step=first_step, session_log=session))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one record.

        Args:
            step: Training step the values belong to.
            values: Scalars, or arrays such as the expert load [L, E] (a histogram in TensorBoard), by name.
        """
        arrays = {name: np.asarray(value) for name, value in values.items()}
        now = time.time()
        record = {"step": step, "time": round(now, 3)} | {k: v.tolist() for k, v in arrays.items()}
        self._lines.write(json.dumps(record).encode() + b"\n")
        self._lines.flush()
        for name, value in arrays.items():
            if value.ndim == 0:
                entry = summary.scalar(name, value)
            elif np.isfinite(value).all():
                entry = summary.histogram(name, value.ravel(), bins="auto")
            else:
                continue  # TensorBoard has no histogram of NaN; the JSON line has the values.
            self._events.write_event(_Event(wall_time=now, step=step, summary=entry))

    def flush(self) -> None:
        """Writes everything to the disk itself."""
        self._events.flush()
        os.fsync(self._lines.fileno())

    def close(self) -> None:
        """Flushes and closes the files."""
        # Both are closed even if the first fails.
        with closing(self._lines), closing(self._events):
            pass


class NoMetrics(MetricsWriter):
    """Writes nothing, in processes that leave that to another one."""

    def __init__(self):
        pass

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Does nothing."""

    def flush(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def read_metrics(run_dir: Path | str) -> list[dict[str, Any]]:
    """Records of a run in the order they were written; a torn last line is left out.

    Each record holds `step`, `time` (seconds since the epoch) and the values by name, arrays as nested lists.

    Raises:
        ValueError: If a line other than the last is not JSON.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"metrics file {path} must hold one JSON object a line: {error}") from error


def truncate_metrics(run_dir: Path | str, step: int) -> None:
    """Drops the records after `step`, atomically: a run that resumes at a checkpoint writes them anew.

    Args:
        run_dir: Folder of the run.
        step: Last step to keep.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.exists():
        return
    kept = [record for record in read_metrics(run_dir) if record["step"] <= step]
    draft = path.with_suffix(".tmp")
    with open(draft, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in kept)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _drop_torn_line(path: Path) -> None:
    if path.exists():
        data = path.read_bytes()
        os.truncate(path, data.rfind(b"\n") + 1)
