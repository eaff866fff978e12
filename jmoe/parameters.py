"""The parameters of expert MLPs as Flax variables."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Initializer

from jmoe.activations import Activation, is_gated
from jmoe.block_sparse import check_hidden_sizes
from jmoe.expert_parallel import SharedParameters
from jmoe.grouped_mlp import ExpertParameters
from jmoe.sharding import partitioned


class MLPVariables(NamedTuple):
    """The variables of E expert MLPs, in the shapes of `jmoe.moe_mlp`, or of one MLP without the axis E."""

    w_up: nnx.Param
    w_down: nnx.Param
    b_up: nnx.Param | None
    b_down: nnx.Param | None


class SharedExpert(nnx.Module):
    """The variables of the MLP that every token goes through besides its routed experts, and of its gate [D, 1]."""

    def __init__(self, mlp: MLPVariables, gate: nnx.Param | None):
        self.w_up, self.w_down, self.b_up, self.b_down = mlp
        self.gate = gate


def checked_widths(hidden_features: int | Sequence[int], num_experts: int) -> int | tuple[int, ...]:
    """Returns the width of all experts, or the widths of each, or raises a ValueError where they are no such thing."""
    if not isinstance(hidden_features, int | np.integer | Sequence):
        raise ValueError(
            f"hidden_features is {hidden_features!r}; it must be an int, or a list of one for each expert."
        )
    if not isinstance(hidden_features, Sequence):
        if hidden_features < 1:
            raise ValueError(f"hidden_features is {hidden_features}; it must be at least 1.")
        return hidden_features
    hidden_features = tuple(hidden_features)
    check_hidden_sizes("hidden_features", hidden_features)
    if len(hidden_features) != num_experts:
        raise ValueError(
            f"hidden_features has {len(hidden_features)} widths; it must have one for each of the {num_experts} "
            "experts, or be one for all."
        )
    return hidden_features


def create_mlp_parameters(
    features: int,
    hidden_features: int | tuple[int, ...],
    hidden_axis: str,
    *,
    num_experts: int | None = None,
    expert_order: tuple[int, ...] | None = None,
    activation: Activation,
    use_bias: bool,
    param_dtype: jax.typing.DTypeLike,
    kernel_init: Initializer,
    bias_init: Initializer,
    rngs: nnx.Rngs,
) -> MLPVariables:
    """Creates the variables of `num_experts` MLPs, or of one without that axis, with their logical axes.

    Each expert has the same values whatever their order.
    MLPs of different widths lie side by side, as `jmoe.moe_mlp` takes them, and are not split over a mesh.
    """
    parts = 2 if is_gated(activation) else 1
    if isinstance(hidden_features, tuple):

        def create_side_by_side(initializer: Initializer, shapes: list[tuple[int, ...]], axis: int) -> nnx.Param:
            axes = tuple("embed" if i != axis and len(shapes[0]) > 1 else None for i in range(len(shapes[0])))
            initializer, shape = _side_by_side(initializer, shapes, axis)
            return nnx.Param(partitioned(initializer, axes)(rngs.params(), shape, param_dtype))

        up, down = (
            [(features, parts * size) for size in hidden_features],
            [(size, features) for size in hidden_features],
        )
        return MLPVariables(
            w_up=create_side_by_side(kernel_init, up, 1),
            w_down=create_side_by_side(kernel_init, down, 0),
            b_up=create_side_by_side(bias_init, [shape[1:] for shape in up], 0) if use_bias else None,
            b_down=create_side_by_side(bias_init, [(1, features)] * len(hidden_features), 0) if use_bias else None,
        )
    width = parts * hidden_features

    def create(initializer: Initializer, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        if num_experts is not None:
            initializer = per_expert(initializer, expert_order)
            shape, axes = (num_experts, *shape), ("expert", *axes)
        return nnx.Param(partitioned(initializer, axes)(rngs.params(), shape, param_dtype))

    return MLPVariables(
        w_up=create(kernel_init, (features, width), ("embed", hidden_axis)),
        w_down=create(kernel_init, (hidden_features, features), (hidden_axis, "embed")),
        b_up=create(bias_init, (width,), (hidden_axis,)) if use_bias else None,
        b_down=create(bias_init, (features,), ("embed",)) if use_bias else None,
    )


def create_shared_expert(
    features: int,
    hidden_features: int,
    *,
    has_gate: bool,
    param_dtype: jax.typing.DTypeLike,
    kernel_init: Initializer,
    rngs: nnx.Rngs,
    **options: Any,
) -> SharedExpert:
    """Creates the variables of a shared expert; the options are those of `create_mlp_parameters`."""
    initialization = {"param_dtype": param_dtype, "kernel_init": kernel_init, "rngs": rngs}
    mlp, gate = create_mlp_parameters(features, hidden_features, "mlp", **initialization, **options), None
    if has_gate:
        gate = nnx.Param(partitioned(kernel_init, ("embed", None))(rngs.params(), (features, 1), param_dtype))
    return SharedExpert(mlp, gate)


def per_expert(initializer: Initializer, order: tuple[int, ...] | None = None) -> Initializer:
    """Initializes each expert as a matrix of its own, so that E does not count as fan-in; in the order, if given."""

    def initialize(key, shape, dtype):
        keys = jax.random.split(key, shape[0])
        keys = keys if order is None else keys[np.array(order)]
        return jax.vmap(lambda key: initializer(key, shape[1:], dtype))(keys)

    return initialize


def _side_by_side(
    initializer: Initializer, shapes: list[tuple[int, ...]], axis: int
) -> tuple[Initializer, tuple[int, ...]]:
    """Initializes each expert as an array of its own, and joins them; returns the shape of all too."""

    def initialize(key, shape, dtype):
        del shape
        keys = jax.random.split(key, len(shapes))
        return jnp.concatenate([initializer(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)], axis)

    whole = list(shapes[0])
    whole[axis] = sum(shape[axis] for shape in shapes)
    return initialize, tuple(whole)


@runtime_checkable
class HasMLPVariables(Protocol):
    """A module with the variables of MLPs."""

    w_up: nnx.Param
    w_down: nnx.Param
    b_up: nnx.Param | None
    b_down: nnx.Param | None


def mlp_parameters(module: HasMLPVariables) -> ExpertParameters:
    """Reads a module's variables."""
    return ExpertParameters(
        module.w_up[...],
        module.w_down[...],
        None if module.b_up is None else module.b_up[...],
        None if module.b_down is None else module.b_down[...],
    )


def shared_parameters(shared: SharedExpert) -> SharedParameters:
    """Reads the parameters of a shared expert as arrays."""
    return SharedParameters(mlp_parameters(shared), None if shared.gate is None else shared.gate[...])
