"""The Hopper gather of rows: every row is read once, and written to each place where it belongs.

A gather that goes along the result reads a row as often as it is wanted, mostly from memory: two times the bytes of
the result. This kernel goes along the source instead. TMA brings some rows to shared memory and copies each row from
there to its places, so no byte passes through a register.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Integer

from pallas_kernels import hopper

_MAX_BOX = 256  # of a TMA copy along one axis
_MAX_UNROLLED_COPIES = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel cuts its work.

    Attributes:
        slot_bytes: about how many bytes of rows a slot of the ring holds.
        num_slots: slots of the ring; the loads of all but one are under way while the rows of that one are stored.
    """

    slot_bytes: int = 65_536
    num_slots: int = 3


def gather_rows(
    x: Float[Array, "N D"],
    index: Integer[Array, " M"],
    position: Integer[Array, "N C"],
    *,
    config: Config | None = None,
) -> Float[Array, "M D"]:
    """Writes row n of x to the rows `position[n]` of the result."""
    del index
    config = config or Config()
    width, num_copies = x.shape[1], position.shape[1]
    columns = hopper.chunk_columns(width)
    chunks = width // columns
    # A row that is too wide for one copy or one slot is several rows, whose places lie side by side too.
    most_chunks = min(_MAX_BOX, max(config.slot_bytes // (columns * x.dtype.itemsize), 1))
    parts = next(parts for parts in range(1, chunks + 1) if chunks % parts == 0 and chunks // parts <= most_chunks)
    x = x.reshape(-1, chunks // parts, columns)
    num_rows = x.shape[0]
    row_bytes = width // parts * x.dtype.itemsize
    slot_rows = max(1, min(config.slot_bytes // row_bytes, num_rows, _MAX_BOX))
    num_slots = config.num_slots

    def kernel(x, position, out, rows_s, full):
        own_steps = hopper.count_own_tiles(pl.cdiv(num_rows, slot_rows))

        def first_row(step):
            return hopper.own_tile(step) * slot_rows

        def load(step):
            slot = lax.rem(step, num_slots)
            rows = pl.ds(first_row(step), slot_rows)
            plgpu.copy_gmem_to_smem(x.at[rows], rows_s.at[slot], full.at[slot])

        def start(step, carry):
            load(step)
            return carry

        def store_slot(step, carry):
            slot, first = lax.rem(step, num_slots), first_row(step)
            plgpu.barrier_wait(full.at[slot])

            def store_row(i, carry):
                row, part = lax.div(first + i, parts), lax.rem(first + i, parts)

                def store(to):
                    plgpu.copy_smem_to_gmem(rows_s.at[slot, i], out.at[to * parts + part], commit_group=False)

                if num_copies <= _MAX_UNROLLED_COPIES:
                    # All are read before the first copy, so that they are waited for together.
                    for to in [position[row, c] for c in range(num_copies)]:
                        store(to)
                    return carry

                def store_copy(c, carry):
                    store(position[row, c])
                    return carry

                return lax.fori_loop(0, num_copies, store_copy, carry)

            lax.fori_loop(0, jnp.minimum(slot_rows, num_rows - first), store_row, carry)
            plgpu.commit_smem_to_gmem_group()

            # The slot of the step before is free once its stores have read it; this step's are left in flight.
            @pl.when((step > 0) & (step - 1 + num_slots < own_steps))
            def load_ahead():
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                load(step - 1 + num_slots)

            return carry

        lax.fori_loop(0, jnp.minimum(own_steps, num_slots), start, jnp.int32(0))
        lax.fori_loop(0, own_steps, store_slot, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    run = hopper.persistent_kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((num_rows * num_copies, *x.shape[1:]), x.dtype),
        scratch_types={
            "rows_s": plgpu.SMEM((num_slots, slot_rows, *x.shape[1:]), x.dtype),
            "full": plgpu.Barrier(num_arrivals=1, num_barriers=num_slots),
        },
        num_warpgroups=1,
    )
    return run(x, position).reshape(-1, width)
