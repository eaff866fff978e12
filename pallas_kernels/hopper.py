"""What the Hopper kernels share: the layout of their tiles, the ring of shared memory, and stores of ragged rows.

A kernel's block is three warpgroups: a memory warpgroup that keeps a ring of tiles filled by TMA, and two compute
warpgroups that multiply them by wgmma. The blocks are persistent: one for each streaming multiprocessor, which takes
tile after tile.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.device import num_sms

NUM_COMPUTE_WARPGROUPS = 2
MEMORY_WARPGROUP = NUM_COMPUTE_WARPGROUPS
MEMORY_REGISTERS, COMPUTE_REGISTERS = 56, 224
WARPGROUP_ROWS = 64  # of one wgmma
SWIZZLE_BYTES = 128
TMA_ROWS = 8  # a window that TMA reads into a tile for wgmma starts at a multiple of this
SHARED_MEMORY_BYTES = 232_448

type Ref = Any  # Pallas has no public type for a reference inside a kernel, whole or sliced
type Scalar = Array | int


def swizzled_columns(dtype: jax.typing.DTypeLike) -> int:
    """Returns how many elements one 128-byte swizzled line of shared memory holds."""
    return SWIZZLE_BYTES // jnp.dtype(dtype).itemsize


def operand_tile(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> pl.MemoryRef:
    """Describes shared memory for tiles that wgmma reads."""
    return plgpu.SMEM(shape, dtype, transforms=tiled(TMA_ROWS, dtype))


def result_tile(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> pl.MemoryRef:
    """Describes shared memory for tiles of which any range of rows can be stored."""
    return plgpu.SMEM(shape, dtype, transforms=tiled(1, dtype))


def tiled(rows: int, dtype: jax.typing.DTypeLike) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """Describes tiles of so many rows, 128 bytes wide and swizzled."""
    return plgpu.TilingTransform((rows, swizzled_columns(dtype))), plgpu.SwizzleTransform(SWIZZLE_BYTES)


@dataclasses.dataclass(frozen=True)
class Ring:
    """A ring of shared-memory slots between the memory warpgroup, which fills them, and the compute warpgroups.

    Attributes:
        full: one barrier for each slot: its tiles have arrived.
        empty: one barrier for each slot: every compute warpgroup is done with it.
        num_slots: the length of the ring. A compute warpgroup waits for a step's tiles while two slots are not yet
            released, so that it must be at least 3.
    """

    full: Ref
    empty: Ref
    num_slots: int

    def __post_init__(self):
        if self.num_slots < 3:
            raise ValueError(f"num_stages is {self.num_slots}; a ring of fewer than 3 slots would wait for itself.")

    def slot(self, step: Scalar) -> Array:
        """Returns the slot of the kernel's step number `step`."""
        return lax.rem(step, self.num_slots)

    def wait_for_room(self, step: Array) -> None:
        """Memory warpgroup: waits until the slot of `step` may be filled."""

        @pl.when(step >= self.num_slots)
        def wait():
            plgpu.barrier_wait(self.empty.at[self.slot(step)])

    def drain(self, num_steps: Array) -> None:
        """Memory warpgroup, at its end: waits until every slot that it filled has been read."""

        def wait(step, carry):
            plgpu.barrier_wait(self.empty.at[self.slot(step)])
            return carry

        lax.fori_loop(jnp.maximum(num_steps - self.num_slots, 0), num_steps, wait, jnp.int32(0))

    def wait_for_data(self, step: Array) -> None:
        """Compute warpgroup: waits until the tiles of `step` have arrived."""
        plgpu.barrier_wait(self.full.at[self.slot(step)])

    def release(self, step: Array) -> None:
        """Compute warpgroup: hands the slot of `step` back."""
        plgpu.barrier_arrive(self.empty.at[self.slot(step)])


