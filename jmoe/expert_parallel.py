"""The MLPs of an MoE layer on one shard of a mesh: tokens exchanged, experts and widths split, parts added."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jmoe.activations import Activation, activate, is_gated
from jmoe.arguments import check_mlp
from jmoe.block_sparse import check_hidden_sizes
from jmoe.debug import refuse_mesh
from jmoe.dispatch import check_routing
from jmoe.exchanges import ExchangeName, make_exchange
from jmoe.exchanges.replicas import Replication
from jmoe.grouped_mlp import ExpertParameters
from jmoe.local_mlp import MLPImplementation, WeightOn, local_mlp, mlp_options
from jmoe.placement import ExpertPlacement, placed_routing
from jmoe.routing import Assignments, Routing, in_range, is_present
from jmoe.rows import accumulator_dtype
from jmoe.sharding import as_axes, mesh_axes, reshard, shardable_axes, token_spec


class SharedParameters(NamedTuple):
    """The parameters of a shared expert: the MLP's, without E, and the gate's [D, 1] if it has one."""

    mlp: ExpertParameters
    gate: Float[Array, "D 1"] | None


@dataclasses.dataclass(frozen=True)
class ShardAxes:
    """The mesh axes that a layer is sharded over inside `jax.shard_map`; all empty on one device.

    Attributes:
        batch: of each dimension of the tokens.
        experts: of the experts.
        hidden: of the hidden widths.
    """

    batch: tuple[tuple[str, ...], ...] = ()
    experts: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()

    @property
    def tokens(self) -> tuple[str, ...]:
        """All axes that the tokens are sharded over."""
        return tuple(axis for axes in self.batch for axis in axes)

    @property
    def sequence(self) -> tuple[str, ...]:
        """Those that the tokens of one sequence are spread over."""
        return self.batch[-1] if self.batch else ()


def shard_axes(
    tokens: PartitionSpec, num_experts: int, hidden_features: int | tuple[int, ...], shared_hidden_features: int
) -> ShardAxes:
    """Says which axes of the current mesh a layer is sharded over, for tokens sharded as given.

    Raises:
        ValueError: an axis does not divide what it shards, or splits experts of different widths.
    """
    mesh = jax.sharding.get_abstract_mesh()
    experts = mesh_axes("expert", mesh)
    hidden = tuple(axis for axis in mesh_axes("expert_hidden", mesh) if axis not in experts)
    if isinstance(hidden_features, tuple):
        if (shards := math.prod(mesh.shape[axis] for axis in experts + hidden)) > 1:
            raise ValueError(
                f"the mesh splits experts and their widths into {shards}, and hidden_features differ from expert to "
                "expert; give 'expert' and 'expert_hidden' other rules with flax.nnx.logical_axis_rules, such as None."
            )
        experts = hidden = ()
        hidden_features = sum(hidden_features)
    for argument, size, rule, axes in (
        ("num_experts", num_experts, "expert", experts),
        ("hidden_features", hidden_features, "expert_hidden", hidden),
        ("shared_hidden_features", shared_hidden_features, "expert_hidden", hidden),
    ):
        shards = math.prod(mesh.shape[axis] for axis in axes)
        if size % shards:
            raise ValueError(
                f"{argument} is {size}; it must be a multiple of {shards}, the size of the mesh axis "
                f"{' x '.join(axes)}: make it {size + -size % shards}, or give {rule!r} another rule with "
                "flax.nnx.logical_axis_rules."
            )
    return ShardAxes(tuple(as_axes(entry) for entry in tokens[:-1]), experts, hidden)


def sharded_mlps(
    x: Float[Array, "T D"],
    routing: Routing | Assignments,
    experts: ExpertParameters,
    shared: SharedParameters | None,
    axes: ShardAxes,
    *,
    shared_weight: float | None,
    activation: Activation,
    weight_on: WeightOn,
    remat: bool,
    hidden_sizes: tuple[int, ...] | None,
    implementation: MLPImplementation | None,
    expert_placement: ExpertPlacement | None,
    exchange: ExchangeName,
) -> Float[Array, "T D"]:
    """Computes `moe_mlp` of this shard's tokens, plus the shared expert if there is one.

    Tokens are exchanged with the shards that have other experts. Along the axes that hidden widths are split over,
    every shard gathers the tokens, computes the part of its own widths, and the parts are summed into each shard's
    own tokens.

    Args:
        x: [T, D], this shard's tokens.
        routing: of the same tokens, with global expert indices.
        experts: this shard's experts, at their full hidden width.
        shared: the shared expert.
        axes: what is sharded over which mesh axes.
        shared_weight: the share of the shared expert in a weighted sum with the others; None for a plain sum.
        activation: as in `moe_mlp`.
        weight_on: as in `moe_mlp`.
        remat: as in `moe_mlp`, and the same for the shared expert.
        hidden_sizes: as in `moe_mlp`; only for experts and widths that are not split.
        implementation: as in `moe_mlp`.
        expert_placement: as in `moe_mlp`.
        exchange: as in `moe_mlp`.

    Returns:
        [T, D], this shard's tokens.

    Raises:
        ValueError: a shard's part of the hidden widths cannot be cut into the blocks of "block_sparse".
    """
    if implementation == "block_sparse":
        check_hidden_sizes("hidden_features", hidden_sizes or (experts.w_down.shape[-2],), _num_shards(axes.hidden))
    split_hidden = functools.partial(_hidden_slice, gated=is_gated(activation), axes=axes.hidden)
    x, routing = _gather_routed(x, routing, axes)
    options: dict[str, Any] = {
        "activation": activation,
        "weight_on": weight_on,
        "remat": remat,
        "implementation": implementation,
        "expert_placement": expert_placement,
    }
    if hidden_sizes or _num_shards(axes.experts) == 1:
        experts = experts if hidden_sizes else split_hidden(experts)
        y = local_mlp(x, routing, experts, hidden_sizes=hidden_sizes, **options)
    else:
        y = _exchanged_mlp(x, routing, split_hidden(experts), axes, exchange, **options)
    if shared is not None:
        of_shared = _dense_mlp(x, split_hidden(shared.mlp), shared.gate, activation, remat=remat)
        y = y + of_shared if shared_weight is None else (1 - shared_weight) * y + shared_weight * of_shared
    return _reduce_tokens(y, axes)


def _exchanged_mlp(
    x: Float[Array, "T D"],
    routing: Routing | Assignments,
    experts: ExpertParameters,
    axes: ShardAxes,
    exchange: ExchangeName,
    *,
    activation: Activation,
    weight_on: WeightOn,
    remat: bool,
    implementation: MLPImplementation | None,
    expert_placement: ExpertPlacement | None,
) -> Float[Array, "T D"]:
    """Exchanges tokens along the expert axes that they are sharded over; along others every shard has them already."""
    check_mlp(x, experts, routing, activation, weight_on)
    num_local, hidden, _ = experts.w_down.shape
    num_devices = _num_shards(axes.experts)
    num_experts = num_local * num_devices
    if expert_placement is not None:
        expert_placement.check_fits(num_experts, num_devices)
    if not x.size or not routing.expert_index.size:
        return jnp.zeros_like(x)
    if isinstance(routing, Assignments):
        routing = in_range(routing, x.shape[0], num_experts)
    replication = None
    if expert_placement is not None:
        routing = placed_routing(routing, expert_placement)
        num_local += expert_placement.num_replicas
        replication = Replication(axes.experts, expert_placement) if expert_placement.num_replicas else None
    over = tuple(axis for axis in axes.experts if axis in axes.tokens)
    apply = make_exchange(
        exchange,
        over,
        mlp_options((hidden,) * num_local, activation, weight_on, remat, implementation),
        num_local * num_devices,
        num_shards=_num_shards(over),
        top_k=math.ceil(routing.expert_index.size / x.shape[0]),
        shard_bytes=x.nbytes,
        replication=replication,
    )
    y = apply(x, _within_reach(routing, num_local, axes.experts, over), experts)
    return lax.psum(y, tuple(axis for axis in axes.experts if axis not in over))


def _within_reach[R: Routing | Assignments](routing: R, num_local: int, experts: tuple[str, ...], over: tuple) -> R:
    """Makes assignments absent whose experts no exchange over these axes leads to, and numbers the others from 0."""
    present = is_present(routing.expert_index, num_local * _num_shards(experts))
    shard, local_index = jnp.divmod(routing.expert_index.astype(jnp.int32), num_local)
    coordinates = {}
    for axis in reversed(experts):
        shard, coordinates[axis] = jnp.divmod(shard, lax.axis_size(axis))
    expert_index = jnp.zeros_like(local_index)
    for axis in experts:
        if axis in over:
            expert_index = expert_index * lax.axis_size(axis) + coordinates[axis]
        else:
            present &= coordinates[axis] == lax.axis_index(axis)
    return dataclasses.replace(routing, expert_index=expert_index * num_local + local_index).where(present)


def mlp_on_mesh(
    x: Float[Array, "T D"], routing: Routing | Assignments, parameters: ExpertParameters, **options: Any
) -> Float[Array, "T D"]:
    """Computes `moe_mlp` of the tokens and experts of all devices of the current mesh.

    Args:
        x: [T, D].
        routing: the experts of each token. A list of assignments is read by every device.
        parameters: of the E experts.
        **options: as in `sharded_mlps`.

    Returns:
        [T, D], sharded as x; on Auto axes, as the rule for "batch" says.

    Raises:
        ValueError: as in `moe_mlp`, and where an axis does not divide what it shards.
    """
    refuse_mesh()
    if options["hidden_sizes"] is None:
        check_mlp(x, parameters, routing, options["activation"], options["weight_on"])
    check_routing(routing)
    tokens = token_spec(x)
    widths = options["hidden_sizes"] or parameters.w_down.shape[1]
    axes = shard_axes(tokens, len(options["hidden_sizes"] or parameters.w_down), widths, 0)
    of_tokens = PartitionSpec(tokens[0])

    def apply(x, routing, parameters):
        if isinstance(routing, Assignments) and axes.tokens:
            token_index = routing.token_index - lax.axis_index(axes.tokens) * x.shape[0]
            routing = dataclasses.replace(routing, token_index=token_index)
            routing = routing.where((token_index >= 0) & (token_index < x.shape[0]))
        return sharded_mlps(x, routing, parameters, None, axes, shared_weight=None, **options)

    of_routing = PartitionSpec() if isinstance(routing, Assignments) else of_tokens
    in_specs = tokens, of_routing, PartitionSpec(axes.experts)
    axis_names = shardable_axes(jax.sharding.get_abstract_mesh())
    apply = jax.shard_map(apply, in_specs=in_specs, out_specs=tokens, axis_names=axis_names, check_vma=False)
    return apply(*jax.tree.map(reshard, in_specs, (x, routing, parameters)))


def _gather_routed[R: Routing | Assignments](
    x: Float[Array, "T D"], routing: R, axes: ShardAxes
) -> tuple[Float[Array, "all_T D"], R]:
    """Collects the tokens of the axes that hidden widths are split over; unless every shard has them already."""
    over = tuple(axis for axis in axes.hidden if axis in axes.tokens)
    if not over:
        return x, routing
    if isinstance(routing, Assignments):
        in_range = (routing.token_index >= 0) & (routing.token_index < x.shape[0])  # of this shard, not of another
        token_index = routing.token_index + lax.axis_index(over) * x.shape[0]
        routing = dataclasses.replace(routing, token_index=token_index).where(in_range)
    return jax.tree.map(lambda array: lax.all_gather(array, over, axis=0, tiled=True), (x, routing))


def _reduce_tokens(y: Float[Array, "all_T D"], axes: ShardAxes) -> Float[Array, "T D"]:
    """Sums the parts of the hidden widths; the inverse of `_gather_routed` in which tokens remain."""
    scattered = tuple(axis for axis in axes.hidden if axis in axes.tokens)
    if scattered:
        y = lax.psum_scatter(y, scattered, scatter_dimension=0, tiled=True)
    return lax.psum(y, tuple(axis for axis in axes.hidden if axis not in axes.tokens))


def _num_shards(axes: tuple[str, ...]) -> int:
    return math.prod(lax.axis_size(axis) for axis in axes)


def _hidden_slice(parameters: ExpertParameters, *, gated: bool, axes: tuple[str, ...]) -> ExpertParameters:
    """Takes this shard's part of the hidden width; if gated, the same part of gate and up columns."""
    if not axes:
        return parameters
    w_up, w_down, b_up, b_down = parameters
    shard, num_shards = lax.axis_index(axes), _num_shards(axes)
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


