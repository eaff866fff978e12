"""The Hopper block-sparse products: two persistent, warp-specialised kernels.

A tile of `sdd` is a block, or two where a topology's rows are contiguous: 128 rows times 256 columns read less of
shared memory for each operation than 128 by 128. A tile of `dsd` is a block row of the result times 256 of its
columns, and its steps are the blocks of that row of the sparse matrix, two for each. Either operand, either matrix and
the result of `dsd` may be transposed, the operands by wgmma and the result on its way to memory, so that `dds` and all
gradients are these two kernels.

The two compute warpgroups take 64 rows of a tile each. Blocks of 64 have no more rows: there a tile has up to four
blocks of a row, or a row of them, and the warpgroups take half of the columns each.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import hopper
from pallas_kernels.block_sparse.topology import Topology

BLOCKS = (128, 64)
_STEP = 64  # contracted columns of a step


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernels cut their work.

    Attributes:
        block_n: columns of a tile of `dsd`; 128 or 256.
        num_stages: slots of the ring.
        band_rows: `dsd` visits tiles in bands of so many block rows, as in `plgpu.planar_snake`.
    """

    block_n: int = 256
    num_stages: int = 4
    band_rows: int = 8


def why_unsupported(
    topology: Topology, width: int, dtype: jax.typing.DTypeLike, out_dtype: jax.typing.DTypeLike
) -> str | None:
    """Says which constraint of the kernels a product breaks, if any.

    Args:
        topology: of the sparse matrix.
        width: of the dense operand beside the topology's rows and columns.
        dtype: of the operands.
        out_dtype: of the result.
    """
    if topology.block not in BLOCKS:
        return f"its blocks are of {topology.block}; the kernel's are of {' or '.join(map(str, BLOCKS))}."
    return hopper.why_unsupported((width,), dtype, out_dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _FinishedBlocks(hopper.FinishedTile):
    """A finished tile whose columns belong to blocks that follow each other: `matrix` is the first of them.

    Attributes:
        num_blocks: how many there are; the columns of the others are not stored.
    """

    num_blocks: Array

    def _is_stored(self, piece, out):
        return self._block(piece, out) < self.num_blocks

    def _destination(self, piece, out):
        width = hopper.swizzled_columns(self.values.dtype)
        columns = pl.ds(piece * width % out.shape[2], width)
        return out.at[self.matrix + self._block(piece, out), pl.ds(self.row, hopper.WARPGROUP_ROWS), columns]

    def _block(self, piece, out):
        return piece * hopper.swizzled_columns(self.values.dtype) // out.shape[2]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _FinishedTranspose(hopper.FinishedTile):
    """A finished tile of the transpose of the result, in which `row` and `column` count."""

    def _is_stored(self, piece, out):
        return self._columns(piece).start < out.shape[1]

    def _destination(self, piece, out):
        rows = pl.ds(pl.multiple_of(self.row, hopper.WARPGROUP_ROWS), hopper.WARPGROUP_ROWS)
        return out.at[self.matrix, self._columns(piece), rows]

    def _write(self, values, buffer):
        buffer.T[...] = plgpu.layout_cast(values, plgpu.Layout.WGMMA_TRANSPOSED)


def sdd(
    lhs: Float[Array, "_ _"],
    rhs: Float[Array, "_ _"],
    topology: Topology,
    *,
    transpose_lhs: bool,
    transpose_rhs: bool,
    precision: lax.PrecisionLike,
    accumulator_dtype: jnp.dtype,
    out_dtype: jnp.dtype,
    config: Config | None = None,
) -> Float[Array, "B block block"]:
    """Multiplies the rows and columns of the blocks of a tile, in float32."""
    del precision, accumulator_dtype  # products of 16-bit operands are exact, sums are in float32
    config = config or Config()
    num_stages, max_blocks, block = config.num_stages, topology.max_num_blocks, topology.block
    block_n = max(topology.blocks_per_tile * block, 128)  # what is wider than the blocks of a tile is not stored
    k_steps = pl.cdiv(lhs.shape[0 if transpose_lhs else 1], _STEP)
    counts = jnp.concatenate([topology.num_tiles, topology.num_blocks[None]])

    def sdd_kernel(lhs, rhs, tiles, counts, out, *, a_s, b_s, out_s, zeros_s, full, empty):
        ring = hopper.Ring(full, empty, num_stages)
        warpgroup = lax.axis_index("wg")
        own_tiles = hopper.count_own_tiles(counts[0])
        own_padding = hopper.count_own_tiles(max_blocks - counts[1])

        def tile_at(i):
            """Loads the first block of this multiprocessor's i-th tile, its row and column, and how many it has."""
            tile = jnp.minimum(hopper.own_tile(i), tiles.shape[0] - 1)
            return tuple(tiles[tile, field] for field in range(4))

        @pl.when(warpgroup == hopper.MEMORY_WARPGROUP)
        def load():
            plgpu.set_max_registers(hopper.MEMORY_REGISTERS, action="decrease")
            zeros_s[...] = jnp.zeros(zeros_s.shape, zeros_s.dtype)
            plgpu.commit_smem()

            def clear_block(i, carry):
                number = counts[1] + hopper.own_tile(i)
                height, width = zeros_s.shape
                for row in range(0, block, height):
                    for column in range(0, block, width):
                        piece = out.at[number, pl.ds(row, height), pl.ds(column, width)]
                        plgpu.copy_smem_to_gmem(zeros_s, piece, commit_group=False)
                plgpu.commit_smem_to_gmem_group()
                return carry

            def load_tile(i, tile):
                _, row, column, _ = tile
                upcoming = tile_at(i + 1)  # long before it is needed, so that nothing waits for it
                rows = pl.ds(pl.multiple_of(row * block, block), block)
                # If the tile has fewer blocks than others, what comes of the rest is not stored.
                columns = pl.ds(pl.multiple_of(column * block, block), block_n)

                def load_step(k, carry):
                    step = i * k_steps + k
                    ring.wait_for_room(step)
                    slot = ring.slot(step)
                    contracted = pl.ds(pl.multiple_of(k * _STEP, _STEP), _STEP)
                    a = lhs.at[contracted, rows] if transpose_lhs else lhs.at[rows, contracted]
                    plgpu.copy_gmem_to_smem(a, a_s.at[slot], full.at[slot])
                    b = rhs.at[columns, contracted] if transpose_rhs else rhs.at[contracted, columns]
                    plgpu.copy_gmem_to_smem(b, b_s.at[slot], full.at[slot])
                    return carry

                lax.fori_loop(0, k_steps, load_step, jnp.int32(0))

                @pl.when(i < own_padding)
                def clear():  # in the shadow of the products
                    clear_block(i, jnp.int32(0))

                return upcoming

            lax.fori_loop(0, own_tiles, load_tile, tile_at(0))
            lax.fori_loop(own_tiles, own_padding, clear_block, jnp.int32(0))
            ring.drain(own_tiles * k_steps)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup < hopper.MEMORY_WARPGROUP)
        def multiply():
            plgpu.set_max_registers(hopper.COMPUTE_REGISTERS, action="increase")
            own_shape, own_rows, own_columns = _own_part(warpgroup, block, block_n)
            own_blocks, buffers = own_columns.start // block, out_s.at[warpgroup]

            def multiply_step(acc, slot):
                _multiply(acc, a_s.at[slot], b_s.at[slot], own_rows, own_columns, transpose_lhs, transpose_rhs)

            def multiply_tile(i, carry):
                (number, _, _, num_blocks), previous = carry
                upcoming = tile_at(i + 1)
                acc = hopper.accumulate(
                    ring,
                    i * k_steps,
                    k_steps,
                    own_shape,
                    multiply_step,
                    meanwhile=previous.pieces(buffers, out),
                )
                done = dataclasses.replace(
                    nothing,
                    values=acc.astype(out.dtype),
                    matrix=number + own_blocks,
                    pending=jnp.bool_(True),
                    num_blocks=num_blocks - own_blocks,
                )
                return upcoming, done

            blank = hopper.FinishedTile.nothing(own_shape, out.dtype)
            nothing = _FinishedBlocks(
                blank.values, blank.matrix, jnp.int32(own_rows.start), blank.column, blank.pending, jnp.int32(0)
            )
            _, last = lax.fori_loop(0, own_tiles, multiply_tile, (tile_at(0), nothing))
            last.store(buffers, out)

            plgpu.wait_smem_to_gmem(0)

    run = hopper.persistent_kernel(
        sdd_kernel,
        out_type=jax.ShapeDtypeStruct((max_blocks, block, block), out_dtype),
        scratch_types={
            **_ring_of_tiles(num_stages, (block, block_n), lhs.dtype, transpose_lhs, transpose_rhs),
            "out_s": _result_buffers(out_dtype, transposed=False),
            "zeros_s": plgpu.SMEM((16, hopper.swizzled_columns(out_dtype)), out_dtype),
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=num_stages),
        },
    )
    return run(lhs, rhs, topology.tiles, counts)


