"""The program that runs the kernels under compute-sanitizer, without one."""

import os

import jax.numpy as jnp
import pytest

from benchmarks import sanitize


def test_every_case_runs_by_the_reference_on_operands_with_nan_past_the_groups():
    names = []
    for name, run, operands in sanitize.cases():
        result = run(*operands, implementation="reference")
        assert result.size
        assert not jnp.isnan(result).any()
        names.append(name)
    assert len(set(names)) == 19


def test_without_a_hopper_gpu_the_kernels_refuse_to_run():
    with pytest.raises(ValueError, match="needs a Hopper GPU"):
        sanitize.run_kernels()


@pytest.mark.parametrize(
    ("output", "status", "failed"),
    [
        ("grouped_matmul: ran, relative error 1e-3\n========= ERROR SUMMARY: 0 errors\n", 0, False),
        ("========= Invalid read\n========= ERROR SUMMARY: 3 errors\n", sanitize._ERROR_STATUS, True),
        ("Traceback\nArithmeticError: grouped_matmul: relative error 1\n", 1, True),
        ("nothing said\n", 0, True),
    ],
)
def test_what_a_tool_says_is_read(output, status, failed):
    report = sanitize.read_report(output, status)
    assert ("failure" in report) == failed
    if not failed:
        assert report["kernels"] == ["grouped_matmul"]
        assert report["summary"] == "ERROR SUMMARY: 0 errors"


def test_where_there_is_no_sanitizer_the_program_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit):
        sanitize.main([])
    assert "no compute-sanitizer on the PATH" in capsys.readouterr().err


def test_a_tool_that_finds_something_fails_the_program_and_the_file_says_what(tmp_path, monkeypatch, capsys):
    fake = tmp_path / "compute-sanitizer"
    fake.write_text("#!/bin/sh\necho '========= ERROR SUMMARY: 1 error'\nexit 99\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sanitize, "has_hopper_gpu", int)  # false, and found by a new process
    with pytest.raises(SystemExit):
        sanitize.main(["--out", str(tmp_path / "out.json")])
    assert "Hopper GPUs only" in capsys.readouterr().err
    record = sanitize.sanitize("memcheck")
    assert record["failure"].startswith("exit status 99")
