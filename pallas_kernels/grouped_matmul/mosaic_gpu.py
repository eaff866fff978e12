"""The Hopper grouped matmul: one persistent, warp-specialised kernel over the tiles of all groups.

A tile is `block_m` rows of one group times `block_n` columns. Its rows start at a multiple of 8 (TMA reads whole
8-row lines into the layout that wgmma wants), so it may begin with rows of the group before and end with rows of the
next: they are multiplied along, which is harmless since rows do not mix, and not stored.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels import hopper
from pallas_kernels.device import num_sms
from pallas_kernels.schedule import BlockSchedule, make_block_schedule


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel cuts its work.

    Attributes:
        block_m: rows of a tile, 64 for each compute warpgroup.
        block_n: columns of a tile; 128 or 256.
        block_k: contracted columns of a step.
        num_stages: slots of the ring.
        cluster_m: blocks that work on neighbouring rows of a group and share the tile of `rhs` by multicast.
        cluster_n: blocks that work on neighbouring columns and share the tile of `lhs` by multicast.
        band_rows: the tiles of a group are visited in bands of about this many row blocks, down and then across, so
            that the tiles in work at a time share both operands in the L2 cache.
    """

    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    num_stages: int = 4
    cluster_m: int = 1
    cluster_n: int = 1
    band_rows: int = 16


