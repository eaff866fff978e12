"""The Hopper weight gradient of a grouped matmul: one persistent kernel over the tiles of all groups' matrices.

A tile is `block_k` by `block_n` entries of one group's gradient, summed over the group's rows, 64 at a time. The first
and the last of these steps may hold rows of the neighbouring groups (TMA reads windows that start at multiples of 8
rows) or rows past the last group; both operands' foreign rows are overwritten with zeros in shared memory, since a
zero times a foreign NaN would still be NaN. In place of the foreign rows of a gathered operand zeros are brought.
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
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, Float, Int32, Integer

from pallas_kernels import hopper
from pallas_kernels.row_copies import MAX_BYTES, RowCopies, make_ring
from pallas_kernels.rows import take_rows
from pallas_kernels.schedule import group_bounds
from pallas_kernels.tuning import Problem, choose_config


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel cuts its work.

    Attributes:
        block_k: rows of a tile (columns of `lhs`), half of them for each compute warpgroup.
        block_n: columns of a tile; 128 or 256.
        block_m: contracted rows of a step.
        num_stages: slots of the ring.
        band_rows: a group's tiles are visited in bands of this many row blocks.
    """

    block_k: int = 128
    block_n: int = 256
    block_m: int = 64
    num_stages: int = 4
    band_rows: int = 8

    @classmethod
    def for_shape(cls, num_rows: int, num_groups: int, n: int) -> "Config":
        """The rule for a result of n columns, where nothing was measured."""
        del num_rows, num_groups
        return cls(block_n=hopper.block_columns(n))

    def fits(self, dtype: jax.typing.DTypeLike) -> bool:
        """Says whether the tiles of such operands fit into shared memory."""
        return hopper.fits_shared_memory(self.num_stages, (self.block_k + self.block_n) * self.block_m, dtype)


