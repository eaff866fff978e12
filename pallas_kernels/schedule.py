"""The block schedule: which rows of which group each block of a grouped kernel works on."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Int32


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


def group_bounds(group_sizes: Int[Array, " G"], num_rows: int) -> tuple[Int32[Array, " G"], Int32[Array, " G"]]:
    """Computes the first row of each group and the row after its last, with the groups laid end to end.

    Sizes that sum to more than `num_rows` are clipped there; a negative size counts as 0.
    """
    sizes = jnp.clip(group_sizes, 0, num_rows).astype(jnp.int32)
    ends = jnp.minimum(jnp.cumsum(sizes, dtype=jnp.int32), num_rows)
    return jnp.concatenate([jnp.zeros((1,), jnp.int32), ends[:-1]]), ends


def max_num_blocks(num_groups: int, *, num_rows: int, block_rows: int, alignment: int = 1) -> int:
    """Computes the static bound `ceil(rows / block_rows) + groups - 1` on the blocks that groups can need.

    Cutting at aligned rows makes every group but the first up to `alignment - 1` rows longer.
    """
    rows = num_rows + (num_groups - 1) * (alignment - 1)
    return -(-rows // block_rows) + num_groups - 1


def make_block_schedule(
    group_sizes: Int[Array, " G"],
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
        group_sizes: int[G], the rows of each group. Sizes that sum to more than `num_rows` are clipped there.
        num_rows: the rows that there are, at least the sum of the sizes.
        block_rows: the most rows of a block.
        alignment: every block but the first of a group starts at a multiple of this; it divides `block_rows`.
            A kernel may then read whole aligned windows of `block_rows` rows from `start // alignment * alignment`.
        cover_remainder: whether the rows past the last group get blocks too, as group G.

    Returns:
        A `BlockSchedule` of int32 arrays.

    Raises:
        ValueError: `group_sizes` is not a vector of integers with at least one element, `num_rows` is negative,
            or `alignment` does not divide `block_rows`.

    Example:
        >>> import jax.numpy as jnp
        >>> schedule = make_block_schedule(jnp.array([3, 0, 5]), num_rows=8, block_rows=4)
        >>> schedule.group.tolist(), schedule.start.tolist(), schedule.size.tolist()
        ([0, 2, 2, 0], [0, 3, 7, 0], [3, 4, 1, 0])
    """
    if group_sizes.ndim != 1 or not group_sizes.size or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(
            f"group_sizes is {group_sizes.dtype}{list(group_sizes.shape)}; it must be a vector of integers, [G]."
        )
    if num_rows < 0:
        raise ValueError(f"num_rows is {num_rows}; it must not be negative.")
    if block_rows < 1 or alignment < 1 or block_rows % alignment:
        raise ValueError(f"block_rows is {block_rows}; it must be a positive multiple of alignment, {alignment}.")

    start, end = group_bounds(group_sizes, num_rows)
    if cover_remainder:
        start = jnp.concatenate([start, end[-1:]])
        end = jnp.concatenate([end, jnp.full((1,), num_rows, jnp.int32)])
    num_slots = max_num_blocks(start.size, num_rows=num_rows, block_rows=block_rows, alignment=alignment)

    window = start // alignment * alignment
    num_blocks = jnp.where(end > start, -(-(end - window) // block_rows), 0)
    last_block = jnp.cumsum(num_blocks, dtype=jnp.int32)
    num_used = last_block[-1]

    slot = jnp.arange(num_slots, dtype=jnp.int32)
    used = slot < num_used
    group = jnp.searchsorted(last_block, slot, side="right", method="compare_all").astype(jnp.int32)
    group = jnp.where(used, group, 0)
    block_in_group = slot - (last_block - num_blocks)[group]
    block_window = window[group] + block_in_group * block_rows
    block_start = jnp.maximum(block_window, start[group])
    block_end = jnp.minimum(block_window + block_rows, end[group])
    return BlockSchedule(
        group=group,
        start=jnp.where(used, block_start, 0),
        size=jnp.where(used, block_end - block_start, 0),
        num_used=num_used,
    )
