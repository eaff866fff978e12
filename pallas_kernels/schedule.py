"""The block schedule: which rows of which group each block of a grouped kernel works on."""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Integer, Shaped


@no_type_check  # under vmap the arrays have one more axis
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockSchedule:
    """The rows of every group, cut into blocks, with a static number of slots B.

    Block b works on rows `start[b] : start[b] + size[b]`, which all belong to group `group[b]`. The blocks with
    work come first, ordered by row; the slots after `num_used` are padding and carry zero rows.

    Attributes:
        group: i32[B], the group of each block; the rows past the last group, where they were asked for, belong to
            group G.
        start: i32[B], the first row of each block.
        size: i32[B], the number of rows of each block, between 1 and `block_rows`; 0 in padding blocks.
        num_used: i32[], how many blocks have rows.
    """

    group: Int32[Array, " B"]
    start: Int32[Array, " B"]
    size: Int32[Array, " B"]
    num_used: Int32[Array, ""]


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileSchedule:
    """The blocks of every group times the column blocks of its result, in the order in which to visit them.

    The row blocks of a group are cut into bands, as equal as can be, which are visited down their rows and then
    across their columns. The tiles in work at a time then share both operands in the cache, most of all where their
    rows and columns together are fewest: where a band is as high as the columns beside it are wide. The tiles after
    `last_block[-1]` times the column blocks are padding and carry zero rows.

    Attributes:
        group: i32[tiles], as in `BlockSchedule`.
        start: i32[tiles], as in `BlockSchedule`.
        size: i32[tiles], as in `BlockSchedule`.
        column_block: i32[tiles], the column block of each tile.
        last_block: i32[groups], the number of the row block after the last one of each group. Where the rows past the
            last group have tiles too, these are one more group.
    """

    group: Int32[Array, " tiles"]
    start: Int32[Array, " tiles"]
    size: Int32[Array, " tiles"]
    column_block: Int32[Array, " tiles"]
    last_block: Int32[Array, " groups"]


def group_bounds(
    group_sizes: Integer[Array, " G"], num_rows: int, *, cover_remainder: bool = False
) -> tuple[Int32[Array, " groups"], Int32[Array, " groups"]]:
    """Computes the first row of each group and the row after its last, with the groups laid end to end.

    Sizes that sum to more than `num_rows` are clipped there; a negative size counts as 0. With `cover_remainder` the
    rows past the last group are one more group.
    """
    # A bound that the sizes' own dtype cannot hold would wrap around in it.
    largest = min(num_rows, jnp.iinfo(group_sizes.dtype).max)
    sizes = jnp.clip(group_sizes, 0, largest).astype(jnp.int32)
    if cover_remainder:
        sizes = jnp.pad(sizes, (0, 1), constant_values=num_rows)
    group = jnp.arange(sizes.size, dtype=jnp.int32)

    def clipped_sum(counts: Bool[Array, "groups groups"]) -> Int32[Array, " groups"]:
        total = jnp.minimum(_masked_sum(counts, sizes), num_rows)
        if sizes.size * num_rows > jnp.iinfo(jnp.int32).max:
            # Integers wrap around where the sizes sum to 2^31 or more, which a float32 sum is sure to notice.
            total = jnp.where(_masked_sum(counts, sizes.astype(jnp.float32)) > 2.0**30, num_rows, total)
        return total

    return clipped_sum(group < group[:, None]), clipped_sum(group <= group[:, None])


def _masked_sum(counts: Bool[Array, "rows G"], x: Shaped[Array, " G"]) -> Shaped[Array, " rows"]:
    """Sums the elements of x that count, for each row of a mask.

    With masks of neighbours this is a running sum or a look-up. Quadratic, but reductions over the same mask become
    one kernel on a GPU, where `jnp.cumsum` and gathers are several: G is small, and a schedule is made before each
    matmul.
    """
    return jnp.sum(jnp.where(counts, x, 0), axis=1, dtype=x.dtype)


