"""Command lines to frozen dataclasses: tyro reads them, and each mistake in them becomes one line."""

import contextlib
import io
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import tyro

from train.config import CONFIG_FILE, TrainConfig, preset, yaml_arguments
from train.failure import UserError, user_errors

_MARKERS = (tyro.conf.FlagConversionOff,)


def parse[T](
    command: type[T],
    arguments: Sequence[str],
    *,
    default: T | None = None,
    prog: str = "jmoe-train",
    description: str | None = None,
) -> T:
    """Reads a command line into a dataclass.

    Args:
        command: The dataclass.
        arguments: The command line, without the program's name.
        default: Values of the fields that are not given; those of the dataclass if None.
        prog: How the program is called, for its help.
        description: What the help says first; the dataclass's docstring if None.

    Raises:
        UserError: If it is not such a command line.
        SystemExit: With code 0, when it asks for help.
    """
    with _one_line():
        return tyro.cli(
            command,
            args=arguments,
            default=tyro.MISSING_NONPROP if default is None else default,
            prog=prog,
            description=description,
            config=_MARKERS,
        )


def split[T](command: type[T], arguments: Sequence[str]) -> tuple[T, list[str]]:
    """Reads what belongs to a dataclass from a command line, and returns it with the rest.

    Raises:
        UserError: If an argument of the dataclass has a wrong value.
    """
    with _one_line():
        found = tyro.cli(command, args=arguments, return_unknown_args=True, add_help=False, config=_MARKERS)
    return cast(tuple[T, list[str]], found)


def load_config(run_dir: Path) -> TrainConfig:
    """The configuration in a run folder.

    Raises:
        UserError: If there is none, or it is damaged.
    """
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run folder: it has no {CONFIG_FILE}")
    return with_file(preset("tiny"), path)


def with_file(config: TrainConfig, path: Path) -> TrainConfig:
    """`config` with the fields that a YAML file sets.

    Raises:
        OSError: If the file cannot be read.
        UserError: If it is not YAML, or does not fit the configuration.
    """
    with user_errors():
        arguments = yaml_arguments(path)
    try:
        return parse(TrainConfig, arguments, default=config)
    except UserError as error:
        raise UserError(f"config file {path}: {error}") from error


@contextlib.contextmanager
def _one_line():
    """Turns the box that tyro prints about a mistake into a `UserError`."""
    box = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    try:
        with contextlib.redirect_stderr(box):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        box.seek(0)
        raise UserError(_message(box.read())) from None


def _message(box: str) -> str:
    """The first paragraph in a box and the option it proposes; tyro draws the box in ASCII if it must."""
    lines = [line.strip("│ ") for line in box.splitlines()]
    body = list(itertools.dropwhile(_is_rule, lines[1:]))
    message = " ".join(itertools.takewhile(lambda line: not _is_rule(line), body))
    proposal = re.search(r"Perhaps you meant:\n+(--\S+)", "\n".join(body))
    return f"{message}; did you mean {proposal[1]}?" if proposal else message


def _is_rule(line: str) -> bool:
    return not line.strip("─-")
