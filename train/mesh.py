"""The devices of a run: its mesh, and where the training state and the batches lie on it."""

import contextlib
import math
from collections.abc import Callable, Iterable

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, PyTree

import jmoe
from train.data import Batch

AXES = ("data", "fsdp", "expert", "tensor")


def parse_mesh(text: str) -> dict[str, int]:
    """Reads the axes of a mesh and their sizes.

    Raises:
        ValueError: If it is not of the form `data=2,expert=4`, or names another axis than those of
            `jmoe.LOGICAL_AXIS_RULES`.

    Example:
        >>> parse_mesh("data=2,expert=4")
        {'data': 2, 'expert': 4}
    """
    sizes: dict[str, int] = {}
    for entry in filter(None, text.split(",")):
        name, _, size = entry.partition("=")
        if name not in AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"mesh must be made of {', '.join(AXES)}, each at most once and with a size, as in data=2,expert=4, "
                f"got {text!r}"
            )
        sizes[name] = int(size)
    return sizes


def batch_axes(axes: Iterable[str]) -> tuple[str, ...]:
    """Takes the axes of a mesh that the sequences of a batch are divided over: all but tensor."""
    return tuple(axis for axis in AXES[:-1] if axis in axes)


class Placement:
    """Where a run computes: on a mesh, or on this process's first device.

    Args:
        mesh: Axes and sizes, as `parse_mesh` reads them; one device if empty.

    Raises:
        ValueError: If the mesh has another number of devices than there are, or several processes have none.
    """

    def __init__(self, mesh: str):
        sizes = parse_mesh(mesh)
        if not sizes and jax.process_count() > 1:
            raise ValueError(
                f"mesh must be given to a run of several processes, such as data={jax.device_count()} for their devices"
            )
        if sizes and math.prod(sizes.values()) != jax.device_count():
            raise ValueError(
                f"mesh must have as many devices as there are, {jax.device_count()}, got {mesh!r}, which has "
                f"{math.prod(sizes.values())}"
            )
        auto = (AxisType.Auto,) * len(sizes)
        self._mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto) if sizes else None

    def active(self) -> contextlib.AbstractContextManager:
        """Makes the mesh, if there is one, that of all computations inside."""
        if self._mesh is None:
            return contextlib.nullcontext()
        stack = contextlib.ExitStack()
        stack.enter_context(jax.set_mesh(self._mesh))
        # Flax takes an axis of its rules that the mesh lacks for an error.
        stack.enter_context(nnx.logical_axis_rules(jmoe.logical_axis_rules(self._mesh)))
        return stack

    def shapes[T](self, make: Callable[[], T]) -> T:
        """Shapes and dtypes of the arrays that `make` would make, each with its sharding.

        Arrays that are made of sharded ones, such as the moments of an optimizer, are sharded as they are.
        """
        if self._mesh is None:
            shapes, device = jax.eval_shape(make), SingleDeviceSharding(jax.devices()[0])
            return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), shapes)
        mesh = self._mesh
        # Types tell how arrays are sharded over Explicit axes, whatever they are computed by.
        explicit = AbstractMesh(
            mesh.axis_sizes, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.axis_names)
        )
        with jax.sharding.use_abstract_mesh(explicit):
            shapes = jax.eval_shape(make)

        def shape_on_mesh(a: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            spec = a.sharding.spec if a.sharding else PartitionSpec()
            return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))

        return jax.tree.map(shape_on_mesh, shapes)

    @property
    def batch_sharding(self) -> Sharding:
        """Says how the sequences of a batch lie on the devices."""
        if self._mesh is None:
            return SingleDeviceSharding(jax.devices()[0])
        return NamedSharding(self._mesh, PartitionSpec(batch_axes(self._mesh.axis_names)))

    def put(self, batch: Batch, batch_size: int) -> dict[str, Array]:
        """Puts this process's sequences of a batch, `rows`, on its devices."""
        sharding = self.batch_sharding

        def put(value: np.ndarray) -> Array:
            return jax.make_array_from_process_local_data(sharding, value, (batch_size, *value.shape[1:]))

        return jax.tree.map(put, dict(batch))

    def rows(self, batch_size: int) -> np.ndarray:
        """Says which sequences of a batch are for the devices of this process."""
        places = self.batch_sharding.addressable_devices_indices_map((batch_size,))
        return np.unique(np.concatenate([np.arange(batch_size)[place] for place in places.values()]))


def shardings_of(shapes: PyTree[jax.ShapeDtypeStruct]) -> PyTree[Sharding]:
    """The shardings in what `Placement.shapes` gives."""
    return jax.tree.map(lambda a: a.sharding, shapes)
