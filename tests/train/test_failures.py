"""What a user can mend is one line on stderr and exit code 2, and leaves earlier checkpoints as they were."""

import hashlib
import os
import shutil
import subprocess
import sys

import pytest

from train.cli import main


def _one_line(capsys, arguments):
    assert main([str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("jmoe-train: error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--optimizer.lerning-rate", "1"], "lerning-rate, 1; did you mean --optimizer.learning-rate?"),
        (["--model.num-layers", "two"], "--model.num-layers: invalid literal for int() with base 10: 'two'"),
        (["--optimizer.name", "adamm"], "invalid choice 'adamm' for argument '--optimizer.name'"),
        (["--preset", "huge"], "preset must be one of tiny, small"),
        (["--model.top-k", "9"], "top_k must be from 1 to num_experts = 4, got 9"),
        (["--optimizer.warmup-steps", "12"], "optimizer.warmup_steps must be less than steps = 12, got 12"),
        (["--model.vocab-size", "100"], "model.vocab_size must be at least 257, the size of the tokenizer"),
        (["--data", "absent.txt"], "No such file or directory: absent.txt"),
        (["--config", "absent.yaml"], "No such file or directory: absent.yaml"),
        (["--tokenizer", "absent.json"], "No such file or directory: absent.json"),
        (["--resume", "absent"], "--resume takes configuration and folder from the run"),
        (["--model.moe-implementation", "fastest"], "fastest"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(wrong, message, arguments, tmp_path, capsys):
    assert message in _one_line(capsys, [*arguments, "--run-dir", tmp_path / "run", *wrong])


def test_a_folder_that_holds_no_run_cannot_be_resumed_or_read(tmp_path, capsys):
    for command in (["--resume", tmp_path], ["eval", tmp_path], ["generate", tmp_path]):
        assert f"{tmp_path} is not a run folder: it has no config.yaml" in _one_line(capsys, command)


def test_a_loss_that_is_no_number_is_one_line_and_no_checkpoint(arguments, tmp_path, capsys):
    run = tmp_path / "run"
    wild = ["--optimizer.name", "sgd", "--optimizer.learning-rate", "1e30", "--optimizer.clip-norm", "inf"]
    assert "the loss is nan at step" in _one_line(capsys, [*arguments, "--log-every", "12", "--run-dir", run, *wild])
    assert not list((run / "checkpoints").iterdir())


def test_a_file_without_read_permission_is_one_line(arguments, tmp_path, capsys):
    path = tmp_path / "secret.txt"
    path.write_text("secret")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user reads files whatever their permissions")
    err = _one_line(capsys, [*arguments, "--run-dir", tmp_path / "run", "--data", path])
    assert "Permission denied" in err


def test_a_checkpoint_of_another_shape_is_one_line_and_stays_as_it_was(finished, capsys):
    run, _ = finished
    before = _fingerprint(run)
    err = _one_line(capsys, ["--resume", run, "--model.embed-dim", "32"])
    assert "params embedding.embedding is [258, 16] there and [258, 32] here" in err
    err = _one_line(capsys, ["--resume", run, "--optimizer.name", "lion"])
    assert "has another shape than this run: optimizer opt_state" in err
    assert _fingerprint(run) == before


def test_a_damaged_checkpoint_is_one_line(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    for path in (run / "checkpoints" / "12" / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    assert "checkpoint" in _one_line(capsys, ["generate", run, "--checkpoint", "latest"])


def test_a_run_folder_in_use_is_not_overwritten(finished, arguments, capsys):
    run, _ = finished
    before = _fingerprint(run)
    assert f"continue it with --resume {run}" in _one_line(capsys, [*arguments, "--run-dir", run])
    assert _fingerprint(run) == before


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("free", "settings"),
    [
        pytest.param("1500k", ["--checkpoint.keep-last", "100"], id="checkpoints fill it"),
        pytest.param("400k", ["--checkpoint.keep-last", "1"], id="metrics fill what checkpoints leave"),
    ],
)
def test_a_full_disk_is_one_line_and_earlier_checkpoints_stay_whole(free, settings, arguments, tmp_path):
    """On a real file system, which only this test's processes see."""
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = f'mount -t tmpfs -o size={free} tmpfs "$DISK" && '
    environment = os.environ | {"DISK": str(tmp_path), "PYTHON": sys.executable}
    if subprocess.run([*inside, mount + "true"], env=environment, capture_output=True).returncode:
        pytest.skip("this machine does not let an ordinary process mount a file system")
    train = '"$PYTHON" -m train "$@" --run-dir "$DISK/run"; echo "exit code $?"; '
    evaluate = 'exec "$PYTHON" -m train eval "$DISK/run" --checkpoint latest'
    result = subprocess.run(
        [*inside, mount + train + evaluate, "sh", *arguments, "--steps", "1000", *settings],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "exit code 2" in result.stdout, result
    training, evaluation = result.stdout.split("exit code 2")
    assert "Stopped" not in training
    assert "No space left on device" in result.stderr
    assert result.stderr.count("\n") == 1
    assert "this model" in evaluation
    assert result.returncode == 0


def _fingerprint(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