def accumulate(
    ring: Ring,
    first_step: Array,
    num_steps: Scalar,
    shape: tuple[int, int],
    multiply: Callable[[Ref, Array], None],
    prepare: Callable[[Array, Array], None] | None = None,
    meanwhile: Sequence[Callable[[], None]] = (),
) -> Array:
    """Compute warpgroup: sums the products of the ring's next `num_steps` steps.

    Args:
        ring: where the operands arrive.
        first_step: the kernel's number of the first of these steps.
        num_steps: how many there are; with none the sum is zero.
        shape: of the accumulator.
        multiply: called with the accumulator and a slot; issues one wgmma.
        prepare: called with the number of a step among these and its slot, before it is multiplied, with its tiles
            there.
        meanwhile: work to do while the tensor cores are busy, one piece after each of the first wgmmas.

    Returns:
        f32[shape], in registers.
    """

    def await_step(k):
        ring.wait_for_data(first_step + k)
        if prepare is not None:
            prepare(k, ring.slot(first_step + k))

    def scope(acc):
        pl.when(num_steps > 0)(lambda: await_step(jnp.int32(0)))

        def step(k, carry):
            multiply(acc, ring.slot(first_step + k))
            for turn, work in enumerate(meanwhile):
                pl.when(k == turn)(work)
            # While the tensor cores are busy, so that the next wgmma can follow this one at once.
            pl.when(k + 1 < num_steps)(lambda: await_step(k + 1))
            # One wgmma stays in flight, so the slot that is surely read is the one before.
            plgpu.wgmma_wait(1)

            @pl.when(k > 0)
            def release_previous():
                ring.release(first_step + k - 1)

            return carry

        lax.fori_loop(0, num_steps, step, jnp.int32(0))
        plgpu.wgmma_wait(0)

        @pl.when(num_steps > 0)
        def release_last():
            ring.release(first_step + num_steps - 1)

        return acc[...]

    out = pl.run_scoped(scope, plgpu.ACC(shape))
    for turn, work in enumerate(meanwhile):
        pl.when(num_steps <= turn)(work)
    return out


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FinishedTile:
    """A finished tile in registers, on its way to global memory.

    Storing it takes a warpgroup about as long as two steps of the ring. So a tile of which all rows are stored is
    kept until the next tile's first products run on the tensor cores, and its pieces are stored in their shadow.
    A tile that only some rows belong to is stored at once, since that takes more instructions than fit there.

    Attributes:
        values: [64, columns], in registers, of the dtype of the result.
        matrix: which matrix of the result it belongs to.
        row: the row of that matrix where the tile's row 0 belongs.
        column: the column where the tile's column 0 belongs.
        pending: whether the tile is still to be stored.
    """

    values: Array
    matrix: Array
    row: Array
    column: Array
    pending: Array

    @classmethod
    def nothing(cls, shape: tuple[int, int], dtype: jax.typing.DTypeLike) -> "FinishedTile":
        """Returns a tile that is not to be stored."""
        return cls(jnp.zeros(shape, dtype), jnp.int32(0), jnp.int32(0), jnp.int32(0), jnp.bool_(False))

    def pieces(self, buffers: Ref, out: Ref) -> list[Callable[[], None]]:
        """Cuts the store of a pending tile into pieces, 128 bytes wide each, to be called in order.

        Args:
            buffers: [2, 64, 128 bytes] of shared memory, made by `result_tile`, this warpgroup's own.
            out: [matrices, rows, columns] of global memory. The copies are left in flight.
        """

        def store_piece(piece):
            @pl.when(self.pending & self._is_stored(piece, out))
            def store():
                buffer = self._stage(piece, buffers)
                plgpu.copy_smem_to_gmem(buffer, self._destination(piece, out))

        return [functools.partial(store_piece, piece) for piece in range(self._num_pieces)]

    def store(self, buffers: Ref, out: Ref) -> None:
        """Stores a pending tile at once."""
        for store_piece in self.pieces(buffers, out):
            store_piece()

    def store_rows(self, begin: Array, end: Array, buffers: Ref, out: Ref) -> None:
        """Stores rows `begin : end` of the tile at once, if there are any."""
        for piece in range(self._num_pieces):

            @pl.when((end > begin) & self._is_stored(piece, out))
            def store(piece=piece):
                buffer, columns = self._stage(piece, buffers), self._columns(piece)
                # A TMA copy has a static height, so a part of the tile leaves as copies of 2^i rows for the ones
                # among the binary digits of its height.
                done = begin
                for height in (64, 32, 16, 8, 4, 2, 1):
                    rows_s = buffer.at[pl.ds(done, height)] if height < WARPGROUP_ROWS else buffer
                    rows = pl.ds(self.row + done, height)

                    @pl.when((end - begin) & height != 0)
                    def copy(rows_s=rows_s, rows=rows, columns=columns):
                        plgpu.copy_smem_to_gmem(rows_s, out.at[self.matrix, rows, columns], commit_group=False)

                    done = done + ((end - begin) & height)
                plgpu.commit_smem_to_gmem_group()

    @property
    def _num_pieces(self) -> int:
        return self.values.shape[1] // swizzled_columns(self.values.dtype)

    def _is_stored(self, piece: int, out: Ref) -> Array | bool:
        """Says whether a piece lies inside the matrix. A copy may reach over its edge, but not lie beyond."""
        num_columns = out.shape[2]
        if num_columns % self.values.shape[1] == 0:
            return True
        return self.column + piece * swizzled_columns(self.values.dtype) < num_columns

    def _destination(self, piece: int, out: Ref) -> Ref:
        """The place of a whole piece in the result."""
        return out.at[self.matrix, pl.ds(self.row, WARPGROUP_ROWS), self._columns(piece)]

    def _columns(self, piece: int) -> Any:
        """The columns that a piece belongs to."""
        width = swizzled_columns(self.values.dtype)
        return pl.ds(pl.multiple_of(self.column + piece * width, width), width)

    def _stage(self, piece: int, buffers: Ref) -> Ref:
        """Writes a piece to shared memory; returns where it is."""
        buffer, width = buffers.at[piece % 2], swizzled_columns(self.values.dtype)
        plgpu.wait_smem_to_gmem(1 if piece else 0, wait_read_only=True)
        self._write(self.values[:, piece * width : (piece + 1) * width], buffer)
        plgpu.commit_smem()
        return buffer

    def _write(self, values: Array, buffer: Ref) -> None:
        """Writes values as they are to lie in global memory."""
        buffer[...] = values


