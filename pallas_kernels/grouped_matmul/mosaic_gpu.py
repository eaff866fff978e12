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
from jaxtyping import Array, Float, Int

from pallas_kernels import hopper
from pallas_kernels.device import num_sms
from pallas_kernels.schedule import make_block_schedule


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
        raster_rows: tiles are visited in bands of this many row blocks, so that what runs at a time shares both
            operands in the L2 cache.
    """

    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    num_stages: int = 4
    cluster_m: int = 1
    cluster_n: int = 1
    raster_rows: int = 16


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
    config = config or default_config(num_rows, k, n, num_groups)
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    cluster = config.cluster_m * config.cluster_n
    k_steps = pl.cdiv(k, block_k)
    columns_of_cluster = block_n * config.cluster_n
    num_column_blocks = pl.cdiv(n, columns_of_cluster)
    num_clusters = num_sms() // cluster

    lhs = hopper.pad_rows(lhs)
    schedule = make_block_schedule(
        group_sizes,
        num_rows=num_rows,
        block_rows=block_m * config.cluster_m,
        alignment=hopper.TMA_ROWS,
        cover_remainder=True,
    )

    def kernel(lhs, rhs, group, start, size, num_blocks, out, a_s, b_s, out_s, full, empty):
        ring = hopper.Ring(full, empty, config.num_stages)
        warpgroup, block = lax.axis_index("wg"), lax.axis_index("block")
        own_cluster = lax.axis_index("cluster")

        def for_each_tile(first_block, last_block, visit, carry):
            """Runs `visit(i, row_block, first_column, carry) -> carry` for this block's tiles of some row blocks."""

            def visit_tile(i, carry):
                row_block, column_block = _rasterize(
                    own_cluster + i * num_clusters, last_block - first_block, num_column_blocks, config.raster_rows
                )
                column = column_block * columns_of_cluster + (block % config.cluster_n) * block_n
                return visit(i, first_block + row_block, column, carry)

            num_tiles = (last_block - first_block) * num_column_blocks
            return lax.fori_loop(0, pl.cdiv(num_tiles - own_cluster, num_clusters), visit_tile, carry)

        def first_row_read(row_block):
            window = start[row_block] // hopper.TMA_ROWS * hopper.TMA_ROWS
            return pl.multiple_of(window + (block // config.cluster_n) * block_m, hopper.TMA_ROWS)

        @pl.when(warpgroup == hopper.MEMORY_WARPGROUP)
        def load():
            plgpu.set_max_registers(hopper.MEMORY_REGISTERS, action="decrease")

            def load_tile(i, row_block, column, carry):
                window = first_row_read(row_block)
                matrix = rhs.at[group[row_block]]
                columns = pl.ds(pl.multiple_of(column, block_n), block_n)

                def load_step(k, carry):
                    step = i * k_steps + k
                    ring.wait_for_room(step)
                    slot = ring.slot(step)
                    contracted = pl.ds(k * block_k, block_k)
                    plgpu.copy_gmem_to_smem(
                        lhs.at[pl.ds(window, block_m), contracted],
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

                lax.fori_loop(0, k_steps, load_step, jnp.int32(0))
                return carry + k_steps

            ring.drain(for_each_tile(0, num_blocks[0], load_tile, jnp.int32(0)))

        @pl.when(warpgroup < hopper.MEMORY_WARPGROUP)
        def multiply():
            plgpu.set_max_registers(hopper.COMPUTE_REGISTERS, action="increase")
            rows_before = pl.multiple_of(warpgroup * hopper.WARPGROUP_ROWS, hopper.WARPGROUP_ROWS)
            own_rows = pl.ds(rows_before, hopper.WARPGROUP_ROWS)

            def multiply_step(acc, k, slot):
                del k
                b = b_s.at[slot]
                plgpu.wgmma(acc, a_s.at[slot, own_rows], plgpu.transpose_ref(b, (1, 0)) if transpose_rhs else b)

            def pending(tile, row_block, column):
                begin, row = start[row_block], first_row_read(row_block) + rows_before
                return hopper.PendingStore(
                    tile=tile,
                    row=row,
                    column=column,
                    begin=jnp.clip(begin - row, 0, hopper.WARPGROUP_ROWS),
                    end=jnp.clip(begin + size[row_block] - row, 0, hopper.WARPGROUP_ROWS),
                    matrix=jnp.int32(0),
                )

            def multiply_tile(i, row_block, column, previous):
                acc = hopper.accumulate(
                    ring,
                    i * k_steps,
                    k_steps,
                    (hopper.WARPGROUP_ROWS, block_n),
                    multiply_step,
                    meanwhile=previous.pieces(out_s.at[warpgroup], out),
                )
                return pending(acc.astype(out.dtype), row_block, column)

            def clear_tile(i, row_block, column, nothing):
                del i
                pending(nothing.tile, row_block, column).store(out_s.at[warpgroup], out)
                return nothing

            nothing = hopper.PendingStore.nothing((hopper.WARPGROUP_ROWS, block_n), out.dtype)
            last = for_each_tile(0, num_blocks[0], multiply_tile, nothing)
            last.store(out_s.at[warpgroup], out)
            for_each_tile(num_blocks[0], num_blocks[1], clear_tile, nothing)
            plgpu.wait_smem_to_gmem(0)

    run = hopper.persistent_kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((1, num_rows, n), out_dtype),
        cluster=cluster,
        num_blocks=num_clusters * cluster,
        scratch_types=dict(
            a_s=hopper.operand_tile((config.num_stages, block_m, block_k), lhs.dtype),
            b_s=hopper.operand_tile(
                (config.num_stages, *((block_n, block_k) if transpose_rhs else (block_k, block_n))), rhs.dtype
            ),
            out_s=hopper.result_tile((2, 2, hopper.WARPGROUP_ROWS, hopper.swizzled_columns(out_dtype)), out_dtype),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=config.num_stages),
            empty=hopper.empty_barrier(cluster, config.num_stages),
        ),
    )
    num_multiplied = jnp.sum((schedule.size > 0) & (schedule.group < num_groups), dtype=jnp.int32)
    num_blocks = jnp.stack([num_multiplied, schedule.num_used])
    return run(lhs, rhs, schedule.group, schedule.start, schedule.size, num_blocks).reshape(num_rows, n)


def default_config(num_rows: int, k: int, n: int, num_groups: int) -> Config:
    """Chooses the tiles for a shape."""
    del num_rows, k, num_groups
    return Config(block_n=hopper.block_columns(n))


def _rasterize(tile: Array, row_blocks: Array, column_blocks: int, band: int) -> tuple[Array, Array]:
    """Returns the row block and the column block of a tile, counted down the rows of a band, then across."""
    band_index, in_band = tile // (band * column_blocks), tile % (band * column_blocks)
    height = jnp.minimum(band, row_blocks - band_index * band)
    return band_index * band + in_band % height, in_band // height