def dsd(
    values: Float[Array, "B block block"],
    dense: Float[Array, "_ _"],
    topology: Topology,
    *,
    transpose_sparse: bool,
    transpose_dense: bool,
    transpose_out: bool,
    precision: lax.PrecisionLike,
    accumulator_dtype: jnp.dtype,
    out_dtype: jnp.dtype,
    config: Config | None = None,
) -> Float[Array, "_ _"]:
    """Multiplies the blocks of a row with the rows of `dense` that they meet, in float32."""
    del precision, accumulator_dtype  # products of 16-bit operands are exact, sums are in float32
    width = dense.shape[0 if transpose_dense else 1]
    config = config or Config(block_n=hopper.block_columns(width))
    block_n, num_stages, block = config.block_n, config.num_stages, topology.block
    steps_per_block = block // _STEP
    lines = topology.column_lines if transpose_sparse else topology.row_lines
    num_lines, num_panels = lines.bounds.shape[0], pl.cdiv(width, block_n)
    num_tiles = num_lines * num_panels

    def dsd_kernel(values, dense, blocks, bounds, out, *, a_s, b_s, out_s, full, empty):
        ring = hopper.Ring(full, empty, num_stages)
        warpgroup = lax.axis_index("wg")
        own_tiles = hopper.count_own_tiles(num_tiles)

        def tile_at(i):
            """Loads the line of this multiprocessor's i-th tile, where its blocks begin and end, and its columns."""
            tile = jnp.minimum(hopper.own_tile(i), num_tiles - 1)
            visit, panel = plgpu.planar_snake(tile, (num_lines, num_panels), 0, config.band_rows)
            return *(bounds[visit, field] for field in range(3)), panel * block_n

        def block_at(j):
            """Loads the number of a block in the order of lines, and its place along its line."""
            j = jnp.minimum(j, blocks.shape[0] - 1)
            return blocks[j, 0], blocks[j, 1]

        @pl.when(warpgroup == hopper.MEMORY_WARPGROUP)
        def load():
            plgpu.set_max_registers(hopper.MEMORY_REGISTERS, action="decrease")

            def load_tile(i, carry):
                first_step, (_, begin, end, column), at = carry
                upcoming = tile_at(i + 1)  # long before it is needed, so that nothing waits for it
                columns = pl.ds(pl.multiple_of(column, block_n), block_n)

                def load_block(j, at):
                    number, place = at
                    # What follows the last block of this tile is the first of the next one.
                    following = block_at(jnp.where(j + 1 < end, j + 1, upcoming[1]))
                    for part in range(steps_per_block):
                        step = first_step + (j - begin) * steps_per_block + part
                        ring.wait_for_room(step)
                        slot = ring.slot(step)
                        of_block = pl.ds(part * _STEP, _STEP)
                        a = values.at[number, of_block] if transpose_sparse else values.at[number, :, of_block]
                        plgpu.copy_gmem_to_smem(a, a_s.at[slot], full.at[slot])
                        contracted = pl.ds(pl.multiple_of(place * block + part * _STEP, _STEP), _STEP)
                        b = dense.at[columns, contracted] if transpose_dense else dense.at[contracted, columns]
                        plgpu.copy_gmem_to_smem(b, b_s.at[slot], full.at[slot])
                    return following

                at = lax.fori_loop(begin, end, load_block, at)
                # A line without blocks has not looked ahead.
                at = lax.cond(end > begin, lambda: at, lambda: block_at(upcoming[1]))
                return first_step + (end - begin) * steps_per_block, upcoming, at

            first = tile_at(0)
            num_steps, *_ = lax.fori_loop(0, own_tiles, load_tile, (jnp.int32(0), first, block_at(first[1])))
            ring.drain(num_steps)

        @pl.when(warpgroup < hopper.MEMORY_WARPGROUP)
        def multiply():
            plgpu.set_max_registers(hopper.COMPUTE_REGISTERS, action="increase")
            own_shape, own_rows, own_columns = _own_part(warpgroup, block, block_n)
            buffers = out_s.at[warpgroup]

            def multiply_step(acc, slot):
                _multiply(acc, a_s.at[slot], b_s.at[slot], own_rows, own_columns, transpose_sparse, transpose_dense)

            def multiply_tile(i, carry):
                first_step, (line, begin, end, column), previous = carry
                upcoming = tile_at(i + 1)
                num_steps = (end - begin) * steps_per_block
                acc = hopper.accumulate(
                    ring,
                    first_step,
                    num_steps,
                    own_shape,
                    multiply_step,
                    meanwhile=previous.pieces(buffers, out),
                )
                row, column = line * block + own_rows.start, column + own_columns.start
                # A warpgroup's half of the last tile may lie beyond the matrix.
                tile = finished(acc.astype(out.dtype), jnp.int32(0), row, column, column < width)
                return first_step + num_steps, upcoming, tile

            finished = _FinishedTranspose if transpose_out else hopper.FinishedTile
            nothing = finished.nothing(own_shape, out.dtype)
            *_, last = lax.fori_loop(0, own_tiles, multiply_tile, (jnp.int32(0), tile_at(0), nothing))
            last.store(buffers, out)
            plgpu.wait_smem_to_gmem(0)

    shape = (num_lines * block, width)
    shape = shape[::-1] if transpose_out else shape
    run = hopper.persistent_kernel(
        dsd_kernel,
        out_type=jax.ShapeDtypeStruct((1, *shape), out_dtype),
        scratch_types={
            **_ring_of_tiles(num_stages, (block, block_n), values.dtype, transpose_sparse, transpose_dense),
            "out_s": _result_buffers(out_dtype, transposed=transpose_out),
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=num_stages),
        },
    )
    return run(values, dense, *lines).reshape(shape)


