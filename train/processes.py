"""Runs of several processes: how they find each other, and how they stop together."""

import functools
import os
import signal
from dataclasses import dataclass
from types import TracebackType

import jax
from jax.experimental import multihost_utils

HEARTBEAT_SECONDS = 20
"""After so long without a sign of life a process counts as dead, and the others end."""

_SHUTDOWN_SECONDS = 20


@dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """How the processes of a run find each other, where no cluster environment tells.

    Attributes:
        coordinator: Address of the first process, HOST:PORT.
        num_processes: How many there are.
        process_id: Which of them this is, from 0.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def in_cluster() -> bool:
    """Says whether the environment is that of one of several processes that JAX can tell apart.

    These are SLURM's, Open MPI's, those of an indexed job of Kubernetes, and those of a slice of TPUs.
    """
    several = (os.environ.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    return (
        any(count.isdecimal() and int(count) > 1 for count in several)
        or {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys()
        or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    )


def join(options: ProcessOptions) -> None:
    """Connects this process with the others of its run, if it is told of any or finds itself in a cluster.

    Must be called before JAX computes anything.

    Raises:
        ValueError: If some of the options are missing or out of range.
        RuntimeError: If the others cannot be reached.
    """
    given = options.coordinator, options.num_processes, options.process_id
    initialize = functools.partial(
        jax.distributed.initialize,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )
    if given == (None, None, None):
        if in_cluster():
            initialize()
        return
    if (
        options.coordinator is None
        or options.num_processes is None
        or options.process_id is None
        or not 0 <= options.process_id < options.num_processes
    ):
        raise ValueError(
            "coordinator, num_processes and process_id must be given together, as in --coordinator host:1234 "
            f"--num-processes 2 --process-id 0, with process_id less than num_processes; got {options.coordinator}, "
            f"{options.num_processes} and {options.process_id}"
        )
    initialize(*given)


def is_first() -> bool:
    """Says whether this process writes what is written once, and speaks for all."""
    return jax.process_index() == 0


class StopTogether:
    """While entered, lets all processes of a run stop after the same step once one of them gets SIGINT or SIGTERM.

    JAX notes SIGTERM and chooses a step that no process has passed; SIGINT is passed on as SIGTERM.
    """

    def __init__(self):
        self._calls = 0

    def __enter__(self) -> "StopTogether":
        self._previous = signal.signal(signal.SIGINT, lambda *_: signal.raise_signal(signal.SIGTERM))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def after(self, step: int) -> signal.Signals | None:
        """Returns the signal to stop for after this step, or None."""
        del step
        # Counted from here: JAX would choose step 1 for a signal that comes before the first step of a continued run.
        self._calls += 1
        return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(self._calls) else None
