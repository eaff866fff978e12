import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp

from benchmarks.train_step import Workload, bf16_setting, program_setting

ROOT = Path(__file__).parents[2]
TINY = ("--num-layers", "1", "--batch-size", "2", "--sequence-length", "16", "--steps", "2")


def _run(*arguments):
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "benchmarks.train_step", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_program_measures_steps_and_records_what_fails(tmp_path):
    file = tmp_path / "results.json"
    result = _run(*TINY, "--only", "program", "--out", file)
    assert result.returncode == 0, result.stderr
    content = json.loads(file.read_text())
    [record] = content["records"]
    assert content["hardware"]["platform"] == "cpu"
    assert "medians and extremes of 2 steps" in content["method"]
    assert (record["setting"], record["moe_implementation"], record["param_dtype"]) == ("program", "xla", "float32")
    assert abs(record["cross_entropy_first"] - math.log(258)) < 1
    assert record["tokens_per_second"] * record["seconds_median"] == 2 * 16
    assert 0 < record["seconds_min"] <= record["seconds_median"] <= record["seconds_max"]
    assert record["compile_seconds"] > 0
    assert record["planned_gib"] * 2**30 > 3 * 4 * record["parameters"]  # float32 weights and two moments

    # The first is there already; the sequences of the second are longer than the model accepts.
    resumed = _run(*TINY, "--only", "program", "--out", file, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(file.read_text()) == content
    too_long = (*TINY[:4], "--sequence-length", "2000", "--steps", "2")
    failed = _run(*too_long, "--only", "bf16", "--out", file, "--resume")
    assert failed.returncode == 1, failed.stderr
    first, second = json.loads(file.read_text())["records"]
    assert first == record
    assert "max_sequence_length" in second["failure"]


def test_the_settings_are_the_precisions_that_they_are_named_after():
    workload = Workload(preset="tiny", num_layers=1, batch_size=1, sequence_length=8, remat="full")
    params = {"kernel": jnp.ones((2, 2), jnp.bfloat16), "scale": jnp.ones(2, jnp.bfloat16)}
    model, optimizer, _ = bf16_setting(workload)
    assert (model.dtype, model.param_dtype, model.remat, model.num_layers) == ("bfloat16", "bfloat16", "full", 1)
    gradients = {"kernel": jnp.full((2, 2), 1e3, jnp.bfloat16), "scale": jnp.zeros(2, jnp.bfloat16)}
    updates, state = optimizer.update(gradients, optimizer.init(params), params)
    assert updates["kernel"].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in (state[0].mu["kernel"], state[0].nu["kernel"])} == {jnp.dtype(jnp.bfloat16)}
    assert float(state[0].mu["kernel"][0, 0]) > 50  # nothing clipped the gradient

    model, optimizer, schedule = program_setting(workload)
    assert model.param_dtype == "float32"
    assert schedule(0) == 0
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    assert float(state[1][0].mu["kernel"][0, 0]) < 1  # clipped


def test_batches_pair_each_token_with_the_next():
    workload = Workload(preset="tiny", num_layers=1, batch_size=3, sequence_length=8)
    model = program_setting(workload)[0]
    batch = workload.batch(model, seed=0)
    assert batch["tokens"].shape == batch["targets"].shape == batch["mask"].shape == (3, 8)
    assert jnp.array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    assert int(batch["tokens"].max()) < model.vocab_size