def why_unsupported(
    widths: tuple[int, ...], dtype: jax.typing.DTypeLike, out_dtype: jax.typing.DTypeLike
) -> str | None:
    """Says which constraint of the matmul kernels operands break, if any.

    Args:
        widths: every matrix width among the operands.
        dtype: of the operands.
        out_dtype: of the result.
    """
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"its operands are {jnp.dtype(dtype)}; the kernel multiplies bfloat16 or float16."
    if out_dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"its result is {jnp.dtype(out_dtype)}; the kernel writes bfloat16, float16 or float32."
    if odd := [width for width in widths if width % WARPGROUP_ROWS]:
        return f"a width of {odd[0]} is not a multiple of {WARPGROUP_ROWS}."
    return None


def block_columns(n: int) -> int:
    """Chooses the columns of a tile: 256, unless more than an eighth of them would lie outside the matrix."""
    return 256 if pl.cdiv(n, 256) * 256 * 7 <= n * 8 else 128


def fits_shared_memory(num_slots: int, slot_elements: int, dtype: jax.typing.DTypeLike) -> bool:
    """Says whether a ring of such slots fits beside the buffers of `FinishedTile` and the barriers."""
    buffers = NUM_COMPUTE_WARPGROUPS * 2 * WARPGROUP_ROWS * SWIZZLE_BYTES
    barriers = 1024
    return num_slots * slot_elements * jnp.dtype(dtype).itemsize + buffers + barriers <= SHARED_MEMORY_BYTES


def chunk_columns(width: int) -> int:
    """Chooses how many columns of a row to work on at a time: the most of 256, 128 and 64 that divide its width."""
    return next(columns for columns in (256, 128, 64) if width % columns == 0)


def pad_rows(x: Float[Array, "M N"]) -> Float[Array, "_ N"]:
    """Copies x to a whole number of 8-row lines, where it has not; TMA reads nothing less."""
    padding = -x.shape[0] % TMA_ROWS
    return jnp.pad(x, ((0, padding), (0, 0))) if padding else x


def persistent_kernel(body: Callable, *, out_type: jax.ShapeDtypeStruct, scratch_types: dict) -> Callable:
    """Wraps a kernel body of three warpgroups ("wg") with one persistent block ("sm") for each multiprocessor."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(num_sms(),),
        grid_names=("sm",),
        num_threads=NUM_COMPUTE_WARPGROUPS + 1,
        thread_name="wg",
        scratch_types=scratch_types,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )


def own_tile(i: Scalar) -> Array:
    """In a persistent kernel: returns the number of this block's i-th tile."""
    return lax.axis_index("sm") + i * lax.axis_size("sm")


def count_own_tiles(num_tiles: Scalar) -> Array:
    """In a persistent kernel: returns how many of the first `num_tiles` tiles are this block's."""
    return pl.cdiv(num_tiles - lax.axis_index("sm"), lax.axis_size("sm"))
