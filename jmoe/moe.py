"""The MoE layer as a Flax NNX module."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Initializer
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from jmoe.activations import Activation
from jmoe.block_sparse import check_hidden_sizes
from jmoe.debug import refuse_mesh
from jmoe.expert_parallel import ShardAxes, sharded_mlps
from jmoe.losses import expert_load, load_balancing_loss, router_z_loss
from jmoe.mlp import MLPImplementation, WeightOn
from jmoe.parameters import SharedExpert, create_mlp_parameters, mlp_parameters
from jmoe.routing import Routing, Score, ScoreOrder, is_present, route_top_k
from jmoe.sharding import as_axes, mesh_axes, partitioned, reshard, shardable_axes, token_spec

_KERNEL_INIT = nnx.initializers.lecun_normal()
_BIAS_INIT = nnx.initializers.zeros_init()


@no_type_check  # JAX also builds pytrees of other shapes and of things that are no arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEAux:
    """What an MoE layer tells about its routing, over all tokens that the mask leaves.

    Attributes:
        load_balancing_loss: f32[], 1 at perfect balance (`jmoe.load_balancing_loss`).
        router_z_loss: f32[] (`jmoe.router_z_loss`).
        expert_load: f32[E], each expert's share of the assignments; sums to 1.
        dropped_fraction: f32[], the share of the tokens' K assignments that no expert got; 0 in a dropless
            layer.
    """

    load_balancing_loss: Float[Array, ""]
    router_z_loss: Float[Array, ""]
    expert_load: Float[Array, " E"]
    dropped_fraction: Float[Array, ""]


class MoE(nnx.Module):
    """A dropless Mixture-of-Experts layer: each token goes through its top-k experts, whatever the balance.

    `y = sum_k w_k * MLP_{e_k}(x)`, with experts and weights from a linear router (`jmoe.route_top_k`).
    Parameters are `router.kernel` [D, E], `w_up` [E, D, 2F] (gated, gate columns first; [E, D, F] plain),
    `w_down` [E, F, D] (side by side where widths differ) and, with `use_bias`, `b_up` and `b_down`; `shared` holds
    those of the shared expert, without E. They carry the logical axis names of `jmoe.LOGICAL_AXIS_RULES`, and need
    no mesh.

    On a mesh (`jax.set_mesh`) the experts are computed where they are stored: tokens are all-gathered over
    the expert axis and the outputs reduced back. Axes of the mesh may be Auto or Explicit. Inside a
    `jax.shard_map` of the caller, its manual axes are the caller's: the layer sees the tokens of one shard.

    Args:
        features: D, the width of the input and the output.
        hidden_features: F, the hidden width of one expert; or a sequence of E widths, for experts of different ones,
            as the `hidden_sizes` of `jmoe.moe_mlp`. These are not split over mesh axes.
        num_experts: E.
        top_k: K, the experts of each token.
        activation: as in `jmoe.moe_mlp`.
        score: as in `jmoe.route_top_k`.
        score_order: as in `jmoe.route_top_k`.
        normalize: as in `jmoe.route_top_k`.
        scale: as in `jmoe.route_top_k`.
        weight_on: as in `jmoe.moe_mlp`.
        router_jitter: where `rngs` are passed to a call, the router's input is multiplied with noise, uniform
            in `1 +- router_jitter` (Switch Transformer, arXiv 2101.03961, section 2.4).
        shared_hidden_features: the hidden width of an expert that every token goes through besides, with
            weight 1; 0 for none.
        use_bias: whether the experts have biases; the router has none.
        dtype: the dtype of the experts' computation and of the output; by default the promoted dtype of the
            input and the experts' parameters. The router computes in float32 (float64 for float64) in any
            case.
        param_dtype: the dtype of the parameters.
        kernel_init: initializer of every matrix. It sees one expert's [D, 2F] or [F, D] at a time, so that
            fans are counted per expert.
        bias_init: initializer of the biases.
        implementation: as in `jmoe.moe_mlp`.
        rngs: random keys for the parameters (stream "params").

    Raises:
        ValueError: a size is not positive, `top_k` is more than `num_experts`, or a name is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jmoe
        >>> moe = jmoe.MoE(16, 32, num_experts=4, top_k=2, rngs=nnx.Rngs(0))
        >>> y, aux = moe(jnp.ones((2, 3, 16)))
        >>> y.shape, aux.expert_load.shape
        ((2, 3, 16), (4,))
    """

    def __init__(
        self,
        features: int,
        hidden_features: int | Sequence[int],
        num_experts: int,
        top_k: int,
        *,
        activation: Activation = "swiglu",
        score: Score = "softmax",
        score_order: ScoreOrder = "before_top_k",
        normalize: bool = True,
        scale: float = 1.0,
        weight_on: WeightOn = "output",
        router_jitter: float = 0.0,
        shared_hidden_features: int = 0,
        use_bias: bool = False,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: Initializer = _KERNEL_INIT,
        bias_init: Initializer = _BIAS_INIT,
        implementation: MLPImplementation | None = None,
        rngs: nnx.Rngs,
    ):
        if not isinstance(hidden_features, int):
            hidden_features = tuple(hidden_features)
            check_hidden_sizes(hidden_features)
            if len(hidden_features) != num_experts:
                raise ValueError(
                    f"hidden_features has {len(hidden_features)} widths; it must have one for each of the "
                    f"{num_experts} experts, or be one for all."
                )
        self._hidden_sizes = hidden_features if isinstance(hidden_features, tuple) else None
        sizes = {"features": features, "num_experts": num_experts}
        if isinstance(hidden_features, int):
            sizes["hidden_features"] = hidden_features
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1.")
        if shared_hidden_features < 0:
            raise ValueError(f"shared_hidden_features is {shared_hidden_features}; it must be 0 (none) or more.")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k}; it must be between 1 and num_experts, {num_experts}.")
        self.features = features
        self.hidden_features = hidden_features
        self.num_experts = num_experts
        self.top_k = top_k
        self.activation: Activation = activation
        self.score: Score = score
        self.score_order: ScoreOrder = score_order
        self.normalize = normalize
        self.scale = scale
        self.weight_on: WeightOn = weight_on
        self.router_jitter = router_jitter
        self.shared_hidden_features = shared_hidden_features
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.implementation: MLPImplementation | None = implementation

        self.router = nnx.Linear(
            features,
            num_experts,
            use_bias=False,
            param_dtype=param_dtype,
            kernel_init=partitioned(kernel_init, ("embed", None)),
            rngs=rngs,
        )
        create = functools.partial(
            create_mlp_parameters,
            features,
            activation=activation,
            use_bias=use_bias,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )
        experts = create(hidden_features, "expert_hidden", num_experts=num_experts)
        self.w_up, self.w_down, self.b_up, self.b_down = experts
        shared = SharedExpert(*create(shared_hidden_features, "mlp")) if shared_hidden_features else None
        self.shared = nnx.data(shared)

    def __call__(
        self,
        x: Float[Array, "*batch D"],
        *,
        mask: Bool[Array, "*batch"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "*batch D"], MoEAux]:
        """Applies the layer to each token.

        Args:
            x: [..., D].
            mask: bool[...], false for tokens that are not there, such as padding: they are not routed, give
                zeros, get no gradient and enter no statistic, whatever x holds there.
            rngs: random keys for the router's noise (stream "router"); without them there is none.

        Returns:
            y: [..., D].
            aux: losses and statistics of the routing; the losses are to be weighted and added to the
                objective.

        Raises:
            ValueError: the shape or dtype of x or mask does not fit, or the mesh does not divide the experts.
        """
        self._check_input(x, mask)
        router_x = None
        if self.router_jitter and rngs is not None:
            dtype = jnp.promote_types(x.dtype, jnp.float32)
            noise = jax.random.uniform(rngs.router(), x.shape, dtype, -self.router_jitter, self.router_jitter)
            router_x = x * (1 + noise)
        inputs = _Inputs(x, router_x, mask)
        parameters = _Parameters(
            self.router.kernel[...],
            mlp_parameters(self),
            None if self.shared is None else mlp_parameters(self.shared),
        )
        axis_names = shardable_axes(jax.sharding.get_abstract_mesh())
        if not axis_names:
            return self._apply_to_shard(inputs, parameters, axes=ShardAxes())

        refuse_mesh()
        tokens = token_spec(x)
        axes = self._shard_axes(tokens)
        replicated = PartitionSpec()
        in_specs = (
            _Inputs(tokens, tokens, PartitionSpec(*tokens[:-1])),
            _Parameters(replicated, PartitionSpec(axes.experts), replicated),
        )
        # Kernels and loops do not say which mesh axes their results vary over, so that is not checked.
        apply = jax.shard_map(
            functools.partial(self._apply_to_shard, axes=axes),
            in_specs=in_specs,
            out_specs=(tokens, replicated),
            axis_names=axis_names,
            check_vma=False,
        )
        return apply(*jax.tree.map(reshard, in_specs, (inputs, parameters)))

    def _apply_to_shard(
        self, inputs: "_Inputs", parameters: "_Parameters", *, axes: ShardAxes
    ) -> tuple[Float[Array, "*batch D"], MoEAux]:
        """Applies the layer to the tokens and experts of one shard of the mesh; without a mesh, to all."""
        batch_shape = inputs.x.shape[:-1]
        num_tokens = math.prod(batch_shape)
        x = inputs.x.reshape(num_tokens, self.features)  # [T, D]
        router_x = x if inputs.router_x is None else inputs.router_x.reshape(num_tokens, self.features)
        mask = None
        if inputs.mask is not None:
            mask = inputs.mask.reshape(num_tokens)
            x, router_x = jnp.where(mask[:, None], x, 0), jnp.where(mask[:, None], router_x, 0)

        logits = _router_logits(router_x, parameters.router_kernel)  # [T, E]
        routing = route_top_k(
            logits,
            self.top_k,
            score=self.score,
            score_order=self.score_order,
            normalize=self.normalize,
            scale=self.scale,
        )
        if mask is not None:
            routing = routing.masked(mask)
        aux = self._aux(logits, routing, mask, axes)

        arrays = [p for p in (*parameters.experts, *(parameters.shared or ())) if p is not None]
        x = x.astype(jnp.result_type(x, *arrays) if self.dtype is None else self.dtype)
        y = sharded_mlps(
            x,
            routing,
            parameters.experts,
            parameters.shared,
            axes,
            activation=self.activation,
            weight_on=self.weight_on,
            hidden_sizes=self._hidden_sizes,
            implementation=self.implementation,
        )  # [T, D]
        if mask is not None and parameters.shared is not None:
            y = jnp.where(mask[:, None], y, 0)
        return y.reshape(*batch_shape, self.features), aux

    def _aux(
        self, logits: Float[Array, "T E"], routing: Routing, mask: Bool[Array, " T"] | None, axes: ShardAxes
    ) -> MoEAux:
        # The loss needs scores that sum to 1 (for sigmoids: DeepSeek-V3, arXiv 2412.19437, equation 19).
        scores = jax.nn.softmax(logits if self.score == "softmax" else jax.nn.log_sigmoid(logits))
        num_tokens = jnp.asarray(logits.shape[0]) if mask is None else mask.sum()
        num_present = is_present(routing.expert_index, self.num_experts).sum()
        wanted, present = lax.psum((num_tokens * self.top_k, num_present), axes.tokens)
        return MoEAux(
            load_balancing_loss=load_balancing_loss(scores, routing, mask=mask, axis_name=axes.tokens),
            router_z_loss=router_z_loss(logits, mask=mask, axis_name=axes.tokens),
            expert_load=expert_load(routing, self.num_experts, axis_name=axes.tokens),
            dropped_fraction=(wanted - present) / jnp.maximum(wanted, 1).astype(jnp.float32),
        )

    def _shard_axes(self, tokens: PartitionSpec) -> ShardAxes:
        """Says which axes of the current mesh the layer is sharded over, for tokens sharded as given."""
        mesh = jax.sharding.get_abstract_mesh()
        experts = mesh_axes("expert", mesh)
        hidden = tuple(axis for axis in mesh_axes("expert_hidden", mesh) if axis not in experts)
        if self._hidden_sizes:
            if (shards := math.prod(mesh.shape[axis] for axis in experts + hidden)) > 1:
                raise ValueError(
                    f"the mesh splits experts and their widths into {shards}, and hidden_features differ from expert "
                    "to expert; give 'expert' and 'expert_hidden' other rules with flax.nnx.logical_axis_rules, such "
                    "as None."
                )
            experts = hidden = ()
        for argument, rule, axes in (
            ("num_experts", "expert", experts),
            ("hidden_features", "expert_hidden", hidden),
            ("shared_hidden_features", "expert_hidden", hidden),
        ):
            size, shards = getattr(self, argument), math.prod(mesh.shape[axis] for axis in axes)
            if shards > 1 and size % shards:
                raise ValueError(
                    f"{argument} is {size}; it must be a multiple of {shards}, the size of the mesh axis "
                    f"{' x '.join(axes)}: make it {size + -size % shards}, or give {rule!r} another rule with "
                    "flax.nnx.logical_axis_rules."
                )
        return ShardAxes(tuple(axis for entry in tokens for axis in as_axes(entry)), experts, hidden)

    def _check_input(self, x: Array, mask: Array | None) -> None:
        if not x.ndim or x.shape[-1] != self.features or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"x is {x.dtype}{list(x.shape)}; it must be a floating-point array [..., D={self.features}]."
            )
        if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != jnp.bool_):
            raise ValueError(
                f"mask is {mask.dtype}{list(mask.shape)}; it must be bool{list(x.shape[:-1])}: one for each token of x."
            )


class _Inputs(NamedTuple):
    """What one shard of the layer is applied to; or, of each, the partition spec."""

    x: Any
    router_x: Any
    mask: Any


class _Parameters(NamedTuple):
    """The layer's parameters as arrays; or, of each, the partition spec."""

    router_kernel: Any
    experts: Any
    shared: Any


@jax.checkpoint  # or a float32 copy of x would be kept for the backward
def _router_logits(x: Float[Array, "T D"], kernel: Float[Array, "D E"]) -> Float[Array, "T E"]:
    dtype = jnp.promote_types(jnp.result_type(x, kernel), jnp.float32)
    return jnp.dot(x.astype(dtype), kernel.astype(dtype), precision="highest")