def grouped_weight_gradient(
    lhs: Float[Array, "_ K"],
    out_grad: Float[Array, "_ N"],
    group_sizes: Integer[Array, " G"],
    lhs_index: Int32[Array, " M"] | None,
    out_grad_index: Int32[Array, " M"] | None,
    *,
    precision: lax.PrecisionLike,
    accumulator_dtype: jnp.dtype,
    out_dtype: jnp.dtype,
    config: Config | None = None,
    zero_rows: Callable | None = None,
    copies: type[RowCopies] = RowCopies,
) -> Float[Array, "G K N"]:
    """Sums the outer products of each group's rows with wgmma, in float32; one of the operands may be gathered.

    `zero_rows` and `copies` stand in for the device code that clears foreign rows and gathers others, where that cannot
    run (interpretation).
    """
    del precision, accumulator_dtype  # products of 16-bit operands are exact, sums are in float32
    if lhs.nbytes > MAX_BYTES:
        lhs, lhs_index = take_rows(lhs, lhs_index), None
    if lhs_index is not None or out_grad.nbytes > MAX_BYTES:  # the kernel gathers one operand
        out_grad, out_grad_index = take_rows(out_grad, out_grad_index), None
    gathers_lhs, gathers_out_grad = lhs_index is not None, out_grad_index is not None
    index = [index for index in (lhs_index, out_grad_index) if index is not None]
    num_rows = index[0].size if index else lhs.shape[0]
    k, n, num_groups = lhs.shape[1], out_grad.shape[1], group_sizes.size
    config = config or choose_config(
        Problem.of(
            "grouped_weight_gradient",
            dtype=lhs.dtype,
            out_dtype=out_dtype,
            k=k,
            n=n,
            num_groups=num_groups,
            num_rows=num_rows,
        ),
        Config.for_shape(num_rows, num_groups, n),
    )
    zero_rows = zero_rows or _zero_rows
    block_k, block_n, block_m = config.block_k, config.block_n, config.block_m
    own_k, own_n = block_k // hopper.NUM_COMPUTE_WARPGROUPS, block_n // hopper.NUM_COMPUTE_WARPGROUPS
    row_blocks, column_blocks = pl.cdiv(k, block_k), pl.cdiv(n, block_n)
    tiles_of_group = row_blocks * column_blocks
    num_tiles = num_groups * tiles_of_group
    # With the rows past the last group, though nobody asks for them: so the matmuls have it computed already.
    group_start, group_end = group_bounds(group_sizes, num_rows, cover_remainder=True)

    def grouped_weight_gradient_kernel(
        lhs, out_grad, group_start, group_end, *refs, a_s, b_s, out_s, full, empty, cleared, arrived=None
    ):
        *index, out = refs
        source = lhs if gathers_lhs else out_grad
        rows_of = copies(source, index[0], arrived, config.num_stages) if index else None
        ring = make_ring(full, empty, config.num_stages, rows_of)
        warpgroup = lax.axis_index("wg")
        own_tiles = hopper.count_own_tiles(num_tiles)

        def place_of(i):
            """The group of this block's i-th tile, and the first row and column of the tile in its matrix."""
            tile = hopper.own_tile(i)
            row_block, column_block = plgpu.planar_snake(
                tile % tiles_of_group, (row_blocks, column_blocks), 0, config.band_rows
            )
            return tile // tiles_of_group, row_block * block_k, column_block * block_n

        def bounds_of(i):
            """Loads the first and the last row of the group of this block's i-th tile."""
            group = jnp.minimum(hopper.own_tile(i), num_tiles - 1) // tiles_of_group
            return group_start[group], group_end[group]

        def steps_of(begin, end):
            """The first row that is read for a group, and the number of steps."""
            window = pl.multiple_of(begin // hopper.TMA_ROWS * hopper.TMA_ROWS, hopper.TMA_ROWS)
            return window, jnp.where(end > begin, pl.cdiv(end - window, block_m), 0)

        @pl.when(warpgroup == hopper.MEMORY_WARPGROUP)
        def load():
            plgpu.set_max_registers(hopper.MEMORY_REGISTERS, action="decrease")

            def own_columns(i):
                """Which columns of each operand this block's i-th tile is of."""
                _, row, column = place_of(i)
                return pl.multiple_of(row, block_k), pl.multiple_of(column, block_n)

            def load_tile(i, step):
                row, column = own_columns(i)
                window, steps = steps_of(*bounds_of(i))

                def load_step(m, carry):
                    ring.wait_for_room(step + m)
                    slot = ring.slot(step + m)
                    rows = pl.ds(pl.multiple_of(window + m * block_m, hopper.TMA_ROWS), block_m)
                    plgpu.copy_gmem_to_smem(lhs.at[rows, pl.ds(row, block_k)], a_s.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(out_grad.at[rows, pl.ds(column, block_n)], b_s.at[slot], full.at[slot])
                    return carry

                lax.fori_loop(0, steps, load_step, jnp.int32(0))
                return step + steps

            def gather_tiles(rows_of):
                def index_of(bounds, m):
                    return rows_of.read(steps_of(*bounds)[0] + m * block_m, block_m)

                def gather_tile(i, carry):
                    step, bounds, index, upcoming = carry
                    row, column = own_columns(i)
                    window, steps = steps_of(*bounds)
                    # What the next tiles need is read now, and the numbers of rows two steps ahead, so that nothing
                    # waits for it: blocks that work on one group ask for them at the same time, and all for the first.
                    upcoming_index, after_upcoming = (index_of(upcoming, 0), index_of(upcoming, 1)), bounds_of(i + 2)

                    def load_step(m, index):
                        first = pl.multiple_of(window + m * block_m, hopper.TMA_ROWS)
                        now, ahead = index
                        far_ahead = index_of(bounds, m + 2)
                        pieces = rows_of.locate(now, first, *bounds, block_m)
                        ring.wait_for_room(step + m)
                        slot = ring.slot(step + m)
                        rows = pl.ds(first, block_m)
                        if gathers_lhs:
                            b = out_grad.at[rows, pl.ds(column, block_n)]
                            plgpu.copy_gmem_to_smem(b, b_s.at[slot], full.at[slot])
                            rows_of.copy(pieces, row, a_s.at[slot], slot)
                        else:
                            a = lhs.at[rows, pl.ds(row, block_k)]
                            plgpu.copy_gmem_to_smem(a, a_s.at[slot], full.at[slot])
                            rows_of.copy(pieces, column, b_s.at[slot], slot)
                        return ahead, far_ahead

                    lax.fori_loop(0, steps, load_step, index)
                    return step + steps, upcoming, upcoming_index, after_upcoming

                first = bounds_of(0)
                carry = jnp.int32(0), first, (index_of(first, 0), index_of(first, 1)), bounds_of(1)
                num_steps, *_ = lax.fori_loop(0, own_tiles, gather_tile, carry)
                return num_steps

            if rows_of is None:
                ring.drain(lax.fori_loop(0, own_tiles, load_tile, jnp.int32(0)))
            else:
                ring.drain(gather_tiles(rows_of))

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

                def clear_foreign_rows(m, slot):
                    first = jnp.maximum(begin - (window + m * block_m), 0)
                    last = jnp.minimum(end - (window + m * block_m), block_m)

                    @pl.when((first > 0) | (last < block_m))
                    def clear():
                        # Gathered tiles come with zeros.
                        if not gathers_lhs:
                            zero_rows(a_s.at[slot, :, own_rows], first, last)
                        if not gathers_out_grad:
                            zero_rows(b_s.at[slot, :, own_columns], first, last)
                        plgpu.commit_smem()
                        if not gathers_out_grad:
                            # Each warpgroup clears half of the columns and reads all of them.
                            plgpu.barrier_arrive(cleared)
                            plgpu.barrier_wait(cleared)

                def multiply_step(acc, slot):
                    plgpu.wgmma(acc, a_s.at[slot, :, own_rows].transpose((1, 0)), b_s.at[slot])

                acc = hopper.accumulate(
                    ring,
                    step,
                    steps,
                    (own_k, block_n),
                    multiply_step,
                    prepare=clear_foreign_rows,
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
        grouped_weight_gradient_kernel,
        out_type=jax.ShapeDtypeStruct((num_groups, k, n), out_dtype),
        scratch_types={
            "a_s": hopper.operand_tile((config.num_stages, block_m, block_k), lhs.dtype),
            "b_s": hopper.operand_tile((config.num_stages, block_m, block_n), out_grad.dtype),
            "out_s": hopper.result_tile((2, 2, own_k, hopper.swizzled_columns(out_dtype)), out_dtype),
            "full": plgpu.Barrier(num_arrivals=1 if index else 2, num_barriers=config.num_stages),
            "empty": plgpu.Barrier(num_arrivals=hopper.NUM_COMPUTE_WARPGROUPS, num_barriers=config.num_stages),
            "cleared": plgpu.Barrier(num_arrivals=hopper.NUM_COMPUTE_WARPGROUPS),
            **({"arrived": copies.scratch(config.num_stages)} if index else {}),
        },
    )
    lhs = lhs if gathers_lhs else hopper.pad_rows(lhs)
    out_grad = out_grad if gathers_out_grad else hopper.pad_rows(out_grad)
    return run(lhs, out_grad, group_start, group_end, *index)


def _zero_rows(tile: hopper.Ref, first: Array, last: Array) -> None:
    """Overwrites the rows of a tile in shared memory outside `first : last` with zeros.

    A warpgroup's 128 threads store 16 bytes each: 8 threads for a 128-byte line, 16 lines at a time. The swizzle moves
    data only within a line, and each line belongs to one row, so whole lines can be cleared without undoing it.
    """
    num_rows, columns = tile.shape
    lines_of_row = columns // hopper.swizzled_columns(tile.dtype)

    def emit(_, tile, first, last):
        i32 = ir.IntegerType.get_signless(32)
        int4 = ir.VectorType.get((4,), i32)
        zeros = arith.constant(int4, ir.DenseElementsAttr.get_splat(int4, ir.IntegerAttr.get(i32, 0)))
        first, last = first.registers.flat[0], last.registers.flat[0]
        tile_type = ir.MemRefType(tile.type)
        (band_stride, line_stride, row_stride, _), _ = tile_type.get_strides_and_offset()

        def constant(value):
            return mgpu.c(value, i32)

        thread = arith.remui(mgpu.thread_idx(), constant(128))
        first_of_piece = arith.muli(arith.remui(thread, constant(8)), constant(8))
        for rows_before in range(0, num_rows, 16):
            row = arith.addi(arith.divui(thread, constant(8)), constant(rows_before))
            before = arith.cmpi(arith.CmpIPredicate.slt, row, first)
            after = arith.cmpi(arith.CmpIPredicate.sge, row, last)
            band_offset = arith.muli(arith.divui(row, constant(hopper.TMA_ROWS)), constant(band_stride))
            row_offset = arith.muli(arith.remui(row, constant(hopper.TMA_ROWS)), constant(row_stride))
            offset = arith.addi(arith.addi(band_offset, row_offset), first_of_piece)
            with mgpu.when(arith.ori(before, after)):
                for line in range(lines_of_row):
                    element = arith.addi(offset, constant(line * line_stride))
                    llvm.store(zeros, mgpu.getelementptr(mgpu.memref_ptr(tile), [element], tile_type.element_type))

    scalar = plgpu.Layout.WG_SPLAT(())
    tile_type = plgpu.RefType(hopper.tiled(hopper.TMA_ROWS, tile.dtype))
    clear: Callable[..., None] = plgpu.inline_mgpu(arg_types=(tile_type, scalar, scalar))(emit)
    clear(tile, first, last)
