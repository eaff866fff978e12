import json

import jax.numpy as jnp
import pytest

from benchmarks import block_sparse
from benchmarks.block_sparse import EQUATIONS, PROBLEMS, BlockSparseProducts


def test_the_program_measures_every_product_and_continues_its_file(run_program, tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    arguments = ["--only", "tiny", "--rounds", "2", "--out", str(file)]
    assert "says nothing of a GPU's speed" in run_program("block_sparse", *arguments)
    content = json.loads(file.read_text())
    assert "Then 2 rounds" in content["method"]
    measured = set()
    for record in content["records"]:
        assert "failure" not in record
        assert 0 < record["relative_error"] < 5e-3
        assert record["tflops"] == pytest.approx(2 * 512 * 64 * 256 / record["ms_median"] / 1e9)
        assert record["ratio"] > 0
        measured.add((record["operation"], record["implementation"]))
    assert measured == {(name, how) for name in EQUATIONS for how in ("pallas_kernels", "jax_batched")}

    def fail(*_arguments, **_options):
        raise AssertionError("this was to be skipped")

    monkeypatch.setattr(block_sparse, "measure", fail)
    assert block_sparse.main([*arguments, "--resume"]) == 0
    assert json.loads(file.read_text()) == content


def test_the_relative_error_sees_the_result_of_another_expert():
    for candidate in BlockSparseProducts(PROBLEMS["tiny"], seed=3).candidates():
        run, _ = candidate.prepare()
        out = run()
        assert 0 < candidate.relative_error(out) < 5e-3
        axis = 1 if (candidate.operation, candidate.implementation) == ("sdd_rhs_gradient", "pallas_kernels") else 0
        assert candidate.relative_error(jnp.roll(out, 1, axis)) > 0.5
        assert not candidate.relative_error(jnp.full_like(out, jnp.nan)) <= 1


def test_every_problem_has_whole_blocks():
    for problem in PROBLEMS.values():
        assert problem.M % problem.G == problem.M // problem.G % 128 == problem.N % 128 == 0
        assert problem.flops == 2 * problem.M * problem.K * problem.N


def test_an_unknown_problem_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        block_sparse.main(["--only", "large"])
    assert "there is no 'large'" in capsys.readouterr().err
