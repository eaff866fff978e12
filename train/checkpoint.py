"""Checkpoints of a run, written by Orbax in the background, atomically; the last and the best are kept."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers

from train.config import CheckpointConfig
from train.failure import UserError
from train.step import Params, TrainState

CHECKPOINT_FOLDER = "checkpoints"

_LOSS = "validation_loss"


class Checkpoints:
    """The checkpoints in a run folder, each named by its step.

    A checkpoint holds three items: `params`, so that evaluation and generation need not read the rest;
    `optimizer`, the rest of the training state; and `data`, the position of the data iterator. Orbax writes
    it to a folder named `<step>.orbax-checkpoint-tmp` and renames that when all is on the disk, so a folder
    named by a step is complete whenever the process dies. Older checkpoints are deleted only after that.

    Args:
        run_dir: Folder of the run; the checkpoints lie in `checkpoints/` below it.
        config: How many to keep.
        read_only: Whether to only read: nothing is created or cleaned up, so a run may be training meanwhile.
    """

    def __init__(self, run_dir: Path | str, config: CheckpointConfig | None = None, *, read_only: bool = False):
        config = config or CheckpointConfig()
        self.directory = Path(run_dir).resolve() / CHECKPOINT_FOLDER
        keep = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(config.keep_last),
                checkpoint_managers.BestN(
                    get_metric_fn=_validation_loss,
                    reverse=True,
                    n=config.keep_best,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            best_fn=_validation_loss,
            best_mode="min",
            preservation_policy=keep,
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
        )
        with self._writable():
            self._manager = ocp.CheckpointManager(self.directory, options=options, handler_registry=_handlers())

    def save(
        self, step: int, state: TrainState, position: dict[str, Any], *, validation_loss: float | None = None
    ) -> None:
        """Copies the arrays to the host and starts writing them; waits first for the save before it.

        A step that is saved already is left as it is.

        Args:
            step: Updates done so far.
            state: The training state.
            position: State of the data iterator, JSON-serialisable.
            validation_loss: What the best checkpoint is chosen by; None where it was not measured.

        Raises:
            UserError: If this save cannot start, or the one before it failed. Earlier checkpoints are whole.
        """
        self.wait()
        if step in self.steps:
            return
        with self._writable():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    optimizer=ocp.args.StandardSave(_rest(state)),
                    data=ocp.args.JsonSave(position),
                ),
                metrics=None if validation_loss is None else {_LOSS: validation_loss},
            )

    def wait(self) -> None:
        """Returns when the last save is on the disk.

        Raises:
            UserError: If it failed. Earlier checkpoints are whole.
        """
        with self._writable():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in ascending order."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int:
        """Step of the newest checkpoint.

        Raises:
            UserError: If there is none.
        """
        if not self.steps:
            raise UserError(f"there is no checkpoint in {self.directory}: train this run first")
        return self.steps[-1]

    def best_step(self) -> int:
        """Step of the checkpoint with the lowest validation loss; of the newest, where none was measured.

        Raises:
            UserError: If there is no checkpoint.
        """
        best = self._manager.best_step()
        return self.latest_step() if best is None else best

    def restore(self, step: int, shapes: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads a whole checkpoint.

        Args:
            step: Which one.
            shapes: Shapes and dtypes of this run's training state.

        Returns:
            The training state and the state of the data iterator.

        Raises:
            UserError: If the checkpoint has other shapes, or cannot be read.
        """
        self._check_shapes(step, params=shapes.params, optimizer=_rest(shapes))
        with self._readable(step):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(shapes.params),
                    optimizer=ocp.args.StandardRestore(_rest(shapes)),
                    data=ocp.args.JsonRestore(),
                ),
            )
        return TrainState(params=restored["params"], **restored["optimizer"]), restored["data"]

    def restore_params(self, step: int, params: PyTree[jax.ShapeDtypeStruct]) -> Params:
        """Reads the parameters of a checkpoint and nothing else.

        Args:
            step: Which checkpoint.
            params: Shapes and dtypes of this run's parameters.

        Raises:
            UserError: If the checkpoint has other shapes, or cannot be read.
        """
        self._check_shapes(step, params=params)
        with self._readable(step):
            args = ocp.args.Composite(params=ocp.args.StandardRestore(params))
            return self._manager.restore(step, args=args)["params"]

    def close(self) -> None:
        """Waits for the last save and stops the threads. It is `wait` that reports a save that failed."""
        with contextlib.suppress(OSError, ValueError):
            self._manager.close()

    def _check_shapes(self, step: int, **items: PyTree[jax.ShapeDtypeStruct]) -> None:
        with self._readable(step):
            metadata = self._manager.item_metadata(step)
        for item, expected in items.items():
            stored = metadata[item]
            if stored is None:
                raise UserError(f"checkpoint {self.directory / str(step)} is damaged: it has no {item}")
            differences = _differences(_shapes(stored.tree), _shapes(expected))
            if differences:
                more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
                raise UserError(
                    f"checkpoint {self.directory / str(step)} has another shape than this run: "
                    f"{item} {differences[0]}{more}; use the model and optimizer settings it was trained with"
                )

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        """Reports what the disk refuses in one line."""
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {self.directory}: {error.strerror or error}") from error
        except ValueError as error:
            # TensorStore reports the operating system's errors as ValueErrors that end in the code.
            code = re.search(r"os_error_code='(\d+)'", str(error))
            if code is None:
                raise
            raise UserError(f"cannot write {self.directory}: {os.strerror(int(code[1]))}") from error

    @contextlib.contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        """Reports in one line that a checkpoint, whose shapes are right, cannot be read."""
        try:
            yield
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read checkpoint {self.directory / str(step)}: {error}") from error


def _validation_loss(metrics: dict[str, float]) -> float:
    return metrics[_LOSS]


def _rest(state: TrainState) -> dict[str, Any]:
    """The training state without the parameters."""
    return {"step": state.step, "opt_state": state.opt_state}


def _handlers() -> ocp.DefaultCheckpointHandlerRegistry:
    """The kind of each item, which Orbax must know to read a checkpoint that it has not written."""
    registry = ocp.DefaultCheckpointHandlerRegistry()
    for item in ("params", "optimizer"):
        arrays = ocp.StandardCheckpointHandler()
        registry.add(item, ocp.args.StandardSave, arrays)
        registry.add(item, ocp.args.StandardRestore, arrays)
    json = ocp.JsonCheckpointHandler()
    registry.add("data", ocp.args.JsonSave, json)
    registry.add("data", ocp.args.JsonRestore, json)
    return registry


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))[0]
    return {_name(path): tuple(leaf.shape) for path, leaf in leaves}


def _name(path: tuple[Any, ...]) -> str:
    """Path of a leaf; the same for a tuple and for the list or dict that Orbax has in its place."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _differences(stored: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> list[str]:
    return [
        f"{name} is {list(stored.get(name, ())) if name in stored else 'absent'} there and "
        f"{list(expected[name]) if name in expected else 'absent'} here"
        for name in sorted(stored.keys() | expected.keys())
        if stored.get(name) != expected.get(name)
    ]
