import dataclasses
import json
import math
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest

from benchmarks import train_step
from benchmarks.train_step import Workload, bf16_setting, program_setting


def test_the_program_measures_steps_and_continues_its_file(run_program, tmp_path, monkeypatch, capsys):
    file = tmp_path / "results.json"
    arguments = ["--only", "program", "--num-layers", "1", "--batch-size", "2", "--steps", "2", "--out", str(file)]
    short = [*arguments, "--sequence-length", "16", "--no-scan-layers"]
    printed = run_program("train_step", *short)
    assert "says nothing of a GPU's speed" in printed
    content = json.loads(file.read_text())
    assert content["hardware"]["platform"] == "cpu"
    assert "medians and extremes of 2 steps" in content["method"]
    [record] = content["records"]
    assert (record["setting"], record["moe_implementation"], record["param_dtype"]) == ("program", "xla", "float32")
    assert record["scan_layers"] is False
    assert abs(record["cross_entropy_first"] - math.log(258)) < 1
    assert record["tokens_per_second"] == pytest.approx(2 * 16 / record["seconds_median"])
    assert 0 < record["seconds_min"] <= record["seconds_median"] <= record["seconds_max"]
    assert record["compile_seconds"] > 0
    assert record["planned_gib"] * 2**30 > 3 * 4 * record["parameters"]  # float32 weights and two moments

    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    monkeypatch.setattr(train_step, "new_process", lambda: ThreadPoolExecutor(1))
    assert train_step.main([*short, "--resume"]) == 0
    assert json.loads(file.read_text()) == content
    # Sequences longer than the model accepts fail, and that is recorded.
    assert train_step.main([*arguments, "--sequence-length", "2000", "--resume"]) == 1
    first, second = json.loads(file.read_text())["records"]
    assert first == record
    assert "max_sequence_length" in second["failure"]
    assert second["scan_layers"] is True
    assert second["failure"][:60] in capsys.readouterr().out


def test_the_settings_are_the_precisions_that_they_are_named_after():
    workload = Workload(preset="tiny", num_layers=1, batch_size=1, sequence_length=8, remat="full")
    params = {"kernel": jnp.ones((2, 2), jnp.bfloat16), "scale": jnp.ones(2, jnp.bfloat16)}
    model, optimizer, _ = bf16_setting(workload)
    assert (model.dtype, model.param_dtype, model.remat, model.num_layers) == ("bfloat16", "bfloat16", "full", 1)
    gradients = {"kernel": jnp.full((2, 2), 1e3, jnp.bfloat16), "scale": jnp.zeros(2, jnp.bfloat16)}
    updates, state = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    assert updates["kernel"].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in (state[0].mu["kernel"], state[0].nu["kernel"])} == {jnp.dtype(jnp.bfloat16)}
    assert float(state[0].mu["kernel"][0, 0]) > 50  # nothing clipped the gradient

    model, optimizer, schedule = program_setting(dataclasses.replace(workload, scan_layers=False))
    assert (model.param_dtype, model.scan_layers) == ("float32", False)
    assert schedule(0) == 0
    _, state = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    assert float(state[1][0].mu["kernel"][0, 0]) < 1  # clipped


def test_batches_pair_each_token_with_the_next():
    workload = Workload(preset="tiny", num_layers=1, batch_size=3, sequence_length=8)
    model = program_setting(workload)[0]
    batch = workload.batch(model, seed=0)
    assert batch["tokens"].shape == batch["targets"].shape == batch["mask"].shape == (3, 8)
    assert jnp.array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    assert int(batch["tokens"].max()) < model.vocab_size


def test_each_device_of_a_mesh_has_the_same_sequences():
    workload = Workload(preset="tiny", num_layers=1, batch_size=2, sequence_length=8, mesh="data=2,expert=2,tensor=2")
    assert workload.num_tokens == 4 * 2 * 8  # devices along tensor share theirs
    model = program_setting(workload)[0]
    alone = dataclasses.replace(workload, mesh="").batch(model, seed=0)["tokens"]
    assert jnp.array_equal(workload.batch(model, seed=0)["tokens"], jnp.tile(alone, (4, 1)))


@pytest.mark.exhaustive
def test_losses_on_a_mesh_are_those_of_one_device():
    asked = {"preset": "tiny", "num_layers": 1, "batch_size": 1, "sequence_length": 16}
    one = train_step.measure("program", asked, steps=1, seed=0)
    mesh = train_step.measure("program", {**asked, "mesh": "data=2,expert=4"}, steps=1, seed=0)
    assert mesh["cross_entropies"] == pytest.approx(one["cross_entropies"], rel=1e-4)
    assert mesh["tokens_per_second"] == pytest.approx(8 * 16 / mesh["seconds_median"])