def max_num_blocks(num_groups: int, *, num_rows: int, block_rows: int, alignment: int = 1) -> int:
    """Computes the static bound `ceil(rows / block_rows) + groups - 1` on the blocks that groups can need.

    Cutting at aligned rows makes every group but the first up to `alignment - 1` rows longer.
    """
    rows = num_rows + (num_groups - 1) * (alignment - 1)
    return -(-rows // block_rows) + num_groups - 1


def make_block_schedule(
    group_sizes: Integer[Array, " G"],
    *,
    num_rows: int,
    block_rows: int,
    alignment: int = 1,
    cover_remainder: bool = False,
) -> BlockSchedule:
    """Cuts the rows of every group into blocks of at most `block_rows` rows.

    The groups lie end to end from row 0. Every row of every group is in exactly one block, and no block holds rows
    of two groups. The number of slots is static, `max_num_blocks`, so that the schedule can be made under
    `jax.jit` from group sizes that are data; it has the role of the metadata of MegaBlocks' block-sparse
    matrices (arXiv 2211.15841, section 5.1).

    Args:
        group_sizes: int[G], the rows of each group. Sizes that sum to more than `num_rows` are clipped there; a
            negative size counts as 0.
        num_rows: the rows that there are.
        block_rows: the most rows of a block.
        alignment: every block but the first of a group starts at a multiple of this; it divides `block_rows`.
            A kernel may then read whole aligned windows of `block_rows` rows from `start // alignment * alignment`.
        cover_remainder: whether the rows past the last group get blocks too, as group G.

    Returns:
        A `BlockSchedule` of int32 arrays.

    Raises:
        ValueError: `group_sizes` is not a vector of integers with at least one element, `num_rows` is
            negative or above 2^30, or `alignment` does not divide `block_rows`.

    Example:
        >>> import jax.numpy as jnp
        >>> schedule = make_block_schedule(jnp.array([3, 0, 5]), num_rows=8, block_rows=4)
        >>> schedule.group.tolist(), schedule.start.tolist(), schedule.size.tolist()
        ([0, 2, 2, 0], [0, 3, 7, 0], [3, 4, 1, 0])
    """
    tiles = make_tile_schedule(
        group_sizes,
        num_rows=num_rows,
        block_rows=block_rows,
        alignment=alignment,
        cover_remainder=cover_remainder,
        column_blocks=1,
        band_rows=1,
    )
    return BlockSchedule(tiles.group, tiles.start, tiles.size, tiles.last_block[-1])


def make_tile_schedule(
    group_sizes: Integer[Array, " G"],
    *,
    num_rows: int,
    block_rows: int,
    alignment: int = 1,
    cover_remainder: bool = False,
    column_blocks: int,
    band_rows: int,
) -> TileSchedule:
    """Cuts the rows of every group into blocks, and orders these blocks times the column blocks of the result.

    Args:
        group_sizes: as in `make_block_schedule`, like all arguments up to `cover_remainder`.
        num_rows: the rows that there are.
        block_rows: the most rows of a tile.
        alignment: what the first row of a tile that is not the first of its group is a multiple of.
        cover_remainder: whether the rows past the last group get tiles too, as group G; they come last.
        column_blocks: the number of column blocks.
        band_rows: how many row blocks a band should have; a group gets as many bands as come closest to that.

    Returns:
        A `TileSchedule` of int32 arrays, `max_num_blocks * column_blocks` long.

    Raises:
        ValueError: as `make_block_schedule`.
    """
    if group_sizes.ndim != 1 or not group_sizes.size or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(
            f"group_sizes is {group_sizes.dtype}{list(group_sizes.shape)}; it must be a vector of integers, [G]."
        )
    if not 0 <= num_rows <= 2**30:
        raise ValueError(f"num_rows is {num_rows}; it must be from 0 to 2^30.")
    if block_rows < 1 or alignment < 1 or block_rows % alignment:
        raise ValueError(f"block_rows is {block_rows}; it must be a positive multiple of alignment, {alignment}.")

    start, end = group_bounds(group_sizes, num_rows, cover_remainder=cover_remainder)
    num_blocks = jnp.where(end > start, -(-(end - start // alignment * alignment) // block_rows), 0)
    group = jnp.arange(start.size, dtype=jnp.int32)
    last_block = _masked_sum(group <= group[:, None], num_blocks)

    slots = max_num_blocks(start.size, num_rows=num_rows, block_rows=block_rows, alignment=alignment)
    block = jnp.arange(slots, dtype=jnp.int32)
    is_of_group = (block[:, None] < last_block) & (block[:, None] >= last_block - num_blocks)
    # Padding blocks are of no group, so that every number of theirs is 0. The sums are by block, which is the same for
    # all matmuls of a layer, whatever their column blocks.
    of_block = [_masked_sum(is_of_group, x) for x in (group, start, end, num_blocks, last_block)]
    tile = jnp.arange(slots * column_blocks, dtype=jnp.int32)
    group, start, end, height, past_last = (jnp.repeat(x, column_blocks) for x in of_block)
    num_bands = jnp.maximum((height + band_rows // 2) // band_rows, 1)
    band_height = jnp.maximum(-(-height // num_bands), 1)
    in_group = jnp.where(height > 0, tile - (past_last - height) * column_blocks, 0)
    band, in_band = in_group // (band_height * column_blocks), in_group % (band_height * column_blocks)
    height_here = jnp.clip(height - band * band_height, 1, band_height)
    block_window = start // alignment * alignment + (band * band_height + in_band % height_here) * block_rows
    block_start = jnp.maximum(block_window, start)
    return TileSchedule(
        group=group,
        start=block_start,
        size=jnp.minimum(block_window + block_rows, end) - block_start,
        column_block=in_band // height_here,
        last_block=last_block,
    )
