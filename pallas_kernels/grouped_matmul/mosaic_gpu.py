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
        block_n: columns of a tile; 64, 128 or 256.
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

    def kernel(lhs, rhs, group, start, size, num_used, out, a_s, b_s, out_s, full, empty):
        ring = hopper.Ring(full, empty, config.num_stages)
        warpgroup, block = lax.axis_index("wg"), lax.axis_index("block")
        first_tile = lax.axis_index("cluster")
        row_blocks = num_used[0]
        num_tiles = row_blocks * num_column_blocks

        def for_each_tile(work):
            """Runs `work(row_block, first_column, step) -> step` for every tile of this block."""

            def visit(i, step):
                row_block, column_block = _rasterize(
                    first_tile + i * num_clusters, row_blocks, num_column_blocks, config.raster_rows
                )
                column = column_block * columns_of_cluster + (block % config.cluster_n) * block_n
                return work(row_block, column, step)

            return lax.fori_loop(0, pl.cdiv(num_tiles - first_tile, num_clusters), visit, jnp.int32(0))

        def rows_of(row_block):
            """The rows to store, the first row that the block reads, and the steps (none past the last group)."""
            begin = start[row_block]
            window = begin // hopper.TMA_ROWS * hopper.TMA_ROWS + (block // config.cluster_n) * block_m
            steps = jnp.where(group[row_block] < num_groups, k_steps, 0)
            return begin, begin + size[row_block], pl.multiple_of(window, hopper.TMA_ROWS), steps

        @pl.when(warpgroup == hopper.MEMORY_WARPGROUP)
        def load():
            plgpu.set_max_registers(hopper.MEMORY_REGISTERS, action="decrease")

            def load_tile(row_block, column, step):
                _, _, window, steps = rows_of(row_block)
                matrix = rhs.at[jnp.minimum(group[row_block], num_groups - 1)]
                columns = pl.ds(pl.multiple_of(column, block_n), block_n)

                def load_step(k, carry):
                    ring.wait_for_room(step + k)
                    slot = ring.slot(step + k)
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

                lax.fori_loop(0, steps, load_step, jnp.int32(0))
                return step + steps

            ring.drain(for_each_tile(load_tile))

        @pl.when(warpgroup < hopper.MEMORY_WARPGROUP)
        def multiply():
            plgpu.set_max_registers(hopper.COMPUTE_REGISTERS, action="increase")
            own_rows = pl.ds(pl.multiple_of(warpgroup * hopper.WARPGROUP_ROWS, hopper.WARPGROUP_ROWS), hopper.WARPGROUP_ROWS)

            def multiply_step(acc, k, slot):
                del k
                b = b_s.at[slot]
                plgpu.wgmma(acc, a_s.at[slot, own_rows], plgpu.transpose_ref(b, (1, 0)) if transpose_rhs else b)

            def multiply_tile(row_block, column, step):
                begin, end, window, steps = rows_of(row_block)
                acc = hopper.accumulate(ring, step, steps, (hopper.WARPGROUP_ROWS, block_n), multiply_step)
                row = window + warpgroup * hopper.WARPGROUP_ROWS
                hopper.store_rows(
                    acc.astype(out.dtype),
                    out_s.at[warpgroup],
                    out,
                    first_row=row,
                    first_column=column,
                    begin=jnp.clip(begin - row, 0, hopper.WARPGROUP_ROWS),
                    end=jnp.clip(end - row, 0, hopper.WARPGROUP_ROWS),
                )
                return step + steps

            for_each_tile(multiply_tile)
            plgpu.wait_smem_to_gmem(0)

    run = hopper.persistent_kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((num_rows, n), out_dtype),
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
    return run(lhs, rhs, schedule.group, schedule.start, schedule.size, schedule.num_used[None])


def default_config(num_rows: int, k: int, n: int, num_groups: int) -> Config:
    """Chooses the tiles for a shape."""
    del num_rows, k, num_groups
    return Config(block_n=256 if n % 256 == 0 or n > 512 else 128 if n % 128 == 0 else 64)


def _rasterize(tile: Array, row_blocks: Array, column_blocks: int, band: int) -> tuple[Array, Array]:
    """Returns the row block and the column block of a tile, counted down the rows of a band, then across."""
    band_index, in_band = tile // (band * column_blocks), tile % (band * column_blocks)
    height = jnp.minimum(band, row_blocks - band_index * band)
    return band_index * band + in_band % height, in_band // height
