"""The MoE layer as a Flax NNX module."""

import dataclasses
import functools
import math
from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Initializer
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from jmoe.activations import Activation, is_gated
from jmoe.expert_parallel import ShardAxes, sharded_mlps
from jmoe.losses import expert_load, load_balancing_loss, router_z_loss
from jmoe.mlp import ExpertParameters, WeightOn
from jmoe.routing import Routing, Score, ScoreOrder, is_present, route_top_k
from jmoe.sharding import as_axes, mesh_axes, partitioned, reshard, shardable_axes, token_spec
from pallas_kernels import Implementation


@no_type_check  # JAX also builds pytrees of other shapes and of things that are no arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEAux:
    """What an MoE layer tells about its routing, over all tokens that the mask leaves.

    Attributes:
        load_balancing_loss: f32[], 1 at perfect balance (`jmoe.load_balancing_loss`).
        router_z_loss: f32[] (`jmoe.router_z_loss`).
        expert_load: f32[E], each expert's share of the assignments; sums to 1.
        dropped_fraction: f32[], the share of the tokens' K assignments that no expert got; 0 in a dropless layer.
    """

    load_balancing_loss: Float[Array, ""]
    router_z_loss: Float[Array, ""]
    expert_load: Float[Array, " E"]
    dropped_fraction: Float[Array, ""]