def grouped_matmul(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "G _ _"],
    group_sizes: Int[Array, " G"],
    *,
    transpose_rhs: bool,
    precision: lax.PrecisionLike,
    accumulator_dtype: jnp.dtype,
    out_dtype: jnp.dtype,
    config: Config | None = None,
) -> Float[Array, "M N"]:
    """Multiplies tiles of each group with wgmma, in float32."""
    del precision, accumulator_dtype  # products of 16-bit operands are exact, sums are in float32
    num_rows, k = lhs.shape
    num_groups, n = rhs.shape[0], rhs.shape[1 if transpose_rhs else 2]
    config = config or Config(block_n=hopper.block_columns(n))
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    cluster = config.cluster_m * config.cluster_n
    num_clusters = num_sms() // cluster
    k_steps = pl.cdiv(k, block_k)

    schedule = make_block_schedule(
        group_sizes,
        num_rows=num_rows,
        block_rows=block_m * config.cluster_m,
        alignment=hopper.TMA_ROWS,
        cover_remainder=True,
    )
    column_blocks = pl.cdiv(n, block_n * config.cluster_n)
    tiles = _order_tiles(
        schedule, num_groups=num_groups + 1, column_blocks=column_blocks, band_rows=config.band_rows
    )
    num_multiplied = jnp.sum((schedule.size > 0) & (schedule.group < num_groups), dtype=jnp.int32)
    num_tiles = jnp.stack([num_multiplied, schedule.num_used]) * column_blocks

    def kernel(lhs, rhs, tiles, num_tiles, out, a_s, b_s, out_s, full, empty):
        ring = hopper.Ring(full, empty, config.num_stages)
        warpgroup, block = lax.axis_index("wg"), lax.axis_index("block")
        own_cluster = lax.axis_index("cluster")
        own_tiles = pl.cdiv(num_tiles[0] - own_cluster, num_clusters)

        def tile_at(i):
            """Loads the group, the first row, the number of rows and the column block of this block's i-th tile."""
            tile = jnp.minimum(own_cluster + i * num_clusters, tiles.shape[0] - 1)
            return tuple(tiles[tile, field] for field in range(4))

        def first_row_read(start):
            window = start // hopper.TMA_ROWS * hopper.TMA_ROWS
            return pl.multiple_of(window + (block // config.cluster_n) * block_m, hopper.TMA_ROWS)

        def first_column(column_block):
            column = (column_block * config.cluster_n + block % config.cluster_n) * block_n
            return pl.multiple_of(column, block_n)

        @pl.when(warpgroup == hopper.MEMORY_WARPGROUP)
        def load():
            plgpu.set_max_registers(hopper.MEMORY_REGISTERS, action="decrease")

            def load_tile(i, carry):
                group, start, _, column_block = tile_at(i)
                rows = pl.ds(first_row_read(start), block_m)
                columns = pl.ds(first_column(column_block), block_n)
                matrix = rhs.at[group]

                def load_step(k, carry):
                    step = i * k_steps + k
                    ring.wait_for_room(step)
                    slot = ring.slot(step)
                    contracted = pl.ds(k * block_k, block_k)
                    plgpu.copy_gmem_to_smem(
                        lhs.at[rows, contracted],
                        a_s.at[slot],
                        full.at[slot],
                        collective_axes="block" if config.cluster_n > 1 else None,
                    )
                    plgpu.copy_gmem_to_smem(
                        matrix.at[columns, contracted] if transpose_rhs else matrix.at[contracted, columns],
                        b_s.at[slot],
                        full.at[slot],
                        collective_axes="block" if config.cluster_m > 1 else None,
                    )
                    return carry

                return lax.fori_loop(0, k_steps, load_step, carry)

            lax.fori_loop(0, own_tiles, load_tile, jnp.int32(0))
            ring.drain(own_tiles * k_steps)

        @pl.when(warpgroup < hopper.MEMORY_WARPGROUP)
        def multiply():
            plgpu.set_max_registers(hopper.COMPUTE_REGISTERS, action="increase")
            rows_before = pl.multiple_of(warpgroup * hopper.WARPGROUP_ROWS, hopper.WARPGROUP_ROWS)
            own_rows = pl.ds(rows_before, hopper.WARPGROUP_ROWS)
            buffers = out_s.at[warpgroup]

            def multiply_step(acc, k, slot):
                del k
                b = b_s.at[slot]
                plgpu.wgmma(acc, a_s.at[slot, own_rows], plgpu.transpose_ref(b, (1, 0)) if transpose_rhs else b)

            def rows_to_store(start, size):
                row = first_row_read(start) + rows_before
                begin = jnp.clip(start - row, 0, hopper.WARPGROUP_ROWS)
                return row, begin, jnp.clip(start + size - row, begin, hopper.WARPGROUP_ROWS)

            def multiply_tile(i, carry):
                (_, start, size, column_block), previous = carry
                upcoming = tile_at(i + 1)  # long before it is needed, so that nothing waits for it
                row, begin, end = rows_to_store(start, size)
                meanwhile = previous.pieces(buffers, out)

                def compute():
                    acc = hopper.accumulate(
                        ring, i * k_steps, k_steps, (hopper.WARPGROUP_ROWS, block_n), multiply_step, meanwhile
                    )
                    return acc.astype(out.dtype)

                def pass_by():
                    ring.skip(i * k_steps, k_steps)
                    previous.store(buffers, out)
                    return previous.values

                values = lax.cond(end > begin, compute, pass_by)
                whole = end - begin == hopper.WARPGROUP_ROWS
                tile = hopper.FinishedTile(values, jnp.int32(0), row, first_column(column_block), whole)
                tile.store_rows(begin, jnp.where(whole, begin, end), buffers, out)
                return upcoming, tile

            nothing = hopper.FinishedTile.nothing((hopper.WARPGROUP_ROWS, block_n), out.dtype)
            _, last = lax.fori_loop(0, own_tiles, multiply_tile, (tile_at(0), nothing))
            last.store(buffers, out)

            def clear_tile(i, carry):
                _, start, size, column_block = tile_at(i)
                row, begin, end = rows_to_store(start, size)
                zeros = dataclasses.replace(nothing, row=row, column=first_column(column_block))
                zeros.store_rows(begin, end, buffers, out)
                return carry

            # The rows past the last group come last.
            lax.fori_loop(own_tiles, pl.cdiv(num_tiles[1] - own_cluster, num_clusters), clear_tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    b_tile = (block_n, block_k) if transpose_rhs else (block_k, block_n)
    run = hopper.persistent_kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((1, num_rows, n), out_dtype),
        cluster=cluster,
        num_blocks=num_clusters * cluster,
        scratch_types=dict(
            a_s=hopper.operand_tile((config.num_stages, block_m, block_k), lhs.dtype),
            b_s=hopper.operand_tile((config.num_stages, *b_tile), rhs.dtype),
            out_s=hopper.result_tile((2, 2, hopper.WARPGROUP_ROWS, hopper.swizzled_columns(out_dtype)), out_dtype),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=config.num_stages),
            empty=hopper.empty_barrier(cluster, config.num_stages),
        ),
    )
    return run(hopper.pad_rows(lhs), rhs, tiles, num_tiles).reshape(num_rows, n)


def _order_tiles(
    schedule: BlockSchedule, *, num_groups: int, column_blocks: int, band_rows: int
) -> Int32[Array, "tiles 4"]:
    """Lists group, first row, number of rows and column block of every tile, in the order of visit.

    Each group's row blocks are cut into bands of at most `band_rows`, as equal as can be; a band is visited down its
    rows, then across its columns. The tiles of padding blocks come last and have no rows.
    """
    slot = jnp.arange(schedule.group.size, dtype=jnp.int32)
    blocks = (schedule.group == jnp.arange(num_groups)[:, None]) & (schedule.size > 0)
    height = jnp.maximum(jnp.sum(blocks, axis=1, dtype=jnp.int32), 1)[schedule.group]
    first = jnp.min(jnp.where(blocks, slot, slot.size), axis=1)[schedule.group]
    band_height = -(-height // -(-height // band_rows))
    band = first + (slot - first) // band_height * band_height
    band_height = jnp.minimum(band_height, first + height - band)
    used = slot < schedule.num_used
    band, band_height = jnp.where(used, band, slot), jnp.where(used, band_height, 1)

    # A band of h row blocks takes the places of h rows of tiles.
    tile = jnp.arange(slot.size * column_blocks, dtype=jnp.int32)
    band, band_height = band[tile // column_blocks], band_height[tile // column_blocks]
    in_band = tile - band * column_blocks
    row_block, column_block = band + in_band % band_height, in_band // band_height
    return jnp.stack(
        [schedule.group[row_block], schedule.start[row_block], schedule.size[row_block], column_block], axis=1
    )
