"""Checks of array arguments, which name the argument, what it is and what it must be."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array


def check_array(name: str, array: Array, layout: Sequence[str], sizes: Mapping[str, int], remedy: str = "") -> None:
    """Raises a ValueError unless an array is floating-point and has the layout, with the sizes that are known."""
    fits = array.ndim == len(layout) and all(sizes.get(d, s) == s for d, s in zip(layout, array.shape, strict=True))
    if not fits or not jnp.issubdtype(array.dtype, jnp.floating):
        expected = ", ".join(f"{d}={sizes[d]}" if d in sizes else d for d in layout)
        raise ValueError(f"{name} is {array.dtype}{list(array.shape)}; it must be floating-point [{expected}]{remedy}.")
