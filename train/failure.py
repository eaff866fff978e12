"""The failures a user can mend: each becomes one line on stderr and exit code 2, with no traceback."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """What went wrong and what to do about it, in one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns the ValueErrors of a block whose only inputs are the user's into `UserError`s.

    Example:
        >>> with user_errors():
        ...     raise ValueError("top_k must be at most num_experts = 8, got 9")
        Traceback (most recent call last):
        train.failure.UserError: top_k must be at most num_experts = 8, got 9
    """
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


@contextmanager
def named_os_errors(folder: Path) -> Iterator[None]:
    """Names `folder` in the OSErrors of a block that name no file, as those of writes do."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(folder)
        raise


def describe_os_error(error: OSError) -> str:
    """The reason and the file of an OSError, such as "No space left on device: runs/demo/metrics.jsonl"."""
    reason = error.strerror or str(error)
    return f"{reason}: {error.filename}" if error.filename else reason
