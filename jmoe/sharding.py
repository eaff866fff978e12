"""Logical axis names of parameters and tokens, and what they mean on a mesh."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from flax.core.spmd import get_logical_axis_rules
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

LOGICAL_AXIS_RULES = (
    ("batch", ("data", "fsdp", "expert")),
    ("expert", "expert"),
    ("embed", "fsdp"),
    ("expert_hidden", "tensor"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("vocab", "tensor"),
    ("layers", None),
)
"""The mesh axes of each logical axis, used unless Flax's `nnx.logical_axis_rules` are set.

The default mesh axes are data, fsdp, expert and tensor; a mesh may have any of them, or none. Outside the
experts the expert axis holds tokens like the data axis. A logical name without a rule, and a mesh axis that
the mesh lacks, mean replicated.
"""

LogicalAxes = Sequence[str | None]
Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


def partition_spec(axes: LogicalAxes, shape: Sequence[int], mesh: Mesh | None = None) -> PartitionSpec:
    """Resolves logical axis names to the axes of a mesh.

    Mesh axes that are missing, manual (inside `jax.shard_map`), used by an earlier dimension, or whose size
    does not divide the dimension are left out: that dimension is then replicated over them.

    Args:
        axes: a logical name, or None, for each dimension.
        shape: the shape of the array.
        mesh: by default the current one, as set by `jax.set_mesh`.

    Returns:
        A `PartitionSpec` with one entry for each dimension.

    Example:
        >>> import jax
        >>> import jmoe
        >>> mesh = jax.sharding.AbstractMesh((2, 4), ("data", "expert"))
        >>> tuple(jmoe.partition_spec(("expert", "embed", "expert_hidden"), (8, 16, 32), mesh))
        ('expert', None, None)
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    used = set()
    entries = []
    for axis, size in zip(axes, shape, strict=True):
        entry = _dividing(mesh_axes(axis, mesh), used, size, mesh)
        used |= set(entry)
        entries.append(_as_entry(entry))
    return PartitionSpec(*entries)


def mesh_axes(axis: str | None, mesh: Mesh) -> tuple[str, ...]:
    """Returns the axes of a mesh that a logical axis may be sharded over."""
    rules: dict[str | None, Any] = dict(get_logical_axis_rules() or LOGICAL_AXIS_RULES)
    return tuple(name for name in as_axes(rules.get(axis)) if name in shardable_axes(mesh))


def logical_axis_rules(mesh: Mesh) -> tuple[tuple[str, str | tuple[str, ...] | None], ...]:
    """Returns the rules in force, without the axes that a mesh lacks, for Flax's own sharding functions.

    Flax takes a mesh axis that is not there for an error. `nnx.eval_shape`, `nnx.get_partition_spec` and
    their like therefore want these rules where a mesh has but some of the default axes.

    Example:
        >>> import jax
        >>> import jmoe
        >>> from flax import nnx
        >>> mesh = jax.make_mesh((1,), ("expert",))
        >>> with jax.set_mesh(mesh), nnx.logical_axis_rules(jmoe.logical_axis_rules(mesh)):
        ...     moe = nnx.eval_shape(lambda: jmoe.MoE(16, 32, num_experts=4, top_k=2, rngs=nnx.Rngs(0)))
        >>> tuple(moe.w_up.get_value().sharding.spec)
        ('expert', None, None)
    """
    rules = get_logical_axis_rules() or LOGICAL_AXIS_RULES
    return tuple((name, _as_entry(mesh_axes(name, mesh))) for name, _ in rules)


