"""The k largest entries of each row on Hopper: a warp holds whole rows in registers, and finds one after the other.

XLA sorts each row instead, which for the few columns of a router's logits takes five times as long.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.compatibility import store_as_laid_out

BLOCK_ROWS = 8  # two for each warp
MAX_COLUMNS, MAX_K = 1024, 32  # 32 registers of a thread for each row; every step of k is compiled
_WARPS, _LANES = 4, 32
_TAKEN = jnp.iinfo(jnp.int32).min  # below the key of any number


def why_unsupported(columns: int, dtype: jax.typing.DTypeLike, k: int) -> str | None:
    """Says which constraint of the kernel an operand breaks, if any."""
    if dtype != jnp.float32:
        return f"its operand is {jnp.dtype(dtype)}; the kernel compares float32."
    if columns > MAX_COLUMNS or k > MAX_K:
        return f"k = {k} of {columns} columns; the kernel finds at most {MAX_K} of {MAX_COLUMNS}."
    return None


def top_k(x: Float[Array, "M N"], k: int) -> tuple[Float[Array, "M k"], Int32[Array, "M k"]]:
    """Takes the largest entry of each row k times, the first one of those that are equal."""
    num_rows, num_columns = x.shape
    # Columns that are added are never chosen: they come after the others, and nothing is less than they are.
    columns = max(_LANES, pl.next_power_of_2(num_columns))  # of which every lane holds 1, 2, 4, ...
    added = max(BLOCK_ROWS - num_rows, 0), columns - num_columns
    x = jnp.pad(x, [(0, count) for count in added], constant_values=-jnp.inf)
    rows_read = x.shape[0]
    layout = _warp_rows(columns)

    def top_k_kernel(x, key_out, index_out):
        # The last block moves up to end with the last row, and computes some rows a second time.
        rows = pl.ds(jnp.minimum(lax.axis_index("block") * BLOCK_ROWS, rows_read - BLOCK_ROWS), BLOCK_ROWS)
        key = _key_of(plgpu.load(x.at[rows], layout=layout, optimized=False))
        column = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, key.shape, 1), layout)
        for i in range(k):
            largest = jnp.max(key, axis=1)
            where = jnp.min(jnp.where(key == _of_rows(largest, key), column, columns), axis=1)
            key = jnp.where(column == _of_rows(where, key), jnp.int32(_TAKEN), key)
            store_as_laid_out(key_out.at[i, rows], largest)
            store_as_laid_out(index_out.at[i, rows], where)

    key, index = plgpu.kernel(
        top_k_kernel,
        out_type=2 * [jax.ShapeDtypeStruct((k, rows_read), jnp.int32)],
        grid=(pl.cdiv(rows_read, BLOCK_ROWS),),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(x)
    return _number_of(key.T[:num_rows]), index.T[:num_rows]


def _key_of(x: Array) -> Array:
    """Maps float32 to int32 in XLA's order, in which -0 is less than 0, and NaN of either sign is the largest."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    ordered = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
    return jnp.where(x != x, jnp.int32(0x7FFFFFFF), ordered)


def _number_of(key: Array) -> Array:
    """The inverse of `_key_of`."""
    return lax.bitcast_convert_type(jnp.where(key < 0, key ^ jnp.int32(0x7FFFFFFF), key), jnp.float32)


def _of_rows(numbers: Array, like: Array) -> Array:
    return lax.broadcast_in_dim(numbers, like.shape, (0,))


def _warp_rows(columns: int) -> Any:  # Pallas has no public type for a layout with parameters
    """Describes rows in registers: every warp holds whole rows, and each of its lanes neighbouring columns."""
    tiling = fragmented_array.Tiling(((_WARPS, columns), (columns // _LANES,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
