"""Weighted sums of chosen rows on Hopper: a block for each sum, which has all its rows on their way at once.

XLA's fusion reads the numbers and weights of a sum for every few elements of it again.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

_THREADS = 128
_LOAD_BYTES = 16  # the most that a thread reads at a time
_MAX_CHUNK = 2048  # columns whose sums fit into registers, beside the rows that are on their way
MAX_TERMS = 32  # each one is compiled


def why_unsupported(columns: int, dtype: jax.typing.DTypeLike, num_terms: int) -> str | None:
    """Says which constraint of the kernel an operand breaks, if any."""
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"its rows are {jnp.dtype(dtype)}; the kernel adds bfloat16, float16 or float32."
    if columns % _THREADS:
        return f"a width of {columns} is not a multiple of {_THREADS}."
    if num_terms > MAX_TERMS:
        return f"a sum has {num_terms} terms; the kernel adds at most {MAX_TERMS}."
    return None


def combine(
    rows: Float[Array, "M N"],
    index: Int32[Array, "T K"],
    weight: Float[Array, "T K"] | None,
    num_rows: Int32[Array, ""],
) -> Float[Array, "T N"]:
    """Adds the terms in their order, in float32, a chunk of columns at a time."""
    (num_sums, num_terms), width = index.shape, rows.shape[1]
    columns = next(c for c in range(min(width, _MAX_CHUNK), 0, -_THREADS) if width % c == 0)
    elements = next(e for e in (8, 4, 2, 1) if columns % (e * _THREADS) == 0 and e * rows.itemsize <= _LOAD_BYTES)
    layout = plgpu.Layout.WG_STRIDED((columns,), vec_size=elements)
    last = rows.shape[0] - 1

    def combine_kernel(rows, index, num_rows, *refs):
        *weight, out = refs
        i = lax.axis_index("sum")
        numbers = [index[i, k] for k in range(num_terms)]
        weights = [weight[0][i, k] for k in range(num_terms)] if weight else None
        end = jnp.minimum(num_rows[0], rows.shape[0])

        def of_chunk(number):
            return plgpu.layout_cast(lax.broadcast_in_dim(number, (columns,), ()), layout)

        for first_column in range(0, width, columns):
            chunk = pl.ds(first_column, columns)
            total = plgpu.layout_cast(jnp.zeros((columns,), jnp.float32), layout)
            terms = [
                plgpu.load(rows.at[jnp.clip(number, 0, last), chunk], layout=layout, optimized=False)
                for number in numbers
            ]
            for k, term in enumerate(terms):
                term = term.astype(jnp.float32)
                if weights is not None:
                    term *= weights[k]
                number = of_chunk(numbers[k])
                # A selection, because zero times NaN is NaN.
                total += jnp.where((number >= 0) & (number < end), term, 0.0)
            out[i, chunk] = total.astype(out.dtype)

    return plgpu.kernel(
        combine_kernel,
        out_type=jax.ShapeDtypeStruct((num_sums, width), rows.dtype),
        grid=(num_sums,),
        grid_names=("sum",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(rows, index, num_rows[None], *(() if weight is None else (weight.astype(jnp.float32),)))
