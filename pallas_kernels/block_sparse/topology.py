"""Which blocks of a matrix are nonzero, in both orders, and in what order kernels visit them."""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Int32, Integer

from pallas_kernels.schedule import group_bounds, max_num_blocks

_TILE_COLUMNS = 256  # of `sdd` where rows are contiguous: the wider, the less of shared memory is read for each product
_BAND_ROWS = 8  # the block rows whose tiles are visited down before across, so that those in work share operands


class BlockLines(NamedTuple):
    """The blocks of each line, which is a block row or a block column, one line after the other.

    Attributes:
        blocks: int32[B, 2], the number of each block among the values, and its place along its line.
        bounds: int32[lines, 3], a line, its first element of `blocks`, and the one after its last; the lines with most
            blocks first, so that those left at the end, when some multiprocessors have nothing to do, are short.
    """

    blocks: Int32[Array, "B 2"]
    bounds: Int32[Array, "lines 3"]


@no_type_check  # JAX also builds pytrees of other shapes and of things that are no arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Topology:
    """Where the nonzero blocks of a matrix are: blocked compressed rows, with coordinates and a transposed order.

    This is the hybrid blocked-CSR-COO format with transpose indices of MegaBlocks (arXiv 2211.15841, sections 5.1.1
    to 5.1.4). The number of slots B is static; the blocks come first, ordered by row and column, and what follows
    `row_offsets[-1]` is padding, which belongs to no row.

    Attributes:
        row_indices: int32[B], the block row of each block; the number of block rows in padding.
        column_indices: int32[B], the block column of each block; the number of block columns in padding.
        row_offsets: int32[rows / block + 1]; the blocks of row r are those from `row_offsets[r]` to
            `row_offsets[r + 1]`.
        column_offsets: int32[columns / block + 1], the same for columns, in the transposed order.
        transposed_order: int32[B], the numbers of the blocks ordered by column and row.
        row_lines: the blocks by rows, for kernels.
        column_lines: the blocks by columns, for kernels.
        tiles: int32[tiles, 4], for kernels: the number of the first block of each tile, its row, its column, and how
            many blocks the tile has, neighbours in a row.
        num_tiles: int32[1].
        shape: of the matrix, in elements.
        block: rows and columns of a block.
        blocks_per_tile: the most blocks of a tile.
    """

    row_indices: Int32[Array, " B"]
    column_indices: Int32[Array, " B"]
    row_offsets: Int32[Array, " _"]
    column_offsets: Int32[Array, " _"]
    transposed_order: Int32[Array, " B"]
    row_lines: BlockLines
    column_lines: BlockLines
    tiles: Int32[Array, "_ 4"]
    num_tiles: Int32[Array, " 1"]
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    block: int = dataclasses.field(metadata={"static": True})
    blocks_per_tile: int = dataclasses.field(metadata={"static": True})

    @property
    def max_num_blocks(self) -> int:
        """The static number of slots, B."""
        return self.row_indices.shape[0]

    @property
    def num_blocks(self) -> Int32[Array, ""]:
        """How many blocks there are."""
        return self.row_offsets[-1]

    @property
    def is_block(self) -> Bool[Array, " B"]:
        """Says of each slot whether it is a block, and not padding."""
        return jnp.arange(self.max_num_blocks) < self.num_blocks

    @classmethod
    def from_mask(
        cls,
        mask: Bool[Array, "rows columns"] | Bool[np.ndarray, "rows columns"],
        *,
        block: int = 128,
        num_blocks: int | None = None,
    ) -> "Topology":
        """Makes the topology of the blocks where a mask is true.

        Args:
            mask: bool[block rows, block columns].
            block: rows and columns of a block.
            num_blocks: how many blocks there can be, needed where the mask is traced; by default as many as it has.
                It must be at least `mask.sum()`: of a traced mask that has more the last ones, in the order of rows,
                are left out.

        Raises:
            ValueError: the mask is no boolean matrix, `block` or `num_blocks` is not positive, the mask is traced and
                `num_blocks` is missing, or it is not traced and has more blocks.

        Example:
            >>> import jax.numpy as jnp
            >>> topology = Topology.from_mask(jnp.array([[False, True], [True, True]]), num_blocks=4)
            >>> topology.row_indices.tolist(), topology.column_indices.tolist(), topology.row_offsets.tolist()
            ([0, 1, 1, 2], [1, 0, 1, 2], [0, 1, 3])
            >>> topology.transposed_order[:3].tolist(), topology.shape
            ([1, 0, 2], (256, 256))
        """
        mask = jnp.asarray(mask)
        if mask.ndim != 2 or mask.dtype != bool:
            raise ValueError(f"mask is {mask.dtype}{list(mask.shape)}; it must be bool[block rows, block columns].")
        if block < 1:
            raise ValueError(f"block is {block}; it must be at least 1.")
        if num_blocks is None and isinstance(mask, Tracer):
            raise ValueError("mask is traced and num_blocks is None; it must be a bound on the mask's blocks.")
        least = 1 if isinstance(mask, Tracer) else max(int(np.asarray(mask).sum()), 1)
        num_blocks = least if num_blocks is None else num_blocks
        if num_blocks < least:
            raise ValueError(f"num_blocks is {num_blocks}; it must be at least {least}, the blocks of the mask or 1.")
        rows, columns = mask.shape
        index = jnp.nonzero(mask.ravel(), size=num_blocks, fill_value=mask.size)[0].astype(jnp.int32)
        row, column = jnp.divmod(index, columns) if mask.size else (index, index)
        column = jnp.where(index < mask.size, column, columns)
        return make_topology(row, column, (rows * block, columns * block), block)

    @classmethod
    def from_indices(
        cls,
        row_indices: Integer[Array, " B"] | Integer[np.ndarray, " B"],
        column_indices: Integer[Array, " B"] | Integer[np.ndarray, " B"],
        shape: tuple[int, int],
        *,
        block: int = 128,
    ) -> "Topology":
        """Makes the topology of the blocks at the given places, which it sorts by row and column.

        Args:
            row_indices: int[B], the block row of each block.
            column_indices: int[B], the block column of each. A place outside the matrix is padding; the others must
                differ.
            shape: of the matrix, in elements, multiples of `block`.
            block: rows and columns of a block.

        Raises:
            ValueError: the indices are no integers or not as many of each and at least one, `shape` is not one of
                whole blocks, or a place that is not traced is there twice.

        Example:
            >>> import jax.numpy as jnp
            >>> topology = Topology.from_indices(jnp.array([1, 0]), jnp.array([0, 2]), (4, 6), block=2)
            >>> topology.row_indices.tolist(), topology.column_indices.tolist(), topology.row_offsets.tolist()
            ([0, 1], [2, 0], [0, 1, 2])
        """
        row, column = jnp.asarray(row_indices), jnp.asarray(column_indices)
        integers = all(jnp.issubdtype(index.dtype, jnp.integer) for index in (row, column))
        if not integers or row.ndim != 1 or row.shape != column.shape or not row.size:
            raise ValueError(
                f"row_indices is {row.dtype}{list(row.shape)} and column_indices {column.dtype}{list(column.shape)}; "
                "they must be integers, as many of each and at least one."
            )
        if block < 1 or any(size < 0 or size % block for size in shape):
            raise ValueError(f"shape is {shape}; it must be of multiples of the block, {block}.")
        rows, columns = (size // block for size in shape)
        is_inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        row, column = (
            jnp.where(is_inside, index, past).astype(jnp.int32) for index, past in ((row, rows), (column, columns))
        )
        row, column = lax.sort((row, column), num_keys=2)
        twice = (row[1:] == row[:-1]) & (column[1:] == column[:-1]) & (row[1:] < rows)
        if not isinstance(twice, Tracer) and twice.any():
            first = int(jnp.argmax(twice))
            place = int(row[first]), int(column[first])
            raise ValueError(f"row_indices and column_indices have the block {place} twice; each must be there once.")
        return make_topology(row, column, tuple(shape), block)

    def may_equal(self, other: "Topology") -> bool:
        """Says whether another topology has the same blocks in the same slots, as far as they are not traced."""
        if (self.shape, self.block, self.max_num_blocks) != (other.shape, other.block, other.max_num_blocks):
            return False
        pairs = (self.row_indices, other.row_indices), (self.column_indices, other.column_indices)
        return all(
            isinstance(mine, Tracer) or isinstance(theirs, Tracer) or np.array_equal(mine, theirs)
            for mine, theirs in pairs
        )


@functools.partial(jax.jit, static_argnames=("shape", "block", "rows_are_contiguous"))
def make_topology(
    row_indices: Int32[Array, " B"],
    column_indices: Int32[Array, " B"],
    shape: tuple[int, int],
    block: int,
    *,
    rows_are_contiguous: bool = False,
) -> Topology:
    """Makes a topology from the coordinates of blocks, in the order of rows and columns, with padding at the end.

    Where each row's blocks are known to lie side by side, kernels may work on several at a time.
    """
    blocks_per_tile = max(_TILE_COLUMNS // block, 1) if rows_are_contiguous else 1
    rows, columns = shape[0] // block, shape[1] // block
    number = jnp.arange(row_indices.size, dtype=jnp.int32)
    row_offsets, column_offsets = _offsets(row_indices, rows), _offsets(column_indices, columns)
    _, transposed_rows, transposed_order = lax.sort((column_indices, row_indices, number), num_keys=2)
    tiles, num_tiles = _make_tiles(row_indices, column_indices, row_offsets, blocks_per_tile)
    return Topology(
        row_indices=row_indices,
        column_indices=column_indices,
        row_offsets=row_offsets,
        column_offsets=column_offsets,
        transposed_order=transposed_order,
        row_lines=_make_lines(number, column_indices, row_offsets),
        column_lines=_make_lines(transposed_order, transposed_rows, column_offsets),
        tiles=tiles,
        num_tiles=num_tiles,
        shape=shape,
        block=block,
        blocks_per_tile=blocks_per_tile,
    )


def expert_topology(
    group_sizes: Integer[Array, " E"], hidden_sizes: Sequence[int], *, num_rows: int, block: int = 128
) -> Topology:
    """Makes the block-diagonal topology of experts' hidden layers: the rows of each times its own columns.

    The rows of each expert are padded to whole blocks, and its columns follow those of the expert before. Each
    expert may have another width, which grouped matmuls cannot offer (MegaBlocks, arXiv 2211.15841, figure 3C).

    Args:
        group_sizes: int[E], the rows of each expert; negative ones and such that sum to more than `num_rows` are
            clipped, as in `make_block_schedule`.
        hidden_sizes: the columns of each expert, static, multiples of `block`.
        num_rows: a bound on the sum of `group_sizes`.
        block: rows and columns of a block.

    Returns:
        A `Topology` of `sum(hidden_sizes)` columns, and of as many rows as groups of any sizes can need.

    Raises:
        ValueError: `hidden_sizes` are no static integers or do not fit `group_sizes` or `block`, or `num_rows` is
            negative.

    Example:
        >>> import jax.numpy as jnp
        >>> topology = expert_topology(jnp.array([3, 0, 2]), [4, 2, 2], num_rows=5, block=2)
        >>> topology.shape, topology.row_offsets.tolist()
        ((10, 8), [0, 2, 4, 5, 5, 5])
        >>> topology.column_indices[:5].tolist()
        [0, 1, 0, 1, 3]
    """
    group_sizes, hidden_sizes = jnp.asarray(group_sizes), static_sizes("hidden_sizes", hidden_sizes)
    num_experts = group_sizes.shape[0] if group_sizes.ndim == 1 else -1
    if len(hidden_sizes) != num_experts or not jnp.issubdtype(group_sizes.dtype, jnp.integer) or not hidden_sizes:
        raise ValueError(
            f"group_sizes is {group_sizes.dtype}{list(group_sizes.shape)} and there are {len(hidden_sizes)} "
            "hidden_sizes; they must be integers, as many of each and at least one."
        )
    if odd := [size for size in hidden_sizes if size < 1 or size % block]:
        raise ValueError(f"hidden_sizes has {odd[0]}; all must be positive multiples of the block, {block}.")
    if num_rows < 0:
        raise ValueError(f"num_rows is {num_rows}; it must not be negative.")
    widths = [size // block for size in hidden_sizes]
    rows = max(max_num_blocks(num_experts, num_rows=num_rows, block_rows=block), 1)
    # Each expert that has rows has one row of blocks, and at most one more for each `block` rows of the others.
    num_slots = sum(widths) + max(widths) * (max(num_rows - 1, 0) // block)
    _, end_row = padded_bounds(group_sizes, num_rows=num_rows, block=block)
    end_row = end_row // block
    width = jnp.array(widths, jnp.int32)
    first_column = jnp.cumsum(width) - width

    row = jnp.arange(rows, dtype=jnp.int32)
    expert = jnp.sum(row[:, None] >= end_row, axis=1)  # E past the last group
    row_end = jnp.cumsum(width.at[expert].get(mode="fill", fill_value=0))
    slot = jnp.arange(num_slots, dtype=jnp.int32)
    of_slot = jnp.searchsorted(row_end, slot, side="right", method="sort").astype(jnp.int32)
    is_block = of_slot < rows
    at = jnp.minimum(of_slot, rows - 1)
    in_row = slot - (row_end[at] - width.at[expert[at]].get(mode="fill", fill_value=0))
    column = first_column.at[expert[at]].get(mode="clip") + in_row
    column = jnp.where(is_block, column, sum(widths))
    return make_topology(of_slot, column, (rows * block, sum(widths) * block), block, rows_are_contiguous=True)


def static_sizes(name: str, sizes: Sequence[int]) -> tuple[int, ...]:
    """Returns the sizes as Python's integers, or raises a ValueError that names the argument."""
    try:
        return tuple(operator.index(size) for size in sizes)
    except TypeError:
        raise ValueError(f"{name} is {sizes!r}; it must be a sequence of static integers.") from None


def padded_bounds(
    group_sizes: Integer[Array, " G"], *, num_rows: int, block: int
) -> tuple[Int32[Array, " G"], Int32[Array, " G"]]:
    """Computes the first row of each group, and the row after its last, where each is padded to whole blocks."""
    start, end = group_bounds(group_sizes, num_rows)
    padded = -(-(end - start) // block) * block
    padded_end = jnp.cumsum(padded)
    return padded_end - padded, padded_end


def _offsets(indices: Int32[Array, " B"], num_lines: int) -> Int32[Array, " _"]:
    """Counts the blocks before each line, which is where its blocks begin in the order of lines."""
    counts = jnp.zeros(num_lines + 1, jnp.int32).at[indices + 1].add(1, mode="drop")
    return jnp.cumsum(counts)


def _make_lines(number: Int32[Array, " B"], place: Int32[Array, " B"], offsets: Int32[Array, " _"]) -> BlockLines:
    begin, end = offsets[:-1], offsets[1:]
    line = jnp.arange(begin.size, dtype=jnp.int32)
    _, line, begin, end = lax.sort((begin - end, line, begin, end), num_keys=1, is_stable=True)
    return BlockLines(jnp.stack([number, place], axis=1), jnp.stack([line, begin, end], axis=1))


def _make_tiles(
    row: Int32[Array, " B"], column: Int32[Array, " B"], row_offsets: Int32[Array, " _"], per_tile: int
) -> tuple[Int32[Array, "_ 4"], Int32[Array, " 1"]]:
    """Joins neighbours in a row to tiles, and orders these by bands of rows, across each band and down its rows."""
    num_rows, num_slots = row_offsets.size - 1, row.size
    number = jnp.arange(num_slots, dtype=jnp.int32)
    in_row = number - row_offsets.at[row].get(mode="clip")
    begins = (row < num_rows) & (in_row % per_tile == 0)
    # A row of n blocks has at most (n + per_tile - 1) / per_tile tiles.
    most = min(num_slots, (num_slots + num_rows * (per_tile - 1)) // per_tile)
    band = jnp.where(begins, row // _BAND_ROWS, num_rows)
    *_, row, first = lax.sort((band, in_row, row, number), num_keys=3)
    row, first = row[:most], first[:most]
    size = jnp.clip(row_offsets.at[row + 1].get(mode="clip") - first, 0, per_tile)
    return jnp.stack([first, row, column[first], size], axis=1), jnp.sum(begins, dtype=jnp.int32)[None]
