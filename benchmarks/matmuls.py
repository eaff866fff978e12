"""The grouped matmuls that are measured, and how a result is judged: the same for every framework."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int32

Operation = Literal["forward", "transposed", "weight_gradient"]
"""By groups: forward `[M, K] @ [G, K, N]` and its gradients `[M, N] @ [G, K, N]^T` and `[M, K]^T @ [M, N]`."""

TOLERANCE = 1e-2
"""Relative error of a bfloat16 result that no correct product reaches: rounding alone gives 2e-3."""

_NUM_ROWS, _NUM_GROUPS, _NUM_COLUMNS = 24, 3, 32


@dataclasses.dataclass(frozen=True)
class Problem:
    """M rows in G groups, each multiplied with its group's own [K, N], in bfloat16."""

    name: str
    M: int
    K: int
    N: int
    G: int

    @property
    def flops(self) -> int:
        """Floating-point operations of each of the three operations."""
        return 2 * self.M * self.K * self.N

    def random_group_sizes(self, seed: int) -> Int32[np.ndarray, " G"]:
        """Draws the groups of M rows: uniform and independent, as a balanced router sends them."""
        shares = np.full(self.G, 1 / self.G)
        return np.random.default_rng(seed).multinomial(self.M, shares).astype(np.int32)

    def equal_group_sizes(self, num_groups: int) -> Int32[np.ndarray, " groups"]:
        """Cuts the M rows into groups of one size."""
        return np.full(num_groups, self.M // num_groups, np.int32)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to compute one operation.

    Attributes:
        operation: What it computes, an `Operation` or one of another program.
        implementation: How it is called in the results.
        prepare: Compiles; returns the function to time, and facts for its record.
        relative_error: Compares a result with float32 products, on a sample.
        wait: Waits for a result.
    """

    operation: str
    implementation: str
    prepare: Callable[[], tuple[Callable[[], Any], dict[str, Any]]]
    relative_error: Callable[[Any], float]
    wait: Callable[[Any], object]


class Sample(NamedTuple):
    """What of a result is compared: some rows of [M, .], or some rows of some groups' [K, N].

    Attributes:
        rows: Rows among the M, the first and last of some groups among them.
        row_group: The group of each.
        groups: Some groups that have rows.
        start: The first row of each.
        end: The row after the last of each.
        columns: Some of the K.
    """

    rows: Int32[np.ndarray, " rows"]
    row_group: Int32[np.ndarray, " rows"]
    groups: Int32[np.ndarray, " groups"]
    start: Int32[np.ndarray, " groups"]
    end: Int32[np.ndarray, " groups"]
    columns: Int32[np.ndarray, " columns"]


def draw_sample(problem: Problem, group_sizes: Int32[np.ndarray, " groups"], seed: int) -> Sample:
    """Draws what to compare of a result with these groups."""
    draw = np.random.default_rng(seed)
    ends = np.cumsum(group_sizes)
    groups = draw.choice(np.flatnonzero(group_sizes), _NUM_GROUPS)
    start, end = ends[groups] - group_sizes[groups], ends[groups]
    rows = np.concatenate([draw.integers(problem.M, size=_NUM_ROWS), start, end - 1, [0, problem.M - 1]])
    columns = draw.integers(problem.K, size=_NUM_COLUMNS)
    sample = Sample(rows, np.searchsorted(ends, rows, side="right"), groups, start, end, columns)
    return Sample(*(array.astype(np.int32) for array in sample))
