"""Ctrl-C and the termination signal, turned into a request that the training loop sees between two steps."""

import signal
from types import FrameType, TracebackType


class StopRequest:
    """While entered, notes SIGINT and SIGTERM instead of dying of them; a second one has its usual effect.

    Attributes:
        signal: The signal that was caught, or None.

    Example:
        >>> with StopRequest() as stop:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     stop.signal.name
        'SIGTERM'
    """

    def __init__(self):
        self.signal: signal.Signals | None = None

    def after(self, step: int) -> signal.Signals | None:
        """Returns the signal to stop for after this step, or None."""
        del step
        return self.signal

    def __enter__(self) -> "StopRequest":
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
