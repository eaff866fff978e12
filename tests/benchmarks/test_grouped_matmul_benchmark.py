import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import grouped_matmul
from benchmarks.grouped_matmul import measure, with_ratios
from benchmarks.jax_matmuls import JaxMatmuls
from benchmarks.matmuls import Candidate, Problem, draw_sample

OPERATIONS = {"forward", "transposed", "weight_gradient"}
PROBLEM = Problem("test", 96, 64, 32, 4)


def _candidate(result, *, error=0.0):
    return Candidate("forward", "pallas_kernels", lambda: (result, {}), lambda _: error, lambda _: None)


def _fail(*_arguments, **_options):
    raise AssertionError("this was to be skipped")


def test_the_program_measures_every_operation_and_continues_its_file(run_program, tmp_path, monkeypatch, capsys):
    file = tmp_path / "results.json"
    arguments = ["--only", "tiny", "--rounds", "2", "--out", str(file)]
    printed = run_program("grouped_matmul", *arguments)
    assert "says nothing of a GPU's speed" in printed
    content = json.loads(file.read_text())
    assert content["hardware"]["platform"] == "cpu"
    assert "Then 2 rounds" in content["method"]
    operations = {}
    for record in content["records"]:
        assert "failure" not in record
        assert 0 < record["relative_error"] < 5e-3
        assert 0 < record["ms_min"] <= record["ms_median"] <= record["ms_max"]
        assert record["tflops"] == pytest.approx(2 * 256 * 64 * 128 / record["ms_median"] / 1e9)
        operations.setdefault(record["implementation"], set()).add(record["operation"])
    ours = {"pallas_kernels", "jax_dense", "jax_batched", "jax_ragged_dot"}
    assert operations.items() >= dict.fromkeys(ours, OPERATIONS).items()

    monkeypatch.setattr(grouped_matmul, "measure", _fail)
    assert grouped_matmul.main([*arguments, "--resume"]) == 0
    assert json.loads(file.read_text()) == content
    content["records"] = [record for record in content["records"] if record["implementation"] != "jax_ragged_dot"]
    file.write_text(json.dumps(content))
    assert grouped_matmul.main([*arguments, "--resume", "--time-limit", "0"]) == 0
    assert "tiny: no jax.lax.ragged_dot" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        grouped_matmul.main([*arguments, "--rounds", "3", "--resume"])
    assert "differs from this run in method" in capsys.readouterr().err
    assert json.loads(file.read_text()) == content


def test_an_unknown_problem_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        grouped_matmul.main(["--only", "olmo"])
    assert "there is no problem 'olmo'" in capsys.readouterr().err


def test_ratios_compare_with_the_fastest_cublas_of_the_same_operation():
    def record(operation, implementation, ms, configuration="a"):
        return {
            "configuration": configuration,
            "operation": operation,
            "implementation": implementation,
            "ms_median": ms,
        }

    failed = {"configuration": "a", "operation": "forward", "implementation": "torch_dense", "failure": "no"}
    records = [
        record("forward", "pallas_kernels", 4.0),
        record("forward", "jax_dense", 3.0),
        record("forward", "torch_batched", 2.0),
        record("forward", "torch_grouped_mm", 1.0),
        record("transposed", "pallas_kernels", 5.0),
        record("transposed", "jax_batched", 10.0),
        record("forward", "jax_dense", 100.0, "b"),
        record("weight_gradient", "pallas_kernels", 1.0),
        failed,
    ]
    assert [r.get("ratio") for r in with_ratios(records)] == [0.5, 2 / 3, 1.0, 2.0, 2.0, 1.0, 1.0, None, None]
    assert with_ratios(with_ratios(records)) == with_ratios(records)


def test_a_wrong_result_is_recorded_and_not_timed():
    calls = []
    [record] = measure([_candidate(lambda: calls.append(0), error=0.02)], PROBLEM, rounds=2, seed=0)
    assert "relative error 0.02" in record["failure"]
    assert "ms_median" not in record
    assert len(calls) == 1
    [record] = measure([_candidate(lambda: None, error=float("nan"))], PROBLEM, rounds=1, seed=0)
    assert "relative error nan" in record["failure"]


def test_memory_that_does_not_suffice_is_recorded_and_stops_nothing():
    def ask():
        raise RuntimeError("RESOURCE_EXHAUSTED: 64 GiB asked\nand a long dump")

    another = Candidate("forward", "another", lambda: (lambda: None, {"a": 1}), lambda _: 0.0, lambda _: None)
    asking, fine = measure([_candidate(ask), another], PROBLEM, rounds=1, seed=0)
    assert asking["failure"] == "out of memory: RESOURCE_EXHAUSTED: 64 GiB asked"
    assert fine["a"] == 1
    assert fine["ms_median"] > 0


@pytest.mark.parametrize("operation", sorted(OPERATIONS))
def test_the_relative_error_sees_a_group_multiplied_with_the_matrix_of_another(operation):
    matmuls = JaxMatmuls(PROBLEM, seed=3)
    [candidate] = [c for c in matmuls.candidates() if (c.operation, c.implementation) == (operation, "pallas_kernels")]
    run, facts = candidate.prepare()
    assert facts["backend"] == "xla"
    out = run()
    assert 0 < candidate.relative_error(out) < 5e-3
    shifted = jnp.roll(out, 1, axis=0)
    assert candidate.relative_error(shifted) > 0.5
    assert not candidate.relative_error(jnp.full_like(out, jnp.nan)) <= 1


def test_samples_hold_first_and_last_rows_of_groups_and_no_empty_group():
    sizes = np.array([0, 5, 0, 80, 11], np.int32)
    sample = draw_sample(PROBLEM, sizes, seed=0)
    assert set(sample.groups.tolist()) <= {1, 3, 4}
    bounds = {1: (0, 5), 3: (5, 85), 4: (85, 96)}
    for group, start, end in zip(sample.groups, sample.start, sample.end, strict=True):
        assert (start, end) == bounds[group]
        assert {start, end - 1} <= set(sample.rows.tolist())
    for row, group in zip(sample.rows, sample.row_group, strict=True):
        start, end = bounds[group]
        assert start <= row < end