def named_sharding[T](tree: T, mesh: Mesh) -> T:
    """Computes the sharding of every parameter of a module or state, by its logical axis names.

    Args:
        tree: an `nnx.State`, or any pytree of `nnx.Variable`s and arrays. Those without names are replicated.
        mesh: where the parameters shall live.

    Returns:
        The same tree with a `NamedSharding` in place of each array, for `jax.device_put` or `out_shardings`.
    """

    def sharding_of(leaf):
        axes = leaf.get_metadata().get("out_sharding") if isinstance(leaf, nnx.Variable) else None
        spec = partition_spec(axes, leaf.shape, mesh) if axes else PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        return leaf.replace(sharding) if isinstance(leaf, nnx.Variable) else sharding

    return jax.tree.map(sharding_of, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def partitioned(initializer: Callable[..., Array], axes: LogicalAxes) -> Callable[..., Array]:
    """Wraps an initializer so that the parameters it makes carry logical axis names.

    On a mesh (`jax.set_mesh`) the parameters are also placed by them. Unlike `nnx.with_partitioning` alone
    this needs no mesh, and no mesh axis for each name.

    Args:
        initializer: a function of key, shape and dtype.
        axes: a logical name, or None, for each dimension.

    Returns:
        An initializer for `nnx.Linear(kernel_init=...)`, `nnx.Param(init(key, shape, dtype))` and the like.
    """

    def placed(key: Array, shape: Sequence[int], dtype: jax.typing.DTypeLike) -> Array:
        value = initializer(key, shape, dtype)
        return place(value, partition_spec(axes, shape))

    # Flax's own placement raises without a mesh; ours above stands in for it.
    return nnx.with_partitioning(placed, tuple(axes), eager_sharding=False)


def place(array: Array, spec: PartitionSpec) -> Array:
    """Shards an array over the current mesh, whatever the types of its axes; without a mesh, does nothing."""
    auto = _axes_of_type(jax.sharding.get_abstract_mesh(), AxisType.Auto)
    array = reshard(spec, array)
    return jax.lax.with_sharding_constraint(array, _only(spec, auto)) if auto else array


def reshard[T](spec: PartitionSpec, tree: T) -> T:
    """Shards arrays over the Explicit axes of the current mesh, and leaves its Auto axes to the compiler."""
    explicit = _axes_of_type(jax.sharding.get_abstract_mesh(), AxisType.Explicit)
    if not explicit:
        return tree
    return jax.tree.map(lambda array: jax.sharding.reshard(array, _only(spec, explicit)), tree)


def token_spec(x: Array) -> PartitionSpec:
    """Says how the tokens of x, [..., D], are sharded over the current mesh, the last axis left whole.

    Explicit axes: as they are. Auto axes: as the rule for "batch" says, over the first dimension.
    """
    mesh = jax.sharding.get_abstract_mesh()
    spec = jax.typeof(x).sharding.spec
    entries = [as_axes(entry) for entry in (*spec, *[None] * (x.ndim - len(spec)))[:-1]]
    explicit = _axes_of_type(mesh, AxisType.Explicit)
    if entries:
        size = x.shape[0] // math.prod(mesh.shape[axis] for axis in entries[0])
        entries[0] += _dividing(mesh_axes("batch", mesh), explicit, size, mesh)
    return PartitionSpec(*map(_as_entry, entries), None)


def shardable_axes(mesh: Mesh) -> set[str]:
    """Returns the axes of a mesh that arrays can be sharded over: all but the manual ones."""
    return _axes_of_type(mesh, AxisType.Auto, AxisType.Explicit)


def _axes_of_type(mesh: Mesh, *types: AxisType) -> set[str]:
    return {name for name, axis_type in zip(mesh.axis_names, mesh.axis_types, strict=True) if axis_type in types}


def _dividing(wanted: Sequence[str], used: set[str], size: int, mesh: Mesh) -> tuple[str, ...]:
    """Takes the wanted axes, one after the other, that are not used yet and divide the dimension."""
    taken = ()
    for axis in wanted:
        if axis not in used and size % mesh.shape[axis] == 0:
            taken += (axis,)
            size //= mesh.shape[axis]
    return taken


def _only(spec: PartitionSpec, axes: set[str]) -> PartitionSpec:
    return PartitionSpec(*(_as_entry(tuple(axis for axis in as_axes(entry) if axis in axes)) for entry in spec))


def as_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes that one entry of a `PartitionSpec` names."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _as_entry(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return axes if len(axes) > 1 else axes[0] if axes else None
