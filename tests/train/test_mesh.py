import json
import shutil

import jax
import numpy as np
import pytest

from train.cli import main
from train.config import TrainConfig, preset
from train.mesh import Placement, parse_mesh
from train.optimizer import make_optimizer
from train.step import init_state


def losses(run):
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {(r["step"], name): r[name] for r in records for name in ("train/loss", "validation/loss") if name in r}


def test_a_run_on_a_mesh_and_its_continuation_on_another_equal_one_on_one_device(arguments, finished, tmp_path, capsys):
    run, expected = tmp_path / "run", losses(finished[0])
    mesh = ("--mesh", "data=2,expert=2,tensor=2", "--seed", "3")
    assert main([*arguments, *mesh, "--run-dir", str(run)]) == 0
    actual = losses(run)
    assert actual.keys() == expected.keys()
    np.testing.assert_allclose([actual[key] for key in expected], list(expected.values()), rtol=1e-4)

    for step in ("8", "12"):
        shutil.rmtree(run / "checkpoints" / step)
    assert main(["--resume", str(run), "--mesh", "fsdp=4,expert=1,tensor=2"]) == 0
    actual = losses(run)
    np.testing.assert_allclose([actual[key] for key in expected], list(expected.values()), rtol=1e-4)

    capsys.readouterr()
    assert main(["eval", str(run)]) == 0
    assert main(["generate", str(run), "--mesh", "data=8", "--num-tokens", "2", "--checkpoint", "latest"]) == 2
    assert "batch_size must be a multiple of accumulation_steps = 1 times 8, the size of the mesh axes data" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_parameters_and_moments_are_created_in_shards(optimizer):
    config = preset("tiny")
    placement = Placement("fsdp=2,expert=4")
    rule = make_optimizer(type(config.optimizer)(name=optimizer), 1000)
    with placement.active():
        shapes = placement.shapes(lambda: init_state(config.model, rule, 0))
    kernels = [leaf for leaf in jax.tree.leaves(shapes) if leaf.shape[1:2] == (config.model.num_experts,)]
    assert len(kernels) >= 4  # w_up and w_down, and a moment of each
    for kernel in kernels:
        assert kernel.sharding.spec[1] == "expert"
        assert kernel.sharding.shard_shape(kernel.shape)[1] == config.model.num_experts // 4


@pytest.mark.parametrize("text", ["experts=2", "data", "data=0", "data=2,data=4", "data=two", "data=2 expert=4"])
def test_a_mesh_of_another_form_is_refused(text):
    with pytest.raises(ValueError, match=r"mesh must be made of data, fsdp, expert, tensor.* as in data=2,expert=4"):
        parse_mesh(text)


def test_a_mesh_of_another_number_of_devices_is_refused():
    with pytest.raises(ValueError, match="as many devices as there are, 8, got 'data=2,expert=2', which has 4"):
        Placement("data=2,expert=2")


def test_a_batch_that_the_devices_cannot_share_is_refused():
    model = preset("tiny").model
    message = "batch_size must be a multiple of accumulation_steps = 2 times 4, the size of the mesh axes data x expert"
    with pytest.raises(ValueError, match=message):
        TrainConfig(
            model=model, batch_size=12, sequence_length=8, accumulation_steps=2, mesh="data=2,expert=2,tensor=2"
        )
