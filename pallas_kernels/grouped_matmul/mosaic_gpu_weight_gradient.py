"""The Hopper weight gradient of a grouped matmul: one persistent kernel over the tiles of all groups' matrices.

A tile is `block_k` by `block_n` entries of one group's gradient, summed over the group's rows, 64 at a time. The first
and the last of these steps may hold rows of the neighbouring groups (TMA reads windows that start at multiples of 8
rows) or rows past the last group; both operands' foreign rows are overwritten with zeros in shared memory, since a
zero times a foreign NaN would still be NaN.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector
from jaxtyping import Array, Float, Int

from pallas_kernels import hopper
from pallas_kernels.device import num_sms
from pallas_kernels.schedule import group_bounds


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel cuts its work.

    Attributes:
        block_k: rows of a tile (columns of `lhs`), half of them for each compute warpgroup.
        block_n: columns of a tile; 128 or 256.
        block_m: contracted rows of a step.
        num_stages: slots of the ring.
        cluster_k: blocks that work on neighbouring rows of a gradient and share the tile of `out_grad` by multicast.
        cluster_n: blocks that work on neighbouring columns and share the tile of `lhs` by multicast.
        band_rows: a group's tiles are visited in bands of this many row blocks.
    """

    block_k: int = 128
    block_n: int = 256
    block_m: int = 64
    num_stages: int = 4
    cluster_k: int = 1
    cluster_n: int = 1
    band_rows: int = 16


def grouped_weight_gradient(
    lhs: Float[Array, "M K"],
    out_grad: Float[Array, "M N"],
    group_sizes: Int[Array, " G"],
    *,
    precision: lax.PrecisionLike,
    accumulator_dtype: jnp.dtype,
    out_dtype: jnp.dtype,
    config: Config | None = None,
    zero_rows: Callable | None = None,
) -> Float[Array, "G K N"]:
    """Sums the outer products of each group's rows with wgmma, in float32.

    `zero_rows` stands in for the device code that clears foreign rows, where that cannot run (interpretation).
    """
    del precision, accumulator_dtype  # products of 16-bit operands are exact, sums are in float32
    num_rows, k = lhs.shape
    n, num_groups = out_grad.shape[1], group_sizes.size
    config = config or default_config(k, n)
    zero_rows = zero_rows or _zero_rows
    block_k, block_n, block_m = config.block_k, config.block_n, config.block_m
    own_k, own_n = block_k // hopper.NUM_COMPUTE_WARPGROUPS, block_n // hopper.NUM_COMPUTE_WARPGROUPS
    cluster = config.cluster_k * config.cluster_n
    row_blocks = pl.cdiv(k, block_k * config.cluster_k)
    column_blocks = pl.cdiv(n, block_n * config.cluster_n)
    tiles_of_group = row_blocks * column_blocks
    num_clusters = num_sms() // cluster
    group_start, group_end = group_bounds(group_sizes, num_rows)

    def kernel(lhs, out_grad, group_start, group_end, out, a_s, b_s, out_s, full, empty, cleared):
        ring = hopper.Ring(full, empty, config.num_stages)
        warpgroup, block = lax.axis_index("wg"), lax.axis_index("block")
        own_cluster = lax.axis_index("cluster")
        own_tiles = pl.cdiv(num_groups * tiles_of_group - own_cluster, num_clusters)

        def place_of(i):
            """The group of this block's i-th tile, and the first row and column of the tile in its matrix."""
            tile = own_cluster + i * num_clusters
            row_block, column_block = plgpu.planar_snake(
                tile % tiles_of_group, (row_blocks, column_blocks), 0, config.band_rows
            )
            row = (row_block * config.cluster_k + block // config.cluster_n) * block_k
            column = (column_block * config.cluster_n + block % config.cluster_n) * block_n
            return tile // tiles_of_group, row, column

        def bounds_of(i):
            """Loads the first and the last row of the group of this block's i-th tile."""
            group = jnp.minimum(own_cluster + i * num_clusters, num_groups * tiles_of_group - 1) // tiles_of_group
            return group_start[group], group_end[group]

        def steps_of(begin, end):
            """The first row that is read for a group, and the number of steps."""
            window = pl.multiple_of(begin // hopper.TMA_ROWS * hopper.TMA_ROWS, hopper.TMA_ROWS)
            return window, jnp.where(end > begin, pl.cdiv(end - window, block_m), 0)

        @pl.when(warpgroup == hopper.MEMORY_WARPGROUP)
        def load():
            plgpu.set_max_registers(hopper.MEMORY_REGISTERS, action="decrease")

            def load_tile(i, step):
                _, row, column = place_of(i)
                window, steps = steps_of(*bounds_of(i))

                def load_step(m, carry):
                    ring.wait_for_room(step + m)
                    slot = ring.slot(step + m)
                    rows = pl.ds(pl.multiple_of(window + m * block_m, hopper.TMA_ROWS), block_m)
                    plgpu.copy_gmem_to_smem(
                        lhs.at[rows, pl.ds(pl.multiple_of(row, block_k), block_k)],
                        a_s.at[slot],
                        full.at[slot],
                        collective_axes="block" if config.cluster_n > 1 else None,
                    )
                    plgpu.copy_gmem_to_smem(
                        out_grad.at[rows, pl.ds(pl.multiple_of(column, block_n), block_n)],
                        b_s.at[slot],
                        full.at[slot],
                        collective_axes="block" if config.cluster_k > 1 else None,
                    )
                    return carry

                lax.fori_loop(0, steps, load_step, jnp.int32(0))
                return step + steps

            ring.drain(lax.fori_loop(0, own_tiles, load_tile, jnp.int32(0)))

        @pl.when(warpgroup < hopper.MEMORY_WARPGROUP)
        def multiply():
            plgpu.set_max_registers(hopper.COMPUTE_REGISTERS, action="increase")
            own_rows = pl.ds(pl.multiple_of(warpgroup * own_k, own_k), own_k)
            own_columns = pl.ds(pl.multiple_of(warpgroup * own_n, own_n), own_n)

            def multiply_tile(i, carry):
                step, (begin, end), previous = carry
                upcoming = bounds_of(i + 1)  # long before they are needed, so that nothing waits for them
                group, row, column = place_of(i)
                window, steps = steps_of(begin, end)

                def multiply_step(acc, m, slot):
                    first = jnp.maximum(begin - (window + m * block_m), 0)
                    last = jnp.minimum(end - (window + m * block_m), block_m)

                    @pl.when((first > 0) | (last < block_m))
                    def clear_foreign_rows():
                        zero_rows(a_s.at[slot, :, own_rows], first, last)
                        zero_rows(b_s.at[slot, :, own_columns], first, last)
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(cleared)
                        plgpu.barrier_wait(cleared)

                    plgpu.wgmma(acc, plgpu.transpose_ref(a_s.at[slot, :, own_rows], (1, 0)), b_s.at[slot])

                acc = hopper.accumulate(
                    ring,
                    step,
                    steps,
                    (own_k, block_n),
                    multiply_step,
                    meanwhile=previous.pieces(out_s.at[warpgroup], out),
                )
                own_row = row + warpgroup * own_k
                tile = hopper.FinishedTile(acc.astype(out.dtype), group, own_row, column, own_row < k)
                return step + steps, upcoming, tile

            nothing = hopper.FinishedTile.nothing((own_k, block_n), out.dtype)
            first = jnp.int32(0), bounds_of(0), nothing
            _, _, last = lax.fori_loop(0, own_tiles, multiply_tile, first)
            last.store(out_s.at[warpgroup], out)
            plgpu.wait_smem_to_gmem(0)

    run = hopper.persistent_kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((num_groups, k, n), out_dtype),
        cluster=cluster,
        num_blocks=num_clusters * cluster,
        scratch_types=dict(
            a_s=hopper.operand_tile((config.num_stages, block_m, block_k), lhs.dtype),
            b_s=hopper.operand_tile((config.num_stages, block_m, block_n), out_grad.dtype),
            out_s=hopper.result_tile((2, 2, own_k, hopper.swizzled_columns(out_dtype)), out_dtype),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=config.num_stages),
            empty=hopper.empty_barrier(cluster, config.num_stages),
            cleared=plgpu.Barrier(num_arrivals=hopper.NUM_COMPUTE_WARPGROUPS),
        ),
    )
    return run(hopper.pad_rows(lhs), hopper.pad_rows(out_grad), group_start, group_end)


