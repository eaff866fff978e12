"""The Hopper up-projection: the grouped matmul's kernel, with gate columns and their up columns in one tile.

A tile of pre-activations waits in registers for the next tile's products to run, as every tile does, and its
activations are computed in their shadow.
"""

import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from pallas_kernels import hopper
from pallas_kernels.grouped_matmul.mosaic_gpu import Config, Epilogue, multiply_tiles


def up_projection(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "G K H"],
    group_sizes: Integer[Array, " G"],
    activation: Callable[..., Array],
    *,
    num_parts: int,
    config: Config | None = None,
) -> tuple[Float[Array, "M H"], Float[Array, "M F"]]:
    """Multiplies tiles of each group with wgmma, in float32, and activates them as they are rounded."""
    width, dtype = rhs.shape[2], jnp.dtype(lhs.dtype)
    part_columns = width // num_parts
    config = config or Config(block_n=hopper.block_columns(width))
    epilogue = Epilogue(
        parts=tuple(part * part_columns for part in range(num_parts)),
        part_columns=part_columns,
        widths=(width, part_columns),
        dtype=dtype,
        cut=functools.partial(_cut, activation, num_parts),
    )
    h, a = multiply_tiles(lhs, rhs, group_sizes, epilogue, transpose_rhs=False, config=config)
    return h, a


def _cut(
    activation: Callable[..., Array], num_parts: int, tile: hopper.FinishedTile, outs: Sequence[hopper.Ref]
) -> list[hopper.Piece]:
    """Gives each part's columns to the pre-activations, and the activation of all parts to the activations."""
    h, a = outs
    dtype, part_columns = tile.values[0].dtype, a.shape[2]

    def activate(first: int) -> Array:
        return activation(*(tile.columns(part, first).astype(jnp.float32) for part in range(num_parts))).astype(dtype)

    pieces = []
    for first in tile.first_columns:
        column = tile.column + first
        for part in range(num_parts):
            before = part * part_columns
            values = functools.partial(tile.columns, part, first)
            pieces.append(hopper.Piece(h, before + column, before + part_columns, values))
        pieces.append(hopper.Piece(a, column, part_columns, functools.partial(activate, first)))
    return pieces
