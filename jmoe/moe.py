"""The MoE layer as a Flax NNX module."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Initializer
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Shaped

from jmoe.activations import Activation
from jmoe.arguments import check_choice, check_layer_input
from jmoe.capacity import expert_capacity, limited_by_factor
from jmoe.debug import refuse_mesh
from jmoe.exchanges import ExchangeName, check_exchange
from jmoe.expert_parallel import ShardAxes, shard_axes, sharded_mlps
from jmoe.local_mlp import MLPImplementation, WeightOn
from jmoe.moe_aux import MoEAux, moe_aux
from jmoe.parameters import (
    checked_widths,
    create_mlp_parameters,
    create_shared_expert,
    mlp_parameters,
    shared_parameters,
)
from jmoe.placement import ExpertPlacement, check_placement
from jmoe.routers.create import create_router
from jmoe.routers.router import Route, Router, call_router, router_key
from jmoe.routers.zero_experts import split_zero_experts
from jmoe.routing import Assignments, Routing, Score, ScoreOrder, in_range
from jmoe.sharding import partitioned, reshard, shardable_axes, token_spec

LoadBalancing = Literal["layer", "sequence"]
SharedCombine = Literal["sum", "weighted_sum", "sigmoid_gate"]


class MoE(nnx.Module):
    """A dropless Mixture-of-Experts layer: each token goes through its top-k experts, whatever the balance.

    `y = sum_k w_k * MLP_{e_k}(x)`, with experts and weights from a linear router (`jmoe.route_top_k`).
    Parameters are `router.kernel` [D, E], `w_up` [E, D, 2F] (gated, gate columns first; [E, D, F] plain),
    `w_down` [E, F, D] (side by side where widths differ) and, with `use_bias`, `b_up` and `b_down`; `shared` holds
    those of the shared expert, without E, and `bias` [D] is that of the output. They carry the logical axis names
    of `jmoe.LOGICAL_AXIS_RULES`, and need no mesh.

    On a mesh (`jax.set_mesh`) the experts are computed where they are stored: tokens are exchanged along the expert
    axis, and their outputs brought back. Axes of the mesh may be Auto or Explicit. Inside a
    `jax.shard_map` of the caller, its manual axes are the caller's: the layer sees the tokens of one shard.

    Args:
        features: D, the width of the input and the output.
        hidden_features: F, the hidden width of one expert; or a sequence of E widths, for experts of different ones,
            as the `hidden_sizes` of `jmoe.moe_mlp`. These are not split over mesh axes.
        num_experts: E.
        top_k: K, the experts of each token; not with `router`.
        activation: as in `jmoe.moe_mlp`.
        score: as in `jmoe.route_top_k`.
        score_order: as in `jmoe.route_top_k`.
        normalize: as in `jmoe.route_top_k`.
        scale: as in `jmoe.route_top_k`.
        router: what routes instead of `jmoe.route_top_k`. Either a function of the logits, such as a
            `functools.partial` of one in `jmoe.routers`, or a `jmoe.routers.Router`. K, `score` and the other
            options of routing are then the router's own.
        num_identity_experts: experts besides the E that return their input, and cost nothing. The router has a logit
            for each, after those of the E.
        num_zero_experts: experts that return nothing, after these.
        load_balancing: what `aux.load_balancing_loss` is over: all tokens of the "layer", or those of each "sequence"
            (the last but one axis of x) by itself.
        weight_on: as in `jmoe.moe_mlp`.
        router_jitter: where `rngs` are passed to a call, the router's input is multiplied with noise, uniform
            in `1 +- router_jitter` (Switch Transformer, arXiv 2101.03961: "input jitter"); less than 1.
        capacity_factor: c, if each expert is to take no more than `ceil(c * T * K / E)` assignments of the T
            tokens of a call (of all shards; masked tokens count in T). The rest is dropped as `jmoe.limit_to_capacity`
            says, and a token that no expert takes gets zeros. None or 0: dropless. With a `router`, here and in
            `shared_combine`, K is the router's `top_k`, its option `k` as a rule; without that, how many assignments it
            has room for, divided by T.
        shared_hidden_features: the hidden width of an expert that every token goes through besides; 0 for none.
        shared_combine: what is done with the shared expert's output s and the sum y of the others: "sum", `y + s`;
            "weighted_sum", `(K * y + s) / (K + 1)` (MegaBlocks' `shared_expert_weighted_sum`); "sigmoid_gate",
            `y + sigmoid(x @ shared.gate) * s` (Qwen2-MoE), with `shared.gate` [D, 1].
        use_bias: whether the experts have biases; the router has none.
        use_output_bias: whether the layer has a bias, `bias` [D], added once to each token's output.
        remat: as in `jmoe.moe_mlp`, and the same for the shared expert.
        dtype: the dtype of the experts' computation and of the output; by default the promoted dtype of the
            input and the experts' parameters. The router computes in float32 (float64 for float64) in any
            case.
        param_dtype: the dtype of the parameters.
        kernel_init: initializer of every matrix. It sees one expert's [D, 2F] or [F, D] at a time, so that
            fans are counted per expert.
        bias_init: initializer of the biases.
        implementation: as in `jmoe.moe_mlp`.
        exchange: as in `jmoe.moe_mlp`; it means nothing without an expert axis.
        expert_placement: as in `jmoe.moe_mlp`. The router and `aux` have the experts' own order, and each expert
            starts with the same values. To set it later, put the parameters and what an optimizer keeps of them into
            its order: `jmoe.reorder_experts`.
        rngs: random keys for the parameters (stream "params").

    Raises:
        ValueError: a size or another option is out of range, `top_k` is more than the experts, a name is unknown,
            options of `jmoe.route_top_k` are given beside a router, or `router` is neither a function nor a `Router`.

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
        top_k: int | None = None,
        *,
        activation: Activation = "swiglu",
        score: Score = "softmax",
        score_order: ScoreOrder = "before_top_k",
        normalize: bool | float = True,
        scale: float = 1.0,
        router: Router | Route | None = None,
        num_identity_experts: int = 0,
        num_zero_experts: int = 0,
        load_balancing: LoadBalancing = "layer",
        weight_on: WeightOn = "output",
        router_jitter: float = 0.0,
        capacity_factor: float | None = None,
        shared_hidden_features: int = 0,
        shared_combine: SharedCombine = "sum",
        use_bias: bool = False,
        use_output_bias: bool = False,
        remat: bool = False,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),
        bias_init: Initializer = nnx.initializers.zeros_init(),
        implementation: MLPImplementation | None = None,
        exchange: ExchangeName = "auto",
        expert_placement: ExpertPlacement | None = None,
        rngs: nnx.Rngs,
    ):
        sizes = {"features": features, "num_experts": num_experts}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1.")
        counts = {
            "shared_hidden_features": shared_hidden_features,
            "num_identity_experts": num_identity_experts,
            "num_zero_experts": num_zero_experts,
        }
        for name, count in counts.items():
            if count < 0:
                raise ValueError(f"{name} is {count}; it must be 0 (none) or more.")
        check_choice("load_balancing", load_balancing, get_args(LoadBalancing))
        check_choice("shared_combine", shared_combine, get_args(SharedCombine))
        check_choice("weight_on", weight_on, get_args(WeightOn))
        check_choice("implementation", implementation, (None, *get_args(MLPImplementation)))
        if not 0 <= router_jitter < 1:
            raise ValueError(f"router_jitter is {router_jitter}; it must be from 0 (none) to less than 1.")
        if shared_combine != "sum" and not shared_hidden_features:
            raise ValueError(
                f"shared_combine is {shared_combine!r} without a shared expert; set shared_hidden_features."
            )
        check_exchange(exchange)
        check_placement(expert_placement)
        if capacity_factor:
            expert_capacity(capacity_factor, 1, num_experts)  # raises if it is none
        self.features = features
        self.hidden_features = checked_widths(hidden_features, num_experts)
        self.num_experts = num_experts
        self.top_k = top_k
        self.activation: Activation = activation
        self.score: Score = score
        self.score_order: ScoreOrder = score_order
        self.normalize = normalize
        self.scale = scale
        self.num_identity_experts = num_identity_experts
        self.num_zero_experts = num_zero_experts
        self.load_balancing: LoadBalancing = load_balancing
        self.weight_on: WeightOn = weight_on
        self.router_jitter = router_jitter
        self.capacity_factor = capacity_factor
        self.shared_hidden_features = shared_hidden_features
        self.shared_combine: SharedCombine = shared_combine
        self.use_bias = use_bias
        self.use_output_bias = use_output_bias
        self.remat = remat
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.implementation: MLPImplementation | None = implementation
        self.exchange: ExchangeName = exchange
        self.expert_placement = expert_placement

        initialization = {"param_dtype": param_dtype, "kernel_init": kernel_init, "rngs": rngs}
        self.router: Any = create_router(  # a `Router`, whose variables are read by their names
            router,
            features,
            self._num_logits,
            top_k=top_k,
            score=score,
            score_order=score_order,
            normalize=normalize,
            scale=scale,
            **initialization,
        )
        mlp = {"activation": activation, "use_bias": use_bias, "bias_init": bias_init, **initialization}
        order = None
        if expert_placement is not None:
            expert_placement.check_fits(num_experts, one_width=not isinstance(self.hidden_features, tuple))
            order = expert_placement.order
        of_experts = {"num_experts": num_experts, "expert_order": order}
        experts = create_mlp_parameters(features, self.hidden_features, "expert_hidden", **of_experts, **mlp)
        self.w_up, self.w_down, self.b_up, self.b_down = experts
        shared = None
        if shared_hidden_features:
            has_gate = shared_combine == "sigmoid_gate"
            shared = create_shared_expert(features, shared_hidden_features, has_gate=has_gate, **mlp)
        self.shared = nnx.data(shared)
        bias = partitioned(bias_init, ("embed",))
        self.bias = nnx.Param(bias(rngs.params(), (features,), param_dtype)) if use_output_bias else None

    def __call__(
        self,
        x: Float[Array, "*batch D"],
        *,
        mask: Bool[Array, "*batch"] | None = None,
        rngs: nnx.Rngs | None = None,
        **router_inputs: Shaped[Array, "..."],
    ) -> tuple[Float[Array, "*batch D"], MoEAux]:
        """Applies the layer to each token.

        Args:
            x: [..., D].
            mask: bool[...], false for tokens that are not there, such as padding: they are not routed, give
                zeros, get no gradient and enter no statistic, whatever x holds there.
            rngs: random keys for the router's noise (stream "router", or "default"): `router_jitter`, and what the
                router itself draws; without them there is none. Nothing is taken from them where there is no noise.
            **router_inputs: what the router takes of each token besides x, by name: [..., *], such as the
                `token_ids` of `jmoe.routers.HashRouter`.

        Returns:
            y: [..., D].
            aux: losses and statistics of the routing; the losses are to be weighted and added to the
                objective.

        Raises:
            ValueError: the shape or dtype of x or mask does not fit, the router takes other inputs or gives other
                logits or no routing, K is not known where it is needed, `rngs` lacks the stream, or the mesh does not
                divide the experts.
        """
        check_layer_input(x, self.features, mask, router_inputs)
        router_x = key = None
        if rngs is not None and self.router_jitter:
            dtype = jnp.promote_types(x.dtype, jnp.float32)
            noise = jax.random.uniform(router_key(rngs), x.shape, dtype, -self.router_jitter, self.router_jitter)
            router_x = x * (1 + noise)
        if rngs is not None and self.router.takes_key:
            key = router_key(rngs)
        inputs = _Inputs(x, router_x, mask, router_inputs, key)
        parameters = _Parameters(
            nnx.state(self.router),
            mlp_parameters(self),
            None if self.shared is None else shared_parameters(self.shared),
            None if self.bias is None else self.bias[...],
        )
        axis_names = shardable_axes(jax.sharding.get_abstract_mesh())
        if not axis_names:
            return self._apply_to_shard(inputs, parameters, axes=ShardAxes())

        refuse_mesh()
        tokens = token_spec(x)
        axes = shard_axes(tokens, self.num_experts, self.hidden_features, self.shared_hidden_features)
        replicated = PartitionSpec()
        of_tokens = PartitionSpec(*tokens[:-1])
        in_specs = (
            _Inputs(tokens, tokens, of_tokens, of_tokens, replicated),
            _Parameters(replicated, PartitionSpec(axes.experts), replicated, replicated),
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

        routing, aux = self._route(router_x, mask, inputs, parameters, axes)
        identity_weight = None
        if self._num_logits > self.num_experts:
            num_identity = self.num_identity_experts
            routing, identity_weight = split_zero_experts(routing, self.num_experts, num_tokens, num_identity)
        if self.capacity_factor:
            routing, dropped = limited_by_factor(
                routing,
                self.num_experts,
                self.capacity_factor,
                num_assignments=num_tokens * self._top_k(routing, num_tokens),
                batch_shape=batch_shape,
                batch_axes=axes.batch,
            )
            aux = dataclasses.replace(aux, dropped_fraction=dropped)

        shared_weight = None
        if self.shared_combine == "weighted_sum":
            shared_weight = 1 / (self._top_k(routing, num_tokens) + 1)
        arrays = jax.tree.leaves((parameters.experts, parameters.shared, parameters.bias))
        x = x.astype(jnp.result_type(x, *arrays) if self.dtype is None else self.dtype)
        y = sharded_mlps(
            x,
            routing,
            parameters.experts,
            parameters.shared,
            axes,
            shared_weight=shared_weight,
            activation=self.activation,
            weight_on=self.weight_on,
            remat=self.remat,
            hidden_sizes=self.hidden_features if isinstance(self.hidden_features, tuple) else None,
            implementation=self.implementation,
            exchange=self.exchange,
            expert_placement=self.expert_placement,
        )  # [T, D]
        if identity_weight is not None:
            if shared_weight is not None:
                identity_weight *= 1 - shared_weight
            y += (identity_weight[:, None] * x).astype(y.dtype)
        if parameters.bias is not None:
            y += parameters.bias.astype(y.dtype)
        if mask is not None and (parameters.shared is not None or parameters.bias is not None):
            y = jnp.where(mask[:, None], y, 0)
        return y.reshape(*batch_shape, self.features), aux

    def _route(
        self,
        x: Float[Array, "T D"],
        mask: Bool[Array, " T"] | None,
        inputs: "_Inputs",
        parameters: "_Parameters",
        axes: ShardAxes,
    ) -> tuple[Routing | Assignments, MoEAux]:
        """Routes the tokens of one shard, and computes losses and statistics over those of all."""
        batch_shape, num_tokens = inputs.x.shape[:-1], x.shape[0]
        flat = {
            name: array.reshape(num_tokens, *array.shape[len(batch_shape) :]) for name, array in inputs.router.items()
        }
        key = inputs.key
        if key is not None and axes.tokens:
            key = jax.random.fold_in(key, lax.axis_index(axes.tokens))
        # A copy, or what the router does to its variables would stay where there is no mesh.
        router = nnx.merge(nnx.graphdef(self.router), parameters.router, copy=True)
        routing, logits = call_router(router, x, {**flat, "mask": mask, "key": key})
        if isinstance(routing, Assignments):
            routing = in_range(routing, num_tokens, self._num_logits)
        if mask is not None:
            routing = routing.masked(mask)

        num_sequences = math.prod(batch_shape[:-1]) if self.load_balancing == "sequence" else None
        sizes = num_tokens, self._num_logits
        return routing, moe_aux(router, routing, logits, *sizes, axes, mask=mask, num_sequences=num_sequences)

    def _top_k(self, routing: Routing | Assignments, num_tokens: int) -> int:
        if self.router.top_k is not None:
            return self.router.top_k
        room = routing.expert_index.size
        if room % max(num_tokens, 1):
            raise ValueError(
                f"the router gives room for {room} assignments of {num_tokens} tokens, and does not say K, which "
                "capacity_factor and shared_combine='weighted_sum' need: set its attribute top_k."
            )
        return room // max(num_tokens, 1)

    @property
    def _num_logits(self) -> int:
        return self.num_experts + self.num_identity_experts + self.num_zero_experts


class _Inputs(NamedTuple):
    """What one shard of the layer is applied to; or, of each, the partition spec."""

    x: Any
    router_x: Any
    mask: Any
    router: Any
    key: Any


class _Parameters(NamedTuple):
    """The layer's parameters as arrays; or, of each, the partition spec."""

    router: Any
    experts: Any
    shared: Any
    bias: Any