def default_config(k: int, n: int) -> Config:
    """Chooses the tiles for a shape."""
    del k
    return Config(block_n=hopper.block_columns(n))


def _zero_rows(tile: hopper.Ref, first: Array, last: Array) -> None:
    """Overwrites the rows of a tile in shared memory outside `first : last` with zeros.

    A warpgroup's 128 threads store 16 bytes each. The swizzle moves data only within a 128-byte line, and each line
    belongs to one row, so whole lines can be cleared without undoing it.
    """
    num_rows, columns = tile.shape
    lines_of_row = columns // hopper.swizzled_columns(tile.dtype)
    transforms = (plgpu.TilingTransform((hopper.TMA_ROWS, hopper.swizzled_columns(tile.dtype))), plgpu.SwizzleTransform(128))

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(transforms), plgpu.Layout.WG_SPLAT(()), plgpu.Layout.WG_SPLAT(()))
    )
    def emit(_, tile, first, last):
        i32 = ir.IntegerType.get_signless(32)

        def constant(value):
            return mgpu.c(value, i32)

        first, last = first.registers.flat[0], last.registers.flat[0]
        tile_type = ir.MemRefType(tile.type)
        element = tile_type.element_type
        (band_stride, line_stride, row_stride, _), _ = tile_type.get_strides_and_offset()
        thread = arith.remui(mgpu.thread_idx(), constant(128))
        piece = arith.remui(thread, constant(8))
        zeros = arith.constant(
            ir.VectorType.get((4,), i32), ir.DenseElementsAttr.get_splat(ir.VectorType.get((4,), i32), ir.IntegerAttr.get(i32, 0))
        )
        for line in range(lines_of_row):
            for pass_rows in range(0, num_rows, 16):
                row = arith.addi(arith.divui(thread, constant(8)), constant(pass_rows))
                foreign = arith.ori(
                    arith.cmpi(arith.CmpIPredicate.slt, row, first), arith.cmpi(arith.CmpIPredicate.sge, row, last)
                )
                offset = arith.addi(
                    arith.addi(
                        arith.muli(arith.divui(row, constant(8)), constant(band_stride)),
                        arith.muli(arith.remui(row, constant(8)), constant(row_stride)),
                    ),
                    arith.addi(constant(line * line_stride), arith.muli(piece, constant(8))),
                )
                with mgpu.when(foreign):
                    llvm.store(zeros, mgpu.getelementptr(mgpu.memref_ptr(tile), [offset], element))

    emit(tile, first, last)
