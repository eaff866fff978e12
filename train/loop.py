"""Training from the first step to the last: updates, metrics, evaluations, checkpoints, and stopping."""

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from train.checkpoint import Checkpoints
from train.config import TrainConfig, write_config
from train.evaluate import Evaluation, evaluate, make_eval_step
from train.failure import UserError, named_os_errors, user_errors
from train.inputs import corpus_of, tokenizer_of, tokens_per_byte, train_loader, validation_loader
from train.interrupt import StopRequest
from train.mesh import Placement, shardings_of
from train.metrics import (
    EXPERT_LOAD,
    TRAIN_BITS_PER_BYTE,
    VALIDATION_BITS_PER_BYTE,
    MetricsWriter,
    NoMetrics,
    truncate_metrics,
)
from train.optimizer import make_optimizer, make_schedule
from train.processes import StopTogether, is_first
from train.step import Metrics, TrainState, graph_of, init_state, make_train_step
from train.summary import summarize
from train.terminal import Terminal


def train(config: TrainConfig, run_dir: Path, *, resume: bool = False, console: Console | None = None) -> int:
    """Trains a model, leaves all there is to know about it in a run folder, and shows a summary.

    Args:
        config: The run.
        run_dir: Its folder, created if missing: `config.yaml`, `metrics.jsonl`, `tensorboard/`,
            `checkpoints/`, `plots/` and `summary.json`.
        resume: Whether to continue at the newest checkpoint in `run_dir`; at step 0 if the run died before
            its first.
        console: Where to show progress; standard output if None.

    Returns:
        The exit code: 0, or 130 or 143 when SIGINT (Ctrl-C) or SIGTERM stopped the run, after a last
        checkpoint.

    Raises:
        UserError: For what a user can mend. Checkpoints written before it are whole.
        OSError: If a file cannot be read or written. Checkpoints written before it are whole.
    """
    terminal = Terminal(config.steps, (console or Console()) if is_first() else Console(quiet=True))
    with user_errors():
        placement = Placement(config.mesh)
    try:
        with placement.active():
            return _train(config, run_dir, placement, resume=resume, terminal=terminal)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise UserError(
            f"process {jax.process_index()} lost another one ({error}); see what that one said, then continue with: "
            f"jmoe-train --resume {run_dir}, in all processes"
        ) from error


def _train(config: TrainConfig, run_dir: Path, placement: Placement, *, resume: bool, terminal: Terminal) -> int:
    with user_errors():
        tokenizer = tokenizer_of(config)
        corpus = corpus_of(config)
        graph = graph_of(config.model)
        schedule = make_schedule(config.optimizer, config.steps)
        optimizer = make_optimizer(config.optimizer, config.steps)
    training = train_loader(config, corpus, tokenizer, placement)
    validation = validation_loader(config, corpus, tokenizer, placement)
    eval_step = make_eval_step(graph)

    def new_state() -> TrainState:
        return init_state(config.model, optimizer, config.seed)

    with (
        named_os_errors(run_dir),
        contextlib.closing(Checkpoints(run_dir, config.checkpoint)) as checkpoints,
        contextlib.closing(iter(training)) as batches,
    ):
        if checkpoints.steps and not resume:
            raise UserError(
                f"run folder {run_dir} holds a run already: continue it with --resume {run_dir}, "
                "or choose another --run-dir"
            )
        with user_errors():
            shapes = placement.shapes(new_state)
        if checkpoints.steps:
            state, position = checkpoints.restore(checkpoints.latest_step(), shapes)
            batches.set_state(position)
        else:
            with user_errors():
                state = jax.jit(new_state, out_shardings=shardings_of(shapes))()
        first_step = int(state.step)
        if is_first():
            write_config(config, run_dir)
            truncate_metrics(run_dir, first_step)
        terminal.describe_run(config, corpus, state.params, run_dir)

        with user_errors():  # Tracing is where the model judges its arguments.
            position, batch = batches.get_state(), next(batches)
            batches.set_state(position)
            train_step = make_train_step(graph, optimizer, schedule, config.accumulation_steps, shardings_of(shapes))
            train_step = train_step.lower(state, batch).compile()

        step, stopping = first_step, None
        with (
            contextlib.closing(MetricsWriter(run_dir) if is_first() else NoMetrics()) as writer,
            StopRequest() if jax.process_count() == 1 else StopTogether() as stop,
            terminal.progress(first_step),
        ):
            recorder = _Recorder(
                writer,
                terminal,
                first_step=first_step,
                tokens_per_step=config.batch_size * config.sequence_length,
                tokens_per_byte=tokens_per_byte(corpus.validation, tokenizer),
            )
            for step in range(first_step + 1, config.steps + 1):
                state, metrics = train_step(state, next(batches))
                is_last = step == config.steps
                if is_last or step % config.log_every == 0:
                    recorder.add(step, metrics)
                stopping = stop.after(step)
                saves = is_last or step % config.checkpoint.every == 0
                evaluation = None
                if saves or step % config.evaluation.every == 0:
                    recorder.flush()
                    evaluation = evaluate(eval_step, state.params, validation, config.evaluation.num_batches)
                    recorder.validated(step, evaluation)
                if saves or stopping:
                    # Records first: beside a checkpoint lie the records of all its steps, whenever the process dies.
                    recorder.flush()
                    writer.flush()
                    loss = None if evaluation is None else evaluation.loss
                    checkpoints.save(step, state, batches.get_state(), validation_loss=loss)
                if stopping:
                    break
            checkpoints.wait()
    if stopping and step < config.steps:
        terminal.say(f"Stopped by {stopping.name} after step {step}; continue with: jmoe-train --resume {run_dir}")
        return 128 + stopping  # what shells report for a process that died of the signal
    summary = summarize(config, run_dir, corpus, tokenizer, graph, eval_step, state.params, validation)
    if summary:
        terminal.show(summary)
    return 0


