"""Where the supported versions of JAX differ."""

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array


def store_as_laid_out(ref: Any, values: Array) -> None:
    """In a Mosaic GPU kernel: stores values in the layout that they have, even if not all of a sector is written.

    JAX 0.12 refuses such stores unless told; JAX 0.11 has nothing to tell it with.
    """
    if hasattr(plgpu, "store"):
        plgpu.store(ref, values, optimized=False)
    else:
        ref[...] = values
