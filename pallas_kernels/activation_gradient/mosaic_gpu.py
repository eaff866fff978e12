"""The Hopper backward of a weighted activation: one pass over its operands, which XLA needs two for.

A block takes a few rows, each warp whole rows of them, so that the sums over a row stay within a warp. Many small
blocks share a multiprocessor and hide each other's waiting for memory.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import hopper
from pallas_kernels.activation_gradient.reference import go_back
from pallas_kernels.compatibility import store_as_laid_out

BLOCK_ROWS = 8  # two for each warp
_WARPS, _LANES = 4, 32


def activation_gradient(
    h: Float[Array, "M H"],
    out_grad: Float[Array, "M F"],
    weight: Float[Array, " M"] | None,
    value_and_derivative: Callable[[Array], tuple[Array, Array]],
) -> tuple[Float[Array, "M H"], Float[Array, "M F"], Float[Array, " M"] | None]:
    """Goes back through the activation in float32, a chunk of the columns of each part at a time."""
    num_rows, width = out_grad.shape
    num_parts = h.shape[1] // width
    columns = hopper.chunk_columns(width)
    layout = _warp_rows(columns)

    def activation_gradient_kernel(h, out_grad, *refs):
        weight_ref, refs = (refs[0], refs[1:]) if weight is not None else (None, refs)
        dh, a = refs[:2]
        # The last block moves up to end with the last row, and computes some rows a second time.
        first = jnp.minimum(lax.axis_index("block") * BLOCK_ROWS, num_rows - BLOCK_ROWS)
        rows = pl.ds(first, BLOCK_ROWS)

        def load(ref, first_column):
            where = ref.at[rows, pl.ds(pl.multiple_of(first_column, columns), columns)]
            return plgpu.load(where, layout=layout, optimized=False).astype(jnp.float32)

        def store(ref, first_column, values):
            ref[rows, pl.ds(pl.multiple_of(first_column, columns), columns)] = values.astype(ref.dtype)

        scale = None
        if weight_ref is not None:
            of_rows = plgpu.load(weight_ref.at[rows], layout=layout.reduce(1), optimized=False)
            scale = lax.broadcast_in_dim(of_rows, (BLOCK_ROWS, columns), (0,))

        def chunk(i, dweight):
            first_columns = [part * width + i * columns for part in range(num_parts)]
            parts = [load(h, first_column) for first_column in first_columns]
            values, gradients, of_weight = go_back(parts, load(out_grad, i * columns), value_and_derivative)
            if scale is not None:
                values, gradients, dweight = values * scale, [g * scale for g in gradients], dweight + of_weight
            for first_column, gradient in zip(first_columns, gradients, strict=True):
                store(dh, first_column, gradient)
            store(a, i * columns, values)
            return dweight

        dweight = plgpu.layout_cast(jnp.zeros((BLOCK_ROWS, columns), jnp.float32), layout)
        dweight = lax.fori_loop(0, width // columns, chunk, dweight)
        if weight_ref is not None:
            store_as_laid_out(refs[2].at[rows], jnp.sum(dweight, axis=1))

    of_weight = () if weight is None else (weight.astype(jnp.float32),)
    outs = plgpu.kernel(
        activation_gradient_kernel,
        out_type=[
            jax.ShapeDtypeStruct(h.shape, h.dtype),
            jax.ShapeDtypeStruct(out_grad.shape, h.dtype),
            *(jax.ShapeDtypeStruct(w.shape, w.dtype) for w in of_weight),
        ],
        grid=(pl.cdiv(num_rows, BLOCK_ROWS),),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(h, out_grad, *of_weight)
    return (*outs, None) if weight is None else tuple(outs)


def _warp_rows(columns: int) -> Any:  # Pallas has no public type for a layout with parameters
    """Describes rows in registers: every warp holds whole rows, and each of its lanes neighbouring columns."""
    tiling = fragmented_array.Tiling(((_WARPS, columns), (columns // _LANES,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