class MoE(nnx.Module):
    """A dropless Mixture-of-Experts layer: each token goes through its top-k experts, whatever the balance.

    `y = sum_k w_k * MLP_{e_k}(x)`, with experts and weights from a linear router (`jmoe.route_top_k`). Parameters are
    `router.kernel` [D, E], `w_up` [E, D, 2F] (gated, gate columns first; [E, D, F] plain), `w_down` [E, F, D] and, with
    `use_bias`, `b_up` and `b_down`; `shared` holds those of the shared expert, without E. They carry the
    logical axis names of `jmoe.LOGICAL_AXIS_RULES`, and need no mesh.

    On a mesh (`jax.set_mesh`) the experts are computed where they are stored: tokens are all-gathered over the expert
    axis and the outputs reduced back. Axes of the mesh may be Auto or Explicit. Inside a `jax.shard_map` of the
    caller, its manual axes are the caller's: the layer sees the tokens of one shard.

    Args:
        features: D, the width of the input and the output.
        hidden_features: F, the hidden width of one expert.
        num_experts: E.
        top_k: K, the experts of each token.
        activation: as in `jmoe.moe_mlp`.
        score: as in `jmoe.route_top_k`.
        score_order: as in `jmoe.route_top_k`.
        normalize: as in `jmoe.route_top_k`.
        scale: as in `jmoe.route_top_k`.
        weight_on: as in `jmoe.moe_mlp`.
        router_jitter: where `rngs` are passed to a call, the router's input is multiplied with noise, uniform in
            `1 +- router_jitter` (Switch Transformer, arXiv 2101.03961, section 2.4).
        shared_hidden_features: the hidden width of an expert that every token goes through besides, with weight 1;
            0 for none.
        use_bias: whether the experts have biases; the router has none.
        dtype: the dtype of the experts' computation and of the output; by default the promoted dtype of the input
            and the experts' parameters. The router computes in float32 (float64 for float64) in any case.
        param_dtype: the dtype of the parameters.
        kernel_init: initializer of every matrix. It sees one expert's [D, 2F] or [F, D] at a time, so that fans are
            counted per expert.
        bias_init: initializer of the biases.
        implementation: of the grouped matmuls, as in `pallas_kernels.grouped_matmul`.
        rngs: random keys for the parameters (stream "params").

    Raises:
        ValueError: a size is not positive, `top_k` is more than `num_experts`, or a name is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> moe = MoE(16, 32, num_experts=4, top_k=2, rngs=nnx.Rngs(0))
        >>> y, aux = moe(jnp.ones((2, 3, 16)))
        >>> y.shape, aux.expert_load.shape
        ((2, 3, 16), (4,))
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
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
        kernel_init: Initializer = nnx.initializers.lecun_normal(),
        bias_init: Initializer = nnx.initializers.zeros_init(),
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        for name, value in dict(
            features=features, hidden_features=hidden_features, num_experts=num_experts
        ).items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        if shared_hidden_features < 0:
            raise ValueError(
                f"shared_hidden_features is {shared_hidden_features}; it must be 0 (none) or more."
            )
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k}; it must be between 1 and num_experts, {num_experts}.")
        self.features = features
        self.hidden_features = hidden_features
        self.num_experts = num_experts
        self.top_k = top_k
        self.activation = activation
        self.score = score
        self.score_order = score_order
        self.normalize = normalize
        self.scale = scale
        self.weight_on = weight_on
        self.router_jitter = router_jitter
        self.shared_hidden_features = shared_hidden_features
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.implementation = implementation

        self.router = nnx.Linear(
            features,
            num_experts,
            use_bias=False,
            param_dtype=param_dtype,
            kernel_init=partitioned(kernel_init, ("embed", None)),
            rngs=rngs,
        )
        options = dict(
            activation=activation,
            use_bias=use_bias,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )
        self.w_up, self.w_down, self.b_up, self.b_down = _new_parameters(
            features, hidden_features, ("embed", "expert_hidden"), num_experts=num_experts, **options
        )
        has_shared = shared_hidden_features > 0
        self.shared = nnx.data(
            SharedExpert(features, shared_hidden_features, **options) if has_shared else None
        )

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
            mask: bool[...], false for tokens that are not there, such as padding: they are not routed, give zeros,
                get no gradient and enter no statistic, whatever x holds there.
            rngs: random keys for the router's noise (stream "router"); without them there is none.

        Returns:
            y: [..., D].
            aux: losses and statistics of the routing; the losses are to be weighted and added to the objective.

        Raises:
            ValueError: the shape or dtype of x or mask does not fit, or the mesh does not divide the experts.
        """
        self._check_input(x, mask)
        router_x = None
        if self.router_jitter and rngs is not None:
            low, high = 1 - self.router_jitter, 1 + self.router_jitter
            router_x = x * jax.random.uniform(
                rngs.router(), x.shape, jnp.promote_types(x.dtype, jnp.float32), low, high
            )

        router_kernel, experts = self.router.kernel[...], _values(self)
        shared = None if self.shared is None else _values(self.shared)
        axis_names = shardable_axes(jax.sharding.get_abstract_mesh())
        if not axis_names:
            return self._apply_to_shard(x, router_x, mask, router_kernel, experts, shared, axes=ShardAxes())

        tokens = token_spec(x)
        axes = self._shard_axes(tokens)
        per_token = PartitionSpec(*tokens[:-1])
        of_experts, replicated = PartitionSpec(axes.experts), PartitionSpec()
        in_specs = (tokens, tokens, per_token, replicated, of_experts, replicated)
        arguments = (x, router_x, mask, router_kernel, experts, shared)
        # Kernels and loops do not say which mesh axes their results vary over, so that is not checked.
        apply = jax.shard_map(
            functools.partial(self._apply_to_shard, axes=axes),
            in_specs=in_specs,
            out_specs=(tokens, replicated),
            axis_names=axis_names,
            check_vma=False,
        )
        return apply(*map(reshard, arguments, in_specs))

    def _apply_to_shard(
        self,
        x: Float[Array, "*batch D"],
        router_x: Float[Array, "*batch D"] | None,
        mask: Bool[Array, "*batch"] | None,
        router_kernel: Float[Array, "D E"],
        experts: ExpertParameters,
        shared: ExpertParameters | None,
        *,
        axes: ShardAxes,
    ) -> tuple[Float[Array, "*batch D"], MoEAux]:
        """Applies the layer to the tokens and experts of one shard of the mesh; without a mesh, to all."""
        shape = x.shape
        x, router_x = (None if a is None else a.reshape(-1, self.features) for a in (x, router_x))  # [T, D]
        if mask is not None:
            mask = mask.ravel()
            x, router_x = (None if a is None else jnp.where(mask[:, None], a, 0) for a in (x, router_x))

        logits = _router_logits(x if router_x is None else router_x, router_kernel)  # [T, E]
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

        present = (p for p in (*experts, *(shared or ())) if p is not None)
        x = x.astype(jnp.result_type(x, *present) if self.dtype is None else self.dtype)
        y = sharded_mlps(
            x,
            routing,
            experts,
            shared,
            axes,
            activation=self.activation,
            weight_on=self.weight_on,
            implementation=self.implementation,
        )  # [T, D]
        if mask is not None and shared is not None:
            y = jnp.where(mask[:, None], y, 0)
        return y.reshape(shape), aux

    def _aux(
        self, logits: Float[Array, "T E"], routing: Routing, mask: Bool[Array, " T"] | None, axes: ShardAxes
    ) -> MoEAux:
        # A loss that compares experts needs scores that sum to 1 (DeepSeek-V3, arXiv 2412.19437, equation 19).
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
        for names, sizes in (
            (experts, {"num_experts": self.num_experts}),
            (
                hidden,
                {
                    "hidden_features": self.hidden_features,
                    "shared_hidden_features": self.shared_hidden_features,
                },
            ),
        ):
            shards = math.prod(mesh.shape[name] for name in names)
            for argument, size in sizes.items():
                if size % shards:
                    raise ValueError(
                        f"{argument} is {size}; it must be a multiple of {shards}, the size of the mesh axis "
                        f"{' x '.join(names)}."
                    )
        return ShardAxes(tuple(axis for entry in tokens for axis in as_axes(entry)), experts, hidden)

    def _check_input(self, x: Array, mask: Array | None) -> None:
        if not x.ndim or x.shape[-1] != self.features or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"x is {x.dtype}{list(x.shape)}; it must be a floating-point array [..., D={self.features}]."
            )
        if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != jnp.bool_):
            raise ValueError(
                f"mask is {mask.dtype}{list(mask.shape)}; it must be bool{list(x.shape[:-1])}, one for each token of x."
            )


