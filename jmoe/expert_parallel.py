"""The MLPs of an MoE layer on one shard of a mesh: tokens gathered, experts and widths split, parts added."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jmoe.activations import Activation, activate, is_gated
from jmoe.mlp import ExpertParameters, MLPImplementation, WeightOn, moe_mlp
from jmoe.routing import Routing


@dataclasses.dataclass(frozen=True)
class ShardAxes:
    """The mesh axes that a layer is sharded over inside `jax.shard_map`; all empty on one device."""

    tokens: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()


def sharded_mlps(
    x: Float[Array, "T D"],
    routing: Routing,
    experts: ExpertParameters,
    shared: ExpertParameters | None,
    axes: ShardAxes,
    *,
    activation: Activation,
    weight_on: WeightOn,
    hidden_sizes: tuple[int, ...] | None = None,
    implementation: MLPImplementation | None,
) -> Float[Array, "T D"]:
    """Computes `moe_mlp` of this shard's tokens, plus the shared expert if there is one.

    Every shard gathers the tokens of the axes that experts and hidden widths are split over, computes the
    part of its own experts and widths for all of them (an assignment to an expert elsewhere is absent here),
    and the parts are summed into each shard's own tokens.

    Args:
        x: [T, D], this shard's tokens.
        routing: of the same tokens, with global expert indices.
        experts: this shard's experts, at their full hidden width.
        shared: the shared expert, the same shapes without E.
        axes: what is sharded over which mesh axes.
        activation: as in `moe_mlp`.
        weight_on: as in `moe_mlp`.
        hidden_sizes: as in `moe_mlp`; only for experts and widths that are not split.
        implementation: as in `moe_mlp`.

    Returns:
        [T, D], this shard's tokens.
    """
    split_hidden = functools.partial(_hidden_slice, gated=is_gated(activation), axes=axes.hidden)

    x, routing = _gather_tokens((x, routing), axes.hidden, axes)
    all_x, all_routing = _gather_tokens((x, routing), axes.experts, axes)
    all_y = moe_mlp(
        all_x,
        routing=_local_experts(all_routing, len(hidden_sizes or experts.w_up), axes.experts),
        **(experts if hidden_sizes else split_hidden(experts))._asdict(),
        activation=activation,
        weight_on=weight_on,
        hidden_sizes=hidden_sizes,
        implementation=implementation,
    )
    y = _reduce_tokens(all_y, axes.experts, axes)
    if shared is not None:
        y += _dense_mlp(x, split_hidden(shared), activation)
    return _reduce_tokens(y, axes.hidden, axes)


def _gather_tokens[T](tree: T, over: tuple[str, ...], axes: ShardAxes) -> T:
    """Collects the tokens that are sharded over these axes; without that, every shard has them already."""
    over = tuple(axis for axis in over if axis in axes.tokens)
    return jax.tree.map(lambda array: lax.all_gather(array, over, axis=0, tiled=True), tree) if over else tree


def _reduce_tokens(y: Float[Array, "all_T D"], over: tuple[str, ...], axes: ShardAxes) -> Float[Array, "T D"]:
    """Sums the shards' parts; the inverse of `_gather_tokens` in which tokens remain."""
    scattered = tuple(axis for axis in over if axis in axes.tokens)
    if scattered:
        y = lax.psum_scatter(y, scattered, scatter_dimension=0, tiled=True)
    return lax.psum(y, tuple(axis for axis in over if axis not in axes.tokens))


def _local_experts(routing: Routing, num_local: int, over: tuple[str, ...]) -> Routing:
    if not over:
        return routing
    local_index = routing.expert_index - lax.axis_index(over) * num_local
    local = (local_index >= 0) & (local_index < num_local)
    return dataclasses.replace(routing, expert_index=local_index).where(local)


def _hidden_slice(parameters: ExpertParameters, *, gated: bool, axes: tuple[str, ...]) -> ExpertParameters:
    """Takes this shard's part of the hidden width; if gated, the same part of gate and up columns."""
    if not axes:
        return parameters
    w_up, w_down, b_up, b_down = parameters
    shard, num_shards = lax.axis_index(axes), math.prod(lax.axis_size(axis) for axis in axes)
    width = w_down.shape[-2] // num_shards

    def up_columns(array):
        halves = array.reshape(*array.shape[:-1], 2 if gated else 1, -1)
        part = lax.dynamic_slice_in_dim(halves, shard * width, width, axis=-1)
        return part.reshape(*array.shape[:-1], -1)

    return ExpertParameters(
        up_columns(w_up),
        lax.dynamic_slice_in_dim(w_down, shard * width, width, axis=-2),
        None if b_up is None else up_columns(b_up),
        # The parts are summed, and the bias belongs to the sum.
        None if b_down is None else jnp.where(shard == 0, b_down, 0),
    )


# As in `moe_mlp`, the backward gets x, the parameters as they came and the pre-activations, and recomputes the rest.
@functools.partial(
    jax.checkpoint, static_argnums=2, policy=jax.checkpoint_policies.save_only_these_names("pre_activations")
)
def _dense_mlp(x: Float[Array, "T D"], parameters: ExpertParameters, activation: Activation) -> Float[Array, "T D"]:
    w_up, w_down, b_up, b_down = jax.tree.map(lambda parameter: parameter.astype(x.dtype), parameters)
    h = checkpoint_name(x @ w_up if b_up is None else x @ w_up + b_up, "pre_activations")
    y = activate(activation, h) @ w_down
    return y if b_down is None else y + b_down