def _own_part(warpgroup: Array, block: int, block_n: int) -> tuple[tuple[int, int], pl.Slice, pl.Slice]:
    """Returns the shape, the rows and the columns of what a compute warpgroup has of a tile."""
    rows = hopper.WARPGROUP_ROWS
    if block > rows:
        return (rows, block_n), pl.ds(pl.multiple_of(warpgroup * rows, rows), rows), pl.ds(0, block_n)
    columns = block_n // hopper.NUM_COMPUTE_WARPGROUPS
    return (rows, columns), pl.ds(0, rows), pl.ds(pl.multiple_of(warpgroup * columns, columns), columns)


def _multiply(acc, a_s, b_s, own_rows: pl.Slice, own_columns: pl.Slice, transpose_a: bool, transpose_b: bool) -> None:
    """Issues the multiplication of a warpgroup's rows of one tile with its columns of another."""
    a = a_s.at[:, own_rows].transpose((1, 0)) if transpose_a else a_s.at[own_rows]
    b = b_s.at[own_columns].transpose((1, 0)) if transpose_b else b_s.at[:, own_columns]
    plgpu.wgmma(acc, a, b)


def _ring_of_tiles(
    num_stages: int, tile: tuple[int, int], dtype: jax.typing.DTypeLike, transpose_a: bool, transpose_b: bool
) -> dict:
    """Describes the shared memory of a ring of both operands' tiles, as they lie in global memory."""
    a_tile, b_tile = (tile[0], _STEP), (_STEP, tile[1])
    return {
        "a_s": hopper.operand_tile((num_stages, *(a_tile[::-1] if transpose_a else a_tile)), dtype),
        "b_s": hopper.operand_tile((num_stages, *(b_tile[::-1] if transpose_b else b_tile)), dtype),
        "empty": plgpu.Barrier(num_arrivals=hopper.NUM_COMPUTE_WARPGROUPS, num_barriers=num_stages),
    }


def _result_buffers(dtype: jax.typing.DTypeLike, *, transposed: bool) -> pl.MemoryRef:
    """Describes two buffers for each compute warpgroup, of 64 rows of 128 bytes, or as many transposed elements."""
    rows, columns = hopper.WARPGROUP_ROWS, hopper.swizzled_columns(dtype)
    if transposed:
        return hopper.operand_tile((hopper.NUM_COMPUTE_WARPGROUPS, 2, columns, rows), dtype)
    return hopper.result_tile((hopper.NUM_COMPUTE_WARPGROUPS, 2, rows, columns), dtype)
