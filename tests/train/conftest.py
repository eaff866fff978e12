"""What the tests of whole runs share: a small corpus, and the command line of a run that takes seconds."""

import contextlib
import io
import os
import random
import subprocess
import sys

import pytest

from train.cli import main


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory):
    """A folder with twenty documents of seeded gibberish with some structure to learn."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(40)]
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(20):
        (folder / f"{i}.txt").write_text(" ".join(draw.choices(words, k=150)))
    return folder


@pytest.fixture(scope="session")
def arguments(corpus_folder):
    """The command line of a run of 12 steps whose model has one small layer."""
    return [
        *("--data", str(corpus_folder), "--validation-fraction", "0.2"),
        *("--steps", "12", "--batch-size", "4", "--sequence-length", "32", "--log-every", "1"),
        *("--model.num-layers", "1", "--model.embed-dim", "16", "--model.max-sequence-length", "64"),
        *("--model.num-heads", "2", "--model.num-kv-heads", "1", "--model.head-dim", "8"),
        *("--model.num-experts", "4", "--model.top-k", "2", "--model.expert-hidden-dim", "16"),
        *("--optimizer.warmup-steps", "2", "--checkpoint.every", "4", "--evaluation.every", "4"),
        *("--evaluation.num-batches", "2", "--evaluation.sample-tokens", "8"),
    ]


@pytest.fixture(scope="session")
def finished(arguments, tmp_path_factory):
    """The folder of a finished run, to read only, and what the run printed; a file sets its seed and steps."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "settings.yaml").write_text("seed: 3\nsteps: 99\n")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = main([*arguments, "--config", str(folder / "settings.yaml"), "--run-dir", str(folder / "run")])
    assert code == 0
    return folder / "run", output.getvalue()


@pytest.fixture
def start():
    """Starts `python -m train` with some arguments and settings of the environment; it is killed after the test."""
    processes = []

    def start(*arguments, **settings):
        command = [sys.executable, "-m", "train", *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=os.environ | settings, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()