class SharedExpert(nnx.Module):
    """The parameters of the MLP that every token goes through besides its routed experts."""

    def __init__(self, features: int, hidden_features: int, *, rngs: nnx.Rngs, **options):
        self.w_up, self.w_down, self.b_up, self.b_down = _new_parameters(
            features, hidden_features, ("embed", "mlp"), rngs=rngs, **options
        )


def _new_parameters(
    features: int,
    hidden_features: int,
    axes: tuple[str, str],
    *,
    num_experts: int | None = None,
    activation: Activation,
    use_bias: bool,
    param_dtype: jax.typing.DTypeLike,
    kernel_init: Initializer,
    bias_init: Initializer,
    rngs: nnx.Rngs,
) -> tuple[nnx.Param, nnx.Param, nnx.Param | None, nnx.Param | None]:
    """Creates w_up, w_down, b_up and b_down, of `num_experts` experts or of one without that axis."""
    width = (2 if is_gated(activation) else 1) * hidden_features
    embed, hidden = axes

    def new(initializer: Initializer, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        if num_experts is not None:
            initializer, shape, axes = _per_expert(initializer), (num_experts, *shape), ("expert", *axes)
        return nnx.Param(partitioned(initializer, axes)(rngs.params(), shape, param_dtype))

    return (
        new(kernel_init, (features, width), (embed, hidden)),
        new(kernel_init, (hidden_features, features), (hidden, embed)),
        new(bias_init, (width,), (hidden,)) if use_bias else None,
        new(bias_init, (features,), (embed,)) if use_bias else None,
    )


def _per_expert(initializer: Initializer) -> Initializer:
    """Initializes each expert as a matrix of its own, so that E does not count as fan-in."""

    def initialize(key, shape, dtype):
        return jax.vmap(lambda key: initializer(key, shape[1:], dtype))(jax.random.split(key, shape[0]))

    return initialize


def _values(module: MoE | SharedExpert) -> ExpertParameters:
    parameters = (module.w_up, module.w_down, module.b_up, module.b_down)
    return ExpertParameters(*(None if p is None else p[...] for p in parameters))


def _router_logits(x: Float[Array, "T D"], kernel: Float[Array, "D E"]) -> Float[Array, "T E"]:
    # A product of mixed dtypes, because a float32 copy of x would be kept for the backward.
    dtype = jnp.promote_types(jnp.result_type(x, kernel), jnp.float32)
    return lax.dot(x, kernel, precision="highest", preferred_element_type=dtype)
