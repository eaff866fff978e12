"""What a run shows: a progress bar on a terminal, plain lines elsewhere, and a summary at the end."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import jax
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from train.config import TrainConfig
from train.data import Corpus
from train.step import Params
from train.summary import Summary

_PLAIN_LINE_SECONDS = 5.0


class Terminal:
    """Shows a run to a person, on a terminal or in a log.

    Args:
        num_steps: Steps of the whole run.
        console: Where to write.
    """

    def __init__(self, num_steps: int, console: Console):
        self._console = console
        self._num_steps = num_steps
        self._progress = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=num_steps, start=False, numbers="")
        self._first_step = 0
        self._start = self._last_line = time.monotonic()

    def describe_run(self, config: TrainConfig, corpus: Corpus, params: Params, run_dir: Path) -> None:
        """Says what is about to be trained, on what and where, while the step compiles."""
        num_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        self.say(f"Data: {corpus.description}")
        self.say(
            f"Model: {num_parameters:,} parameters; computes in {config.model.dtype} on {jax.devices()[0].device_kind}"
        )
        self.say(f"Run folder: {run_dir}")
        self.say("Compiling the training step ...")

    @contextmanager
    def progress(self, first_step: int) -> Iterator[None]:
        """Shows the progress of steps; the run starts at `first_step`."""
        self._first_step = first_step
        self._start = self._last_line = time.monotonic()
        self._progress.update(self._task, completed=first_step)
        self._progress.start_task(self._task)
        with self._progress:
            yield

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Shows how far the run is; where there is no terminal, as one line every few seconds.

        Args:
            step: Steps done.
            loss: The objective at that step.
            tokens_per_second: Rate of late.
        """
        numbers = f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s"
        self._progress.update(self._task, completed=step, numbers=numbers)
        now = time.monotonic()
        if self._console.is_terminal or (now - self._last_line < _PLAIN_LINE_SECONDS and step < self._num_steps):
            return
        self._last_line = now
        seconds_per_step = (now - self._start) / (step - self._first_step)
        left = timedelta(seconds=round((self._num_steps - step) * seconds_per_step))
        self.say(f"step {step}/{self._num_steps}  {numbers}  {left} left")

    def say(self, line: str) -> None:
        """Writes one line, above the progress bar."""
        self._console.print(escape(line), highlight=False, soft_wrap=True)

    def show(self, summary: Summary) -> None:
        """Writes the table of bits per byte, the sample, and where the plots are."""
        show_bits_per_byte(self._console, summary.bits_per_byte, summary.baselines)
        sample = Text.assemble((summary.prompt, "bold"), summary.continuation)
        self._console.print(Panel(sample, title="A sample", title_align="left"))
        for what, path in summary.plots.items():
            self.say(f"{what}: {path}")


def show_bits_per_byte(console: Console, model: float, baselines: Mapping[str, float]) -> None:
    """Writes a table of what the validation text costs the model and simple predictors."""
    table = Table(title="Validation text", title_justify="left")
    table.add_column("predictor")
    table.add_column("bits per byte", justify="right")
    table.add_column("saved by the model", justify="right")
    table.add_row("this model", f"{model:.3f}", "", style="bold")
    for name, value in baselines.items():
        table.add_row(name, f"{value:.3f}", f"{value - model:+.3f}")
    console.print(table)
