"""The configuration that a Hopper kernel runs with: a measured one if there is one, else a rule's.

Tables of measured configurations are JSON files, made by `python -m pallas_kernels.tune`. They are looked up while a
kernel is traced, never inside a compiled function: first those that come with the package, one for each kind of
device, then the user's own file. Each is read once in a process.
"""

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.device import device_kind

TABLES = Path(__file__).parent / "tables"
CACHE_VARIABLE = "PALLAS_KERNELS_TUNING"


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a measured configuration is for.

    Attributes:
        kernel: "grouped_matmul", "grouped_matmul_transposed" or "grouped_weight_gradient".
        device_kind: the device, as JAX names it.
        dtype: of the operands.
        out_dtype: of the result.
        k: columns of `lhs`: the contracted width, or the rows of a weight gradient.
        n: columns of the result.
        num_groups: G.
        rows_per_group: the greatest power of two up to the mean rows of a group, at least 1.
    """

    kernel: str
    device_kind: str
    dtype: str
    out_dtype: str
    k: int
    n: int
    num_groups: int
    rows_per_group: int

    @classmethod
    def of(
        cls,
        kernel: str,
        *,
        dtype: jax.typing.DTypeLike,
        out_dtype: jax.typing.DTypeLike,
        k: int,
        n: int,
        num_groups: int,
        num_rows: int,
    ) -> "Problem":
        """Describes a problem on the device that computations run on by default."""
        mean = max(num_rows // num_groups, 1)
        return cls(
            kernel=kernel,
            device_kind=device_kind(),
            dtype=jnp.dtype(dtype).name,
            out_dtype=jnp.dtype(out_dtype).name,
            k=k,
            n=n,
            num_groups=num_groups,
            rows_per_group=1 << (mean.bit_length() - 1),
        )


def choose_config[C](problem: Problem, rule: C) -> C:
    """Returns the measured configuration of a problem, or else what a rule says.

    Args:
        problem: what is to be computed.
        rule: the configuration to use where none was measured, a frozen dataclass; fields that a table leaves out
            are its.

    Raises:
        ValueError: a table cannot be read or names fields that the configuration lacks.
    """
    for path in (*_packaged_tables(), cache_path()):
        fields = read_table(path).get(problem)
        if fields is not None:
            try:
                return dataclasses.replace(rule, **fields)  # pyright: ignore[reportArgumentType, reportCallIssue]
            except TypeError as error:
                raise ValueError(
                    f"{path} has a configuration for {problem.kernel} that does not fit this version ({error}); make "
                    "it anew with `python -m pallas_kernels.tune`."
                ) from error
    return rule


def cache_path() -> Path:
    """Where the user's own measurements are: $PALLAS_KERNELS_TUNING, or a file in the user's cache folder."""
    if path := os.environ.get(CACHE_VARIABLE):
        return Path(path)
    # Not Path.home(), which fails where the user has no home, as in some containers.
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(caches) / "pallas_kernels" / "tuning.json"


@functools.cache
def read_table(path: Path) -> dict[Problem, dict[str, Any]]:
    """Reads the configurations of a table; a file that is not there has none.

    Raises:
        ValueError: the file is not such a table.
    """
    return {Problem(**entry["problem"]): entry["config"] for entry in read_entries(path)}


def read_entries(path: Path) -> list[dict[str, Any]]:
    """Reads a table as it was written: for each problem its configuration, and what was measured.

    A file that is not there, or that this user may not see, has none.

    Raises:
        ValueError: the file is not such a table.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
        for entry in entries:
            # Whoever uses an entry may take these to be so.
            Problem(**entry["problem"])
            dict(entry["config"])
        return entries
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        # Where a home is /dev/null, or another user's, kernels must run all the same.
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no table of configurations ({type(error).__name__}: {error}); remove it, or make it anew with "
            "`python -m pallas_kernels.tune`."
        ) from error


def write_entries(path: Path, entries: list[dict[str, Any]]) -> None:
    """Writes a table; it is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".new")
    draft.write_text(json.dumps({"entries": entries}, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)
    read_table.cache_clear()


def _packaged_tables() -> list[Path]:
    return sorted(TABLES.glob("*.json"))
