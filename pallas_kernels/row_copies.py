"""Rows gathered from anywhere in global memory into the tiles of a ring, by `cp.async`, on Hopper.

TMA of Hopper copies no scattered rows. The threads of a memory warpgroup copy them, 16 bytes each, and undo by hand
what TMA would do: the 128-byte swizzle. A thread never waits for its copies. It lets the hardware arrive for it on a
barrier, once they are done (`cp.async.mbarrier.arrive.noinc`). Pallas has no such barrier, so these are
plain shared memory that this module initialises and waits for.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, nvvm, vector
from jaxtyping import Array

from pallas_kernels import hopper

_WARPGROUP_THREADS = 128
_COPY_BYTES = 16  # the most that a thread copies at a time
_LINE_THREADS = hopper.SWIZZLE_BYTES // _COPY_BYTES
_LINES = _WARPGROUP_THREADS // _LINE_THREADS  # that a warpgroup copies at a time
MAX_BYTES = 2**31 * _COPY_BYTES  # of a source: its pieces are counted in 32 bits

_SCALAR = plgpu.Layout.WG_SPLAT(())


@dataclasses.dataclass(frozen=True)
class RowCopies:
    """The copies of a kernel's gathered rows: `source[index[i]]` for rows i of a tile.

    Attributes:
        source: [N, columns] of global memory.
        index: int32[M] of global memory, clipped to [0, N).
        arrived: shared memory made by `scratch`: one barrier for each slot of the ring.
        num_slots: the length of the ring.
    """

    source: hopper.Ref
    index: hopper.Ref
    arrived: hopper.Ref
    num_slots: int

    @staticmethod
    def scratch(num_slots: int) -> pl.MemoryRef | plgpu.Barrier:
        """Describes the shared memory of the barriers."""
        return plgpu.SMEM((2 * num_slots,), jnp.int32)  # 8 bytes each

    def prepare(self) -> None:
        """Every warpgroup, before anything else: initialises the barriers."""

        def emit(_, arrived):
            one_thread = mgpu.single_thread_predicate(scope=mgpu.ThreadSubset.BLOCK)
            for slot in range(self.num_slots):
                nvvm.mbarrier_init(_barrier(arrived, slot), mgpu.c(_WARPGROUP_THREADS, _i32()), predicate=one_thread)
            nvvm.fence_mbarrier_init()
            gpu.barrier()

        initialise: Callable[..., None] = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(emit)
        initialise(self.arrived)

    def read(self, first: Array, num_rows: int) -> Array:
        """Memory warpgroup: reads the part of `index` that belongs to the rows from `first` on.

        Nothing waits for it before `locate` does, so it may be called long before.

        Args:
            first: the number, in `index`, of the tile's first row.
            num_rows: of the tile; a multiple of 16.

        Returns:
            What `locate` takes, in registers.
        """
        out = _per_thread(num_rows)
        last = self.index.shape[0] - 1

        def emit(_, index, first):
            i32 = _i32()
            line, _ = _line_and_piece()
            pointer, place = _global_pointer(index), arith.addi(first.registers.flat[0], line)
            rows = []
            for i in range(num_rows // _LINES):
                readable = arith.minui(arith.addi(place, mgpu.c(i * _LINES, i32)), mgpu.c(last, i32))
                rows.append(llvm.load(i32, mgpu.getelementptr(pointer, [readable], i32)))
            return _pack(rows, out)

        emit_read: Callable[..., Array] = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SCALAR), return_type=out)(emit)
        return emit_read(self.index, first)

    def locate(self, rows: Array, first: Array, begin: Array, end: Array, num_rows: int) -> Array:
        """Memory warpgroup: computes where the rows are that `copy` is to bring.

        Args:
            rows: from `read`.
            first: as there.
            begin: where the rows begin that are wanted; the tile's rows before it become zeros.
            end: where they end; the tile's rows from there on become zeros.
            num_rows: as in `read`.

        Returns:
            What `copy` takes, in registers.
        """
        out = _per_thread(num_rows)
        last = self.source.shape[0] - 1
        row_pieces = self.source.shape[1] * jnp.dtype(self.source.dtype).itemsize // _COPY_BYTES

        def emit(_, rows, first, begin, end):
            first, begin, end = (scalar.registers.flat[0] for scalar in (first, begin, end))
            i32 = _i32()
            line, piece = _line_and_piece()
            place, pieces = arith.addi(first, line), []
            for i, row in enumerate(_unpack(rows)):
                own_place = arith.addi(place, mgpu.c(i * _LINES, i32))
                wanted = arith.andi(
                    arith.cmpi(arith.CmpIPredicate.sge, own_place, begin),
                    arith.cmpi(arith.CmpIPredicate.slt, own_place, end),
                )
                row = arith.minsi(arith.maxsi(row, mgpu.c(0, i32)), mgpu.c(last, i32))
                first_piece = arith.addi(arith.muli(row, mgpu.c(row_pieces, i32)), piece)
                pieces.append(arith.select(wanted, first_piece, mgpu.c(-1, i32)))
            return _pack(pieces, out)

        emit_locate: Callable[..., Array] = plgpu.inline_mgpu(
            arg_types=(out.layout, _SCALAR, _SCALAR, _SCALAR), return_type=out
        )(emit)
        return emit_locate(rows, first, begin, end)

    def copy(self, pieces: Array, column: Array, tile: hopper.Ref, slot: Array) -> None:
        """Memory warpgroup: starts the copies of a tile, and has them arrive on the barrier of its slot.

        Args:
            pieces: from `locate`.
            column: the source's column where the tile's column 0 is. Columns past the source's last become zeros; the
                source is a whole number of 128-byte lines wide.
            tile: where to: shared memory made by `operand_tile`.
            slot: of the ring.
        """
        num_rows, columns = tile.shape
        tile_type = plgpu.RefType(hopper.tiled(hopper.TMA_ROWS, tile.dtype))
        line_columns = hopper.swizzled_columns(tile.dtype)
        width, itemsize = self.source.shape[1], jnp.dtype(self.source.dtype).itemsize

        def emit(_, source, arrived, pieces, column, tile, slot):
            column, slot = (scalar.registers.flat[0] for scalar in (column, slot))
            i32, i64 = _i32(), ir.IntegerType.get_signless(64)
            memory = ir.MemRefType(tile.type)
            (band_stride, line_stride, row_stride, _), _ = memory.get_strides_and_offset()
            element, sixteen_bytes = memory.element_type, ir.VectorType.get((4,), i32)
            line, piece = _line_and_piece()
            row_of_band = arith.remui(line, mgpu.c(hopper.TMA_ROWS, i32))
            swizzled = arith.xori(piece, row_of_band)
            offset = arith.addi(
                arith.addi(
                    arith.muli(arith.divui(line, mgpu.c(hopper.TMA_ROWS, i32)), mgpu.c(band_stride, i32)),
                    arith.muli(row_of_band, mgpu.c(row_stride, i32)),
                ),
                arith.muli(swizzled, mgpu.c(_COPY_BYTES // itemsize, i32)),
            )
            target = mgpu.getelementptr(mgpu.memref_ptr(tile), [offset], element)
            origin = mgpu.getelementptr(_global_pointer(source), [arith.extui(i64, column)], element)
            for i, start in enumerate(_unpack(pieces)):
                wanted = arith.cmpi(arith.CmpIPredicate.sge, start, mgpu.c(0, i32))
                num_bytes = arith.select(wanted, mgpu.c(_COPY_BYTES, i32), mgpu.c(0, i32))
                start = arith.extui(i64, arith.maxsi(start, mgpu.c(0, i32)))
                row_origin = mgpu.getelementptr(origin, [start], sixteen_bytes)
                row_target = mgpu.getelementptr(target, [i * _LINES // hopper.TMA_ROWS * band_stride], element)
                for j in range(columns // line_columns):
                    line_bytes = num_bytes
                    if width % columns:  # the tile may reach over the edge of the source, where TMA would bring zeros
                        inside = arith.cmpi(arith.CmpIPredicate.slt, column, mgpu.c(width - j * line_columns, i32))
                        line_bytes = arith.select(inside, num_bytes, mgpu.c(0, i32))
                    nvvm.cp_async_shared_global(
                        mgpu.getelementptr(row_target, [j * line_stride], element),
                        mgpu.getelementptr(row_origin, [j * _LINE_THREADS], sixteen_bytes),
                        _COPY_BYTES,
                        nvvm.LoadCacheModifierKind.CG,
                        cp_size=line_bytes,
                    )
            nvvm.cp_async_mbarrier_arrive(_barrier(arrived, slot), noinc=True)

        start_copies: Callable[..., None] = plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.RefType(), _per_thread(num_rows).layout, _SCALAR, tile_type, _SCALAR)
        )(emit)
        start_copies(self.source, self.arrived, pieces, column, tile, slot)

    def wait(self, step: Array) -> None:
        """Compute warpgroup: waits until the rows of the kernel's step number `step` have arrived."""

        def emit(_, arrived, slot, parity):
            slot, parity = slot.registers.flat[0], parity.registers.flat[0]
            nvvm.mbarrier_try_wait_parity(_barrier(arrived, slot), parity, mgpu.c(10_000_000, _i32()))
            # The threads' copies are seen by the threads now, and by the tensor cores after this.
            nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

        wait: Callable[..., None] = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SCALAR, _SCALAR))(emit)
        wait(self.arrived, step % self.num_slots, step // self.num_slots % 2)


@dataclasses.dataclass(frozen=True)
class _GatherRing(hopper.Ring):
    """A ring some of whose tiles are gathered."""

    copies: RowCopies

    def wait_for_data(self, step: Array) -> None:
        super().wait_for_data(step)
        self.copies.wait(step)


def make_ring(full: hopper.Ref, empty: hopper.Ref, num_slots: int, copies: RowCopies | None) -> hopper.Ring:
    """Every warpgroup, before anything else: makes a ring, some of whose tiles these copies fill, if there are any."""
    if copies is None:
        return hopper.Ring(full, empty, num_slots)
    copies.prepare()
    return _GatherRing(full, empty, num_slots, copies)


def _i32() -> ir.IntegerType:
    return ir.IntegerType.get_signless(32)


def _per_thread(num_rows: int) -> plgpu.ShapeDtypeStruct:
    """Describes an array of one number for each line that each thread copies a piece of."""
    shape = (num_rows // _LINES * _WARPGROUP_THREADS,)
    return plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.int32), layout=plgpu.Layout.WG_STRIDED(shape, vec_size=1))


def _pack(numbers, out):
    one = ir.VectorType.get((1,), _i32())
    registers = np.array([vector.broadcast(one, number) for number in numbers])
    return fragmented_array.FragmentedArray(_registers=registers, _layout=out.layout.to_mgpu(), _is_signed=True)


def _unpack(array):
    return [vector.extract(register, [], [0]) for register in array.registers.flat]


def _barrier(arrived, slot):
    """Returns the address of a slot's barrier."""
    return mgpu.getelementptr(mgpu.memref_ptr(arrived), [slot], ir.IntegerType.get_signless(64))


def _global_pointer(ref):
    return llvm.addrspacecast(llvm.PointerType.get(address_space=1), mgpu.memref_ptr(ref))


def _line_and_piece():
    """Returns which line, of those that the warpgroup copies at a time, and which 16 bytes of it are this thread's."""
    thread = arith.remui(mgpu.thread_idx(), mgpu.c(_WARPGROUP_THREADS, _i32()))
    pieces = mgpu.c(_LINE_THREADS, _i32())
    return arith.divui(thread, pieces), arith.remui(thread, pieces)
