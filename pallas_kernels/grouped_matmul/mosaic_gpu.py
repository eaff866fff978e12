"""The Hopper grouped matmul: one persistent, warp-specialised kernel over the tiles of all groups.

A tile is `block_m` rows of one group times `block_n` columns. Its rows start at a multiple of 8 (TMA reads whole
8-row lines into the layout that wgmma wants), so it may begin with rows of the group before and end with rows of the
next: they are multiplied along, which is harmless since rows do not mix, and not stored. Rows that are gathered could
begin anywhere, but so the matmuls of a layer share one schedule; zeros come in place of the neighbours' rows.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32, Integer

from pallas_kernels import hopper
from pallas_kernels.device import num_sms
from pallas_kernels.row_copies import MAX_BYTES, RowCopies, make_ring
from pallas_kernels.rows import clip_index, take_rows
from pallas_kernels.schedule import make_tile_schedule
from pallas_kernels.tuning import Problem, choose_config


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel cuts its work.

    Attributes:
        block_m: rows of a tile, 64 for each compute warpgroup.
        block_n: columns of a tile; 64, 128 or 256.
        block_k: contracted columns of a step.
        num_stages: slots of the ring.
        band_rows: about how many row blocks of a group are visited down before across, as in `make_tile_schedule`.
    """

    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    num_stages: int = 4
    band_rows: int = 8

    @classmethod
    def for_shape(cls, num_rows: int, num_groups: int, n: int) -> "Config":
        """The rule for a result [num_rows, n] of so many groups, where nothing was measured."""
        rule = cls(block_n=hopper.block_columns(n))
        if num_rows >= num_groups * rule.block_m:
            return rule
        # Groups of few rows: what counts is that all multiprocessors read matrices all the time. They do so in turns
        # of a tile each; narrower tiles fill the last turn better, and wider ones read with less effort.
        most_blocks = min(num_rows, num_groups)

        def columns_in_turn(config: Config) -> int:
            return pl.cdiv(most_blocks * pl.cdiv(n, config.block_n), num_sms()) * config.block_n

        return min((rule, cls(block_n=128, num_stages=6), cls(block_n=64, num_stages=8)), key=columns_in_turn)

    def fits(self, dtype: jax.typing.DTypeLike) -> bool:
        """Says whether the tiles of such operands fit into shared memory."""
        return hopper.fits_shared_memory(self.num_stages, (self.block_m + self.block_n) * self.block_k, dtype)