def _dense_mlp(
    x: Float[Array, "T D"],
    parameters: ExpertParameters,
    gate: Float[Array, "D 1"] | None,
    activation: Activation,
    *,
    remat: bool,
) -> Float[Array, "T D"]:
    """Computes one MLP for all tokens, times `sigmoid(x @ gate)` if there is a gate."""

    def apply(x, parameters, gate):
        w_up, w_down, b_up, b_down = jax.tree.map(lambda parameter: parameter.astype(x.dtype), parameters)
        h = checkpoint_name(x @ w_up if b_up is None else x @ w_up + b_up, "pre_activations")
        a = activate(activation, h)
        if gate is None:
            return a @ w_down if b_down is None else a @ w_down + b_down
        dtype = accumulator_dtype(x)
        openness = jax.nn.sigmoid(x.astype(dtype) @ gate.astype(dtype)).astype(x.dtype)  # [T, 1]
        # Of the activations, since that of the output would need the output in the backward.
        y = (openness * a) @ w_down
        return y if b_down is None else y + openness * b_down

    # As in `moe_mlp`, the backward gets x, the parameters as they came and the pre-activations, and recomputes the
    # rest.
    policy = None if remat else jax.checkpoint_policies.save_only_these_names("pre_activations")
    return jax.checkpoint(apply, policy=policy)(x, parameters, gate)
