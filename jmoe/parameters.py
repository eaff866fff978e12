"""The parameters of expert MLPs as Flax variables."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from flax import nnx
from flax.typing import Initializer

from jmoe.activations import Activation, is_gated
from jmoe.expert_parallel import SharedParameters
from jmoe.mlp import ExpertParameters
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


def create_mlp_parameters(
    features: int,
    hidden_features: int,
    hidden_axis: str,
    *,
    num_experts: int | None = None,
    activation: Activation,
    use_bias: bool,
    param_dtype: jax.typing.DTypeLike,
    kernel_init: Initializer,
    bias_init: Initializer,
    rngs: nnx.Rngs,
) -> MLPVariables:
    """Creates the variables of `num_experts` MLPs, or of one without that axis, with their logical axes."""
    width = (2 if is_gated(activation) else 1) * hidden_features

    def create(initializer: Initializer, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        if num_experts is not None:
            initializer = per_expert(initializer)
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


def per_expert(initializer: Initializer) -> Initializer:
    """Initializes each expert as a matrix of its own, so that E does not count as fan-in."""

    def initialize(key, shape, dtype):
        return jax.vmap(lambda key: initializer(key, shape[1:], dtype))(jax.random.split(key, shape[0]))

    return initialize


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
