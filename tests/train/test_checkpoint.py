import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.checkpoint import Checkpoints
from train.config import CheckpointConfig
from train.failure import UserError
from train.mesh import Placement
from train.step import TrainState


def _state(step, width=3):
    params = {"groups": {0: {"kernel": jnp.arange(2.0 * width).reshape(2, width) + step}}}
    return TrainState(jnp.int32(step), params, (jax.tree.map(jnp.zeros_like, params), jnp.int32(7)))


def _save_all(checkpoints, losses):
    for step, loss in losses.items():
        checkpoints.save(step, _state(step), {"next": step}, validation_loss=loss)
    checkpoints.wait()


def test_the_last_and_the_best_are_kept_also_when_the_run_continues(tmp_path):
    config = CheckpointConfig(keep_last=2, keep_best=1)
    with contextlib.closing(Checkpoints(tmp_path, config)) as checkpoints:
        _save_all(checkpoints, {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5})
        assert checkpoints.steps == [2, 3, 4]
    with contextlib.closing(Checkpoints(tmp_path, config)) as checkpoints:
        _save_all(checkpoints, {5: None, 6: 1.5})
        assert checkpoints.steps == [2, 5, 6]
        assert (checkpoints.best_step(), checkpoints.latest_step()) == (2, 6)


def test_a_checkpoint_gives_back_the_state_and_the_position_and_parameters_alone(tmp_path):
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        _save_all(checkpoints, {5: None})
    with contextlib.closing(Checkpoints(tmp_path, read_only=True)) as checkpoints:
        shapes = Placement("").shapes(lambda: _state(0))
        state, position = checkpoints.restore(5, shapes)
        params = checkpoints.restore_params(5, shapes.params)
    assert position == {"next": 5}
    assert jax.tree.structure(state) == jax.tree.structure(_state(0))
    jax.tree.map(np.testing.assert_array_equal, state, _state(5))
    jax.tree.map(np.testing.assert_array_equal, params, _state(5).params)


def test_a_save_holds_the_values_of_its_step_though_the_next_step_takes_over_their_buffers(tmp_path):
    advance = jax.jit(lambda state: jax.tree.map(lambda a: a + 1, state), donate_argnums=0)
    state = _state(0, width=100_000)
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(20):
            state = advance(state)
        checkpoints.wait()
        saved, _ = checkpoints.restore(1, Placement("").shapes(lambda: _state(0, width=100_000)))
    jax.tree.map(np.testing.assert_array_equal, saved, _state(0, width=100_000))


def test_another_shape_is_named_with_both_shapes(tmp_path):
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        _save_all(checkpoints, {1: None})
        with pytest.raises(UserError, match=r"params groups\.0\.kernel is \[2, 3\] there and \[2, 4\] here"):
            checkpoints.restore(1, Placement("").shapes(lambda: _state(0, width=4)))


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        with pytest.raises(UserError, match="there is no checkpoint in"):
            checkpoints.latest_step()
        with pytest.raises(UserError, match="there is no checkpoint in"):
            checkpoints.best_step()