def grouped_matmul(
    lhs: Float[Array, "_ K"],
    rhs: Float[Array, "_ _ _"],
    group_sizes: Integer[Array, " G"],
    lhs_index: Int32[Array, " M"] | None,
    rhs_index: Int32[Array, " G"] | None,
    *,
    transpose_rhs: bool,
    precision: lax.PrecisionLike,
    accumulator_dtype: jnp.dtype,
    out_dtype: jnp.dtype,
    config: Config | None = None,
    copies: type[RowCopies] = RowCopies,
) -> Float[Array, "M N"]:
    """Multiplies tiles of each group with wgmma, in float32.

    `copies` stands in for the device code that gathers rows, where that cannot run (interpretation).
    """
    del precision, accumulator_dtype  # products of 16-bit operands are exact, sums are in float32
    if lhs.nbytes > MAX_BYTES:
        lhs, lhs_index = take_rows(lhs, lhs_index), None
    gathers = lhs_index is not None
    num_rows, k = lhs_index.size if gathers else lhs.shape[0], lhs.shape[1]
    num_groups = group_sizes.size
    n = rhs.shape[1 if transpose_rhs else 2]
    config = config or choose_config(
        Problem.of(
            "grouped_matmul_transposed" if transpose_rhs else "grouped_matmul",
            dtype=lhs.dtype,
            out_dtype=out_dtype,
            k=k,
            n=n,
            num_groups=num_groups,
            num_rows=num_rows,
        ),
        Config.for_shape(num_rows, num_groups, n),
    )
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    k_steps, column_blocks = pl.cdiv(k, block_k), pl.cdiv(n, block_n)
    schedule = make_tile_schedule(
        group_sizes,
        num_rows=num_rows,
        block_rows=block_m,
        alignment=hopper.TMA_ROWS,
        cover_remainder=True,
        column_blocks=column_blocks,
        band_rows=config.band_rows,
    )
    matrix = schedule.group if rhs_index is None else take_rows(clip_index(rhs_index, rhs), schedule.group)
    # The four numbers of a tile lie side by side, in one sector of memory.
    tiles = jnp.stack([matrix, schedule.start, schedule.size, schedule.column_block], axis=1)

    def grouped_matmul_kernel(lhs, rhs, tiles, last_block, *refs, a_s, b_s, out_s, full, empty, arrived=None):
        *index, out = refs
        rows_of = copies(lhs, index[0], arrived, config.num_stages) if index else None
        ring = make_ring(full, empty, config.num_stages, rows_of)
        warpgroup = lax.axis_index("wg")
        own_tiles = hopper.count_own_tiles(last_block[num_groups - 1] * column_blocks)

        def tile_at(i):
            """Loads the group, the first row, the number of rows and the column block of this block's i-th tile."""
            tile = jnp.minimum(hopper.own_tile(i), tiles.shape[0] - 1)
            return tuple(tiles[tile, field] for field in range(4))

        def first_row_read(start):
            return pl.multiple_of(start // hopper.TMA_ROWS * hopper.TMA_ROWS, hopper.TMA_ROWS)

        @pl.when(warpgroup == hopper.MEMORY_WARPGROUP)
        def load():
            plgpu.set_max_registers(hopper.MEMORY_REGISTERS, action="decrease")

            def load_steps(i, group, column_block, load_rows):
                columns = pl.ds(column_block * block_n, block_n)
                matrix = rhs.at[group]

                def load_step(k, carry):
                    step = i * k_steps + k
                    ring.wait_for_room(step)
                    slot = ring.slot(step)
                    contracted = pl.ds(k * block_k, block_k)
                    b = matrix.at[columns, contracted] if transpose_rhs else matrix.at[contracted, columns]
                    plgpu.copy_gmem_to_smem(b, b_s.at[slot], full.at[slot])
                    load_rows(k * block_k, slot)
                    return carry

                lax.fori_loop(0, k_steps, load_step, jnp.int32(0))

            def load_tile(i, tile):
                group, start, _, column_block = tile
                own_rows = pl.ds(first_row_read(start), block_m)

                def load_rows(column, slot):
                    a = lhs.at[own_rows, pl.ds(column, block_k)]
                    plgpu.copy_gmem_to_smem(a, a_s.at[slot], full.at[slot])

                load_steps(i, group, column_block, load_rows)
                return tile_at(i + 1)

            def gather_tiles(rows_of):
                def index_of(tile):
                    return rows_of.read(first_row_read(tile[1]), block_m)

                def gather_tile(i, carry):
                    tile, index, upcoming = carry
                    group, start, size, column_block = tile
                    # What the next tiles need is read now, so that nothing waits for it.
                    upcoming_index, after_upcoming = index_of(upcoming), tile_at(i + 2)
                    pieces = rows_of.locate(index, first_row_read(start), start, start + size, block_m)

                    def copy_rows(column, slot):
                        rows_of.copy(pieces, column, a_s.at[slot], slot)

                    load_steps(i, group, column_block, copy_rows)
                    return upcoming, upcoming_index, after_upcoming

                first = tile_at(0)
                lax.fori_loop(0, own_tiles, gather_tile, (first, index_of(first), tile_at(1)))

            if rows_of is None:
                lax.fori_loop(0, own_tiles, load_tile, tile_at(0))
            else:
                gather_tiles(rows_of)
            ring.drain(own_tiles * k_steps)

        @pl.when(warpgroup < hopper.MEMORY_WARPGROUP)
        def multiply():
            plgpu.set_max_registers(hopper.COMPUTE_REGISTERS, action="increase")
            rows_before = pl.multiple_of(warpgroup * hopper.WARPGROUP_ROWS, hopper.WARPGROUP_ROWS)
            own_rows = pl.ds(rows_before, hopper.WARPGROUP_ROWS)
            buffers = out_s.at[warpgroup]

            def multiply_step(acc, slot):
                b = b_s.at[slot]
                plgpu.wgmma(acc, a_s.at[slot, own_rows], b.transpose((1, 0)) if transpose_rhs else b)

            def rows_to_store(start, size):
                row = first_row_read(start) + rows_before
                begin = jnp.clip(start - row, 0, hopper.WARPGROUP_ROWS)
                return row, begin, jnp.clip(start + size - row, begin, hopper.WARPGROUP_ROWS)

            def multiply_tile(i, carry):
                (_, start, size, column_block), previous = carry
                upcoming = tile_at(i + 1)  # long before it is needed, so that nothing waits for it
                acc = hopper.accumulate(
                    ring,
                    i * k_steps,
                    k_steps,
                    (hopper.WARPGROUP_ROWS, block_n),
                    multiply_step,
                    meanwhile=previous.pieces(buffers, out),
                )
                row, begin, end = rows_to_store(start, size)
                whole = end - begin == hopper.WARPGROUP_ROWS
                tile = hopper.FinishedTile(acc.astype(out.dtype), jnp.int32(0), row, column_block * block_n, whole)
                tile.store_rows(begin, jnp.where(whole, begin, end), buffers, out)
                return upcoming, tile

            nothing = hopper.FinishedTile.nothing((hopper.WARPGROUP_ROWS, block_n), out.dtype)
            _, last = lax.fori_loop(0, own_tiles, multiply_tile, (tile_at(0), nothing))
            last.store(buffers, out)

            def clear_tile(i, carry):
                _, start, size, column_block = tile_at(i)
                row, begin, end = rows_to_store(start, size)
                zeros = dataclasses.replace(nothing, row=row, column=column_block * block_n)
                zeros.store_rows(begin, end, buffers, out)
                return carry

            # The rows past the last group come last.
            all_own_tiles = hopper.count_own_tiles(last_block[num_groups] * column_blocks)
            lax.fori_loop(own_tiles, all_own_tiles, clear_tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    b_tile = (block_n, block_k) if transpose_rhs else (block_k, block_n)
    run = hopper.persistent_kernel(
        grouped_matmul_kernel,
        out_type=jax.ShapeDtypeStruct((1, num_rows, n), out_dtype),
        scratch_types={
            "a_s": hopper.operand_tile((config.num_stages, block_m, block_k), lhs.dtype),
            "b_s": hopper.operand_tile((config.num_stages, *b_tile), rhs.dtype),
            "out_s": hopper.result_tile((2, 2, hopper.WARPGROUP_ROWS, hopper.swizzled_columns(out_dtype)), out_dtype),
            "full": plgpu.Barrier(num_arrivals=1 if gathers else 2, num_barriers=config.num_stages),
            "empty": plgpu.Barrier(num_arrivals=hopper.NUM_COMPUTE_WARPGROUPS, num_barriers=config.num_stages),
            **({"arrived": copies.scratch(config.num_stages)} if gathers else {}),
        },
    )
    operands = (lhs, rhs) if gathers else (hopper.pad_rows(lhs), rhs)
    index = (lhs_index,) if gathers else ()
    return run(*operands, tiles, schedule.last_block, *index).reshape(num_rows, n)
