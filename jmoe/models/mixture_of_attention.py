"""Mixture of attention: each token's experts bring the queries and read the outputs, around shared keys and values."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Initializer
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jmoe.debug import refuse_mesh
from jmoe.dispatch import make_dispatch
from jmoe.expert_parallel import ShardAxes
from jmoe.models.attention import (
    KVCache,
    attention_implementation,
    cached_attention,
    check_attention_implementation,
    rope_rotation,
    rotate,
)
from jmoe.models.config import AttentionImplementation
from jmoe.models.layers import recompute
from jmoe.moe_aux import MoEAux, moe_aux
from jmoe.parallel_linear import ParallelLinear
from jmoe.routers.linear import LinearRouter
from jmoe.routing import route_top_k
from jmoe.sharding import as_axes, partitioned, reshard, shardable_axes, token_spec
from pallas_kernels import Implementation


class _Inputs(NamedTuple):
    """What the layer is applied to."""

    x: Float[Array, "B S D"]
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"] | None
    cache: KVCache | None


class MixtureOfAttention(nnx.Module):
    """Causal attention whose query and output projections are experts', around keys and values that all share.

    `y[t] = sum_k w_k * concat_i(attention(rope(x[t] @ query[e_k]))_i) @ out[e_k]`: each of a token's K experts has
    `num_heads` query heads, which attend to the keys and values of the earlier tokens of the segment. So a token
    has K * num_heads heads of attention, out of E * num_heads, and K/E of the projections' work.

    Parameters are `router.kernel` [D, E], `query.kernel` [E, D, num_heads * h], `key.kernel` and `value.kernel`
    [D, num_kv_heads * h], `out.kernel` [E, num_heads * h, D] and, with `use_bias`, `bias` [D], added once. Queries
    and outputs are two `jmoe.parallel_linear` on one dispatch, from scattered to scattered rows.

    On a mesh (`jax.set_mesh`) the batch is sharded as by `jmoe.MoE`, and each shard computes its own sequences with
    all experts.

    Args:
        features: D, the width of the input and the output.
        head_dim: h, the width of one head; even.
        num_experts: E.
        top_k: K, the experts of each token.
        num_heads: query heads of one expert.
        num_kv_heads: key and value heads; head i of every expert attends with number
            `i // (num_heads / num_kv_heads)`. JetMoE has as many as query heads.
        rope_theta: base of the rotary position embedding's wavelengths.
        use_bias: whether the output has a bias (JetMoE's has).
        dtype: the dtype of the computation and the output; by default the promoted dtype of x and the parameters.
            Router, rotation and softmax compute in float32.
        param_dtype: the dtype of the parameters.
        kernel_init: initializer of every matrix, an expert's at a time.
        bias_init: initializer of the bias.
        attention_implementation: "cudnn" (NVIDIA GPUs, bfloat16 or float16), "xla", or "auto": cuDNN where it can run.
        implementation: of the grouped matmuls, as in `pallas_kernels.grouped_matmul`.
        rngs: random keys for the parameters (stream "params").

    Raises:
        ValueError: a size is not positive or does not fit another, or a name is unknown.

    Source: Tan et al. (ScatterMoE), arXiv 2403.08245 (MoMHA); Shen et al. (JetMoE), arXiv 2404.07413.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jmoe.models import MixtureOfAttention
        >>> attention = MixtureOfAttention(16, 4, num_experts=8, top_k=2, num_heads=2, num_kv_heads=2, rngs=nnx.Rngs(0))
        >>> y, aux, _ = attention(jnp.ones((1, 5, 16)))
        >>> y.shape, aux.expert_load.shape
        ((1, 5, 16), (8,))
    """

    def __init__(
        self,
        features: int,
        head_dim: int,
        num_experts: int,
        top_k: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        rope_theta: float = 10_000.0,
        use_bias: bool = False,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),
        bias_init: Initializer = nnx.initializers.zeros_init(),
        attention_implementation: AttentionImplementation = "auto",
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        if features < 1:
            raise ValueError(f"features is {features}; it must be at least 1.")
        check_attention_implementation(attention_implementation)
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}; it must be even and positive, since RoPE rotates pairs.")
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_heads is {num_heads}; it must be a multiple of num_kv_heads, {num_kv_heads}.")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k}; it must be between 1 and num_experts, {num_experts}.")
        self.features = features
        self.head_dim = head_dim
        self.num_experts = num_experts
        self.top_k = top_k
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.rope_theta = rope_theta
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.attention_implementation: AttentionImplementation = attention_implementation

        def linear(width: int, axis: str) -> nnx.Linear:
            init = partitioned(kernel_init, ("embed", axis))
            return nnx.Linear(
                features,
                width,
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=init,
                rngs=rngs,
            )

        def experts(in_features: int, out_features: int, axes: tuple[str, str]) -> ParallelLinear:
            return ParallelLinear(
                in_features,
                out_features,
                num_experts,
                axes=axes,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=kernel_init,
                implementation=implementation,
                rngs=rngs,
            )

        self.query = experts(features, num_heads * head_dim, ("embed", "heads"))
        self.out = experts(num_heads * head_dim, features, ("heads", "embed"))
        self.router = LinearRouter(
            features, num_experts, route_top_k, k=top_k, param_dtype=param_dtype, kernel_init=kernel_init, rngs=rngs
        )
        self.key = linear(num_kv_heads * head_dim, "kv_heads")
        self.value = linear(num_kv_heads * head_dim, "kv_heads")
        bias_init = partitioned(bias_init, ("embed",))
        self.bias = nnx.Param(bias_init(rngs.params(), (features,), param_dtype)) if use_bias else None

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"] | None = None,
        *,
        segment_ids: Int[Array, "B S"] | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "B S D"], MoEAux, KVCache | None]:
        """Lets each token attend to itself and to the earlier tokens of its segment.

        Args:
            x: [B, S, D].
            positions: int[B, S], the position of each token; None counts from 0 along each sequence. With a cache and
                S = 1 they must be given.
            segment_ids: int[B, S], which document each token belongs to; None if each sequence is one document.
                Tokens of segment 0 are padding: they are not routed, give zeros and enter no statistic, whatever x
                holds there.
            cache: where to write the keys and values, of `empty_cache`. With S = 1 the token attends to the cache up
                to its position, whatever its segment; longer sequences must start at position 0 and attend to
                themselves. All positions must be less than the cache's length; `jmoe.debug_checks()` reports others.

        Returns:
            y: [B, S, D].
            aux: losses and statistics of the routing, as of `jmoe.MoE`.
            cache: the written cache (None without one).

        Raises:
            ValueError: the shape or dtype of an array does not fit, `positions` are missing, or cuDNN was asked for and
                cannot run.
        """
        if x.ndim != 3 or x.shape[-1] != self.features or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"x is {x.dtype}{list(x.shape)}; it must be floating-point [B, S, D={self.features}].")
        for name, array in {"positions": positions, "segment_ids": segment_ids}.items():
            if array is not None and (array.shape != x.shape[:2] or not jnp.issubdtype(array.dtype, jnp.integer)):
                raise ValueError(
                    f"{name} is {array.dtype}{list(array.shape)}; it must be integer [B={x.shape[0]}, S={x.shape[1]}]."
                )
        if cache is not None:
            self._check_cache(cache, x)
        if positions is None and cache is not None and x.shape[1] == 1:
            raise ValueError(
                "positions is None, with a cache and one token; it must be int[B, 1], where that token is."
            )
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        inputs = _Inputs(x, positions, segment_ids, cache)
        axis_names = shardable_axes(jax.sharding.get_abstract_mesh())
        if not axis_names:
            return self._apply_to_shard(inputs, ShardAxes())

        refuse_mesh()
        batch, replicated = PartitionSpec(*token_spec(x)[:1]), PartitionSpec()
        graphdef, state = nnx.split(self)

        def apply(inputs, state):
            return nnx.merge(graphdef, state)._apply_to_shard(inputs, ShardAxes((as_axes(batch[0]), ())))

        # Kernels and loops do not say which mesh axes their results vary over, so that is not checked.
        return jax.shard_map(
            apply,
            in_specs=(batch, replicated),
            out_specs=(batch, replicated, batch),
            axis_names=axis_names,
            check_vma=False,
        )(reshard(batch, inputs), reshard(replicated, state))

    def _apply_to_shard(self, inputs: _Inputs, axes: ShardAxes) -> tuple[Float[Array, "B S D"], MoEAux, KVCache | None]:
        """Applies the layer to the sequences of one shard of the mesh; without a mesh, to all."""
        x, positions, segment_ids, cache = inputs
        B, S, D = x.shape
        mask = None
        if segment_ids is not None:
            mask = (segment_ids != 0).reshape(-1)  # [T]
            x = jnp.where(mask.reshape(B, S, 1), x, 0)
        tokens = x.reshape(B * S, D)
        routing, logits = self.router(tokens)
        if mask is not None:
            routing = routing.masked(mask)
        aux = moe_aux(self.router, routing, logits, B * S, self.num_experts, axes, mask=mask, num_sequences=None)

        dtype = self._compute_dtype(x.dtype)
        x, tokens = x.astype(dtype), tokens.astype(dtype)
        implementation = attention_implementation(self.attention_implementation, dtype, self.head_dim)
        dispatch = make_dispatch(routing, self.num_experts)
        rotation = rope_rotation(positions, self.head_dim, self.rope_theta)
        query = self._to_heads(self.query(tokens, dispatch), B)  # [B, S, N, h]
        key, value = (recompute(kv, x).reshape(B, S, -1, self.head_dim) for kv in (self.key, self.value))
        query, key = rotate(query, rotation), rotate(key, rotation)
        heads, cache = cached_attention(query, key, value, positions, segment_ids, cache, implementation)
        y = self.out(self._from_heads(heads), dispatch, weights=routing.weight).reshape(B, S, D)
        if self.bias is not None:
            y += self.bias[...].astype(y.dtype)
            y = y if mask is None else jnp.where(mask.reshape(B, S, 1), y, 0)
        return y, aux, cache

    def empty_cache(self, batch: int, length: int, dtype: jax.typing.DTypeLike | None = None) -> KVCache:
        """Allocates a cache of `batch` sequences of positions less than `length`.

        Args:
            batch: B.
            length: the tokens of a sequence for which there is room; later ones are not kept.
            dtype: that of x, by default as the parameters'; of no matter where the layer has a `dtype`.
        """
        shape = batch, length, self.num_kv_heads, self.head_dim
        zeros = jnp.zeros(shape, self._compute_dtype(self.param_dtype if dtype is None else dtype))
        return KVCache(zeros, zeros)

    def _check_cache(self, cache: KVCache, x: Float[Array, "B S D"]) -> None:
        dtype = self._compute_dtype(x.dtype)
        for name, array in {"key": cache.key, "value": cache.value}.items():
            fits = array.shape[:1] == x.shape[:1] and array.shape[2:] == (self.num_kv_heads, self.head_dim)
            if not fits or array.ndim != 4 or array.dtype != dtype or array.shape != cache.key.shape:
                raise ValueError(
                    f"cache.{name} is {array.dtype}{list(array.shape)}; it must be {dtype}[B={x.shape[0]}, C, "
                    f"{self.num_kv_heads}, {self.head_dim}], as of empty_cache({x.shape[0]}, C, x.dtype)."
                )

    def _to_heads(self, query: Float[Array, "T K _"], batch: int) -> Float[Array, "B S N h"]:
        """Puts the heads of all K experts that share a key head side by side, as grouped-query attention has them."""
        query = query.reshape(batch, -1, self.top_k, self.num_kv_heads, self._group, self.head_dim)
        return query.swapaxes(2, 3).reshape(batch, query.shape[1], -1, self.head_dim)

    def _from_heads(self, heads: Float[Array, "B S N h"]) -> Float[Array, "T K _"]:
        heads = heads.reshape(-1, self.num_kv_heads, self.top_k, self._group, self.head_dim)
        return heads.swapaxes(1, 2).reshape(heads.shape[0], self.top_k, -1)

    @property
    def _group(self) -> int:
        """The query heads of one expert that share a key head."""
        return self.num_heads // self.num_kv_heads

    def _compute_dtype(self, dtype: jax.typing.DTypeLike) -> jnp.dtype:
        return jnp.promote_types(dtype, self.param_dtype) if self.dtype is None else jnp.dtype(self.dtype)
