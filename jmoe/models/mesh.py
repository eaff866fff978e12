"""Running a model on a mesh with Explicit axes."""

from collections.abc import Callable
from typing import Any, cast

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Int


def with_auto_axes[**P, T](function: Callable[P, T], out_sharding: Any) -> Callable[P, T]:
    """Lets XLA place what a function computes inside, also over the Explicit axes of the current mesh.

    Args:
        function: Of pytrees of arrays.
        out_sharding: A `PartitionSpec` for each result, or one for each subtree of results.

    Returns:
        The function, as it is where the mesh has no Explicit axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    explicit = tuple(
        name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit
    )
    if not explicit:
        return function
    return cast(Callable[P, T], jax.sharding.auto_axes(function, axes=explicit, out_sharding=out_sharding))


def batch_spec(tokens: Int[Array, "B S"]) -> PartitionSpec:
    """Says how the first dimension of the tokens is sharded over Explicit axes."""
    return PartitionSpec(*jax.typeof(tokens).sharding.spec[:1])