class _Recorder:
    """Writes the metrics of a step once a later one is under way, so that no step waits for them."""

    def __init__(
        self,
        writer: MetricsWriter,
        terminal: Terminal,
        *,
        first_step: int,
        tokens_per_step: int,
        tokens_per_byte: float,
    ):
        self._writer, self._terminal = writer, terminal
        self._tokens_per_step, self._tokens_per_byte = tokens_per_step, tokens_per_byte
        self._pending: tuple[int, Metrics] | None = None
        # The step, and when it was done, that the next rate is measured from.
        self._mark = first_step, time.monotonic()

    def add(self, step: int, metrics: Metrics) -> None:
        """Starts copying the metrics of `step` to the host, and writes those that were added before."""
        for value in metrics.values():
            value.copy_to_host_async()
        self.flush()
        self._pending = step, metrics

    def flush(self) -> None:
        """Writes the metrics that were added last, waiting for them."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values: dict[str, Any] = {f"train/{name}": value for name, value in jax.device_get(metrics).items()}
        loss = float(values["train/loss"])
        _require_finite(step, loss)
        if not values[EXPERT_LOAD].size:
            del values[EXPERT_LOAD]  # A dense model has no experts.
        values[TRAIN_BITS_PER_BYTE] = values["train/cross_entropy"] / math.log(2) * self._tokens_per_byte
        rate = self._tokens_per_second(step)
        self._writer.write(step, values | {"train/tokens_per_second": rate})
        self._terminal.update(step, loss, rate)

    def validated(self, step: int, evaluation: Evaluation) -> None:
        """Writes the result of an evaluation after `step`."""
        _require_finite(step, evaluation.loss)  # before the checkpoint that it judges is written
        bits = evaluation.bits_per_byte(evaluation.num_targets / self._tokens_per_byte)
        self._writer.write(step, {"validation/loss": evaluation.loss, VALIDATION_BITS_PER_BYTE: bits})
        self._terminal.say(f"step {step}: validation text at {bits:.3f} bits per byte")
        self._mark = step, time.monotonic()  # An evaluation's time is no part of the steps' rate.

    def _tokens_per_second(self, step: int) -> float:
        (last_step, last_time), self._mark = self._mark, (step, time.monotonic())
        return (step - last_step) * self._tokens_per_step / (self._mark[1] - last_time)


def _require_finite(step: int, loss: float) -> None:
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss} at step {step}: lower optimizer.learning_rate or optimizer.clip_norm")
