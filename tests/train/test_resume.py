"""A run that dies at any moment continues as if nothing had happened."""

import contextlib
import os
import signal
import time

import jax
import numpy as np
import pytest

from train.arguments import load_config
from train.checkpoint import Checkpoints
from train.mesh import Placement
from train.metrics import read_metrics
from train.optimizer import make_optimizer
from train.step import init_state

# What depends on the clock.
_CLOCK = {"time", "train/tokens_per_second"}


def test_a_run_killed_before_its_first_checkpoint_and_during_a_save_ends_bit_for_bit_like_one_left_alone(
    arguments, start, tmp_path
):
    arguments = [*arguments, "--steps", "30", "--checkpoint.every", "10", "--evaluation.every", "5"]
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    reference = start(*arguments, "--run-dir", alone)
    _wait(reference, lambda: _num_records(alone))  # so that the others find their programs compiled

    process = start(*arguments, "--run-dir", killed)
    _wait(process, lambda: _num_records(killed) >= 3)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not _saved_steps(killed)

    process = start("--resume", killed)
    _kill_during_a_save(process, killed)
    assert _saved_steps(killed) != [30]

    process = start("--resume", killed)
    assert process.wait() == 0, process.communicate()
    assert reference.wait() == 0, reference.communicate()

    assert _comparable(read_metrics(killed)) == _comparable(read_metrics(alone))
    steps = [record["step"] for record in read_metrics(killed) if "train/loss" in record]
    assert steps == list(range(1, 31))
    assert _final_state(killed) == _final_state(alone)
    assert not list((killed / "checkpoints").glob("*-tmp"))


@pytest.mark.sample(2)
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_step_under_way_and_says_how_to_continue(number, exit_code, arguments, start, tmp_path):
    # The schedule does not see the number of steps: the run and its continuation are the same programs.
    arguments = [*arguments, "--steps", "400", "--optimizer.schedule", "constant"]
    arguments = [*arguments, "--checkpoint.every", "400", "--evaluation.every", "400"]
    run = tmp_path / "run"
    process = start(*arguments, "--run-dir", run)
    _wait(process, lambda: _num_records(run) >= 3)
    process.send_signal(number)
    out, err = process.communicate()

    assert process.returncode == exit_code
    assert err == ""
    [step] = _saved_steps(run)
    assert 0 < step < 400
    assert out.splitlines()[-1] == (
        f"Stopped by {number.name} after step {step}; continue with: jmoe-train --resume {run}"
    )
    assert [record["step"] for record in read_metrics(run)] == list(range(1, step + 1))
    process = start("--resume", run, "--steps", step + 1)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert _saved_steps(run)[-1] == step + 1


def _wait(process, condition):
    deadline = time.monotonic() + 600  # takes seconds on an idle machine
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def _kill_during_a_save(process, run):
    """Kills the process while a checkpoint is half written; it is frozen first to make certain of that."""

    def drafts():
        return list((run / "checkpoints").glob("*-tmp"))

    while True:
        _wait(process, drafts)
        process.send_signal(signal.SIGSTOP)
        if drafts():
            break
        process.send_signal(signal.SIGCONT)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert drafts()


def _num_records(run):
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _saved_steps(run):
    folder = run / "checkpoints"
    return sorted(int(name) for name in os.listdir(folder) if name.isdecimal()) if folder.exists() else []


def _comparable(records):
    return [{key: value for key, value in record.items() if key not in _CLOCK} for record in records]


def _final_state(run):
    config = load_config(run)
    optimizer = make_optimizer(config.optimizer, config.steps)
    shapes = Placement("").shapes(lambda: init_state(config.model, optimizer, 0))
    with contextlib.closing(Checkpoints(run, read_only=True)) as checkpoints:
        state, position = checkpoints.restore(checkpoints.latest_step(), shapes)
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)], position
