"""A decoder-only transformer: pre-norm layers of attention and a dense or Mixture-of-Experts MLP."""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jmoe.models.attention import Attention, KVCache, Rotation, rope_rotation
from jmoe.models.config import LayerGroup, LayerKind, TransformerConfig
from jmoe.models.layers import MLP, RMSNorm, backward_apart
from jmoe.models.mesh import batch_spec, with_auto_axes
from jmoe.models.vocabulary import vocabulary_matmul
from jmoe.moe import MoE
from jmoe.moe_aux import MoEAux
from jmoe.routers import BiasCorrectedRouter
from jmoe.sharding import partitioned

# Variance 1 / D: tied, it gives logits of about unit variance.
_EMBEDDING_INIT = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)

Cache = tuple[tuple[KVCache, ...], ...]
"""One `KVCache` for each layer of each unit in `TransformerConfig.layer_groups`, stacked over the repeats."""


class Layer(nnx.Module):
    """One transformer layer: `x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: TransformerConfig, kind: LayerKind, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.embed_dim, config, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.embed_dim, config, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs) if kind == "dense" else _moe(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        rotation: Rotation,
        segment_ids: Int[Array, "B S"] | None,
        cache: KVCache | None,
    ) -> tuple[Float[Array, "B S D"], MoEAux | None, KVCache | None]:
        """Applies the layer; a dense one returns None for the router's losses and statistics."""
        attended, cache = self.attention(
            self.attention_norm(x), positions, rotation, segment_ids=segment_ids, cache=cache
        )  # [B, S, D]
        x = x + attended
        normalized = self.mlp_norm(x)
        if isinstance(self.mlp, MLP):
            return x + self.mlp(normalized), None, cache
        y, aux = self.mlp(normalized, mask=None if segment_ids is None else segment_ids != 0)  # [B, S, D]
        return x + y, aux, cache


class Unit(nnx.Module):
    """The consecutive layers that a `LayerGroup` repeats, of which at most the last is MoE."""

    def __init__(self, config: TransformerConfig, kinds: tuple[LayerKind, ...], *, rngs: nnx.Rngs):
        self.layers = nnx.List([Layer(config, kind, rngs=rngs) for kind in kinds])
        self.config = config

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        rotation: Rotation,
        segment_ids: Int[Array, "B S"] | None,
        caches: tuple[KVCache | None, ...],
    ) -> tuple[Float[Array, "B S D"], MoEAux | None, tuple[KVCache | None, ...]]:
        """Applies the layers in order."""
        aux, written = None, []
        for layer, cache in zip(self.layers, caches, strict=True):
            apply = _remat(layer, self.config)
            x, aux, cache = apply(x, positions, rotation, segment_ids, cache)
            written.append(cache)
        return x, aux, tuple(written)


class Transformer(nnx.Module):
    """A decoder-only language model.

    Args:
        config: The model's shape and options.
        rngs: Keys for the parameters, which each layer draws independently.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = _embedding(config, rngs=rngs)
        self.groups = nnx.List([_stack(config, group, rngs=rngs) for group in config.layer_groups])
        self.final_norm = RMSNorm(config.embed_dim, config, rngs=rngs)
        self.output_embedding = None if config.tie_embeddings else _embedding(config, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        *,
        positions: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B S V"], MoEAux]:
        """Computes the logits of each next token.

        Args:
            tokens: Token ids.
            positions: Position of each token, for RoPE; None counts from 0 along each sequence.
            segment_ids: Which document each token belongs to, when sequences pack several: a token attends
                only to its own segment, and tokens of segment 0 are padding, which no expert sees. None if
                each sequence is one document.

        Returns:
            Logits in float32, and the router's losses and statistics, stacked over the MoE layers in order.

        Raises:
            ValueError: If the sequence is longer than `config.max_sequence_length`.
        """

        def logits_and_aux(model, tokens, positions, segment_ids):
            hidden, aux = model.hidden(tokens, positions=positions, segment_ids=segment_ids)
            return model.logits(hidden), aux

        out_sharding = (batch_spec(tokens), PartitionSpec())
        return with_auto_axes(logits_and_aux, out_sharding)(self, tokens, positions, segment_ids)

    def hidden(
        self,
        tokens: Int[Array, "B S"],
        *,
        positions: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B S D"], MoEAux]:
        """Computes the normalized output of the last layer, which `logits` turns into logits.

        Arguments, errors and the second result are those of calling the model. On a mesh with Explicit axes
        it must run under `jax.sharding.auto_axes`; the call, the loss and `generate` see to that themselves.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, aux, _ = self._run(tokens, positions, segment_ids, None)
        return hidden, aux

    def hidden_with_cache(
        self, tokens: Int[Array, "B S"], positions: Int[Array, "B S"], cache: Cache
    ) -> tuple[Float[Array, "B S D"], Cache]:
        """Computes the normalized output of the last layer, and writes keys and values to the cache.

        Args:
            tokens: Token ids: either one token of each sequence (S = 1), or the start of the sequences.
            positions: Position of each token, which is also its cache slot.
            cache: Keys and values of all earlier positions.

        Returns:
            The output, and the cache to pass with the next token.
        """
        hidden, _, cache_or_none = self._run(tokens, positions, None, cache)
        return hidden, cast(Cache, cache_or_none)

    def empty_cache(self, batch: int, length: int) -> Cache:
        """Allocates a cache for `batch` sequences of up to `length` tokens, in the compute dtype."""
        config = self.config
        shape = (batch, length, config.num_kv_heads, config.head_dim)

        def empty(repeats: int) -> KVCache:
            zeros = jnp.zeros((repeats, *shape), config.dtype)
            return KVCache(zeros, zeros)

        return tuple(tuple(empty(group.repeats) for _ in group.unit) for group in config.layer_groups)

    def logits(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        """Computes the float32 logits of the output of `hidden`."""
        return vocabulary_matmul(hidden, self.output_matrix)

    @property
    def output_matrix(self) -> Float[Array, "V D"]:
        """What the output of `hidden` is multiplied with: a row for each token id."""
        embedding = self.embedding if self.output_embedding is None else self.output_embedding
        return embedding.embedding[...]

    def update_biases(self, expert_load: Float[Array, "L E"]) -> None:
        """Moves the routers' selection biases, as `jmoe.routers.BiasCorrectedRouter.update_bias` does.

        The training step calls this once, in a model with a `router_bias_update_rate`.

        Args:
            expert_load: Load of the experts of each MoE layer, over the whole batch.

        Raises:
            ValueError: If the model has no such biases, or the shape is not `[MoE layers, E]`.
        """
        config = self.config
        if not config.router_bias_update_rate:
            raise ValueError("the model has no selection biases; set router_bias_update_rate in its config")
        shape = config.layer_kinds.count("moe"), config.num_experts
        if expert_load.shape != shape:
            raise ValueError(f"expert_load must be {list(shape)}, as in the model's aux, got {list(expert_load.shape)}")
        first = 0
        for group, stacked in zip(self.config.layer_groups, self.groups, strict=True):
            mlp = stacked.layers[-1].mlp
            if isinstance(mlp, MoE):
                cast(BiasCorrectedRouter, mlp.router).update_bias(expert_load[first : first + group.repeats])
                first += group.repeats

    def _run(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"] | None,
        cache: Cache | None,
    ) -> tuple[Float[Array, "B S D"], MoEAux, Cache | None]:
        config = self.config
        if tokens.shape[1] > config.max_sequence_length:
            raise ValueError(
                f"tokens must have at most max_sequence_length = {config.max_sequence_length} columns, "
                f"got {tokens.shape[1]}"
            )
        rotation = rope_rotation(positions, config.head_dim, config.rope_theta)

        def run_unit(x, inputs):
            unit, caches = inputs
            x, aux, caches = unit(x, positions, rotation, segment_ids, caches)
            return x, (aux, caches)

        x = self.embedding(tokens).astype(config.dtype)  # [B, S, D]
        auxes, written = [_no_moe_layers(config)], []
        for index, (group, stacked) in enumerate(zip(config.layer_groups, self.groups, strict=True)):
            caches = (None,) * len(group.unit) if cache is None else cache[index]
            x, (aux, caches) = _scan(run_unit, x, (stacked, caches), group.repeats)
            auxes += [] if aux is None else [aux]
            written.append(caches)
        aux = jax.tree.map(lambda *parts: jnp.concatenate(parts), *auxes)
        return self.final_norm(x), aux, None if cache is None else tuple(written)


def _embedding(config: TransformerConfig, *, rngs: nnx.Rngs) -> nnx.Embed:
    param_dtype = jnp.dtype(config.param_dtype)
    return nnx.Embed(
        config.vocab_size,
        config.embed_dim,
        # Look up first, cast after: the table itself is never copied to the compute dtype.
        dtype=param_dtype,
        param_dtype=param_dtype,
        embedding_init=partitioned(_EMBEDDING_INIT, ("vocab", "embed")),
        rngs=rngs,
    )


def _moe(config: TransformerConfig, *, rngs: nnx.Rngs) -> MoE:
    routing: dict[str, Any] = {
        "score": config.router_score,
        "normalize": config.router_normalize,
        "scale": config.router_scale,
    }
    if config.router_bias_update_rate:
        router = BiasCorrectedRouter(
            config.embed_dim,
            config.num_experts,
            config.top_k,
            update_rate=config.router_bias_update_rate,
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
            **routing,
        )
        routing = {"router": router}
    else:
        routing |= {"top_k": config.top_k, "score_order": config.router_score_order}
    return MoE(
        config.embed_dim,
        config.expert_hidden_dim,
        config.num_experts,
        **routing,
        load_balancing="sequence" if config.load_balancing == "sequence" else "layer",
        activation=config.activation,
        capacity_factor=config.capacity_factor,
        shared_hidden_features=config.shared_hidden_dim,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        implementation=None if config.moe_implementation == "auto" else config.moe_implementation,
        exchange=config.moe_exchange,
        rngs=rngs,
    )


def _stack(config: TransformerConfig, group: LayerGroup, *, rngs: nnx.Rngs) -> Unit:
    """Creates a unit whose parameters are stacked over its repeats, each drawn with its own key."""

    @nnx.split_rngs(splits=group.repeats)
    @functools.partial(nnx.vmap, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def create(rngs: nnx.Rngs) -> Unit:
        return Unit(config, group.unit, rngs=rngs)

    return create(rngs)


def _scan[C, X, Y](body: Callable[[C, X], tuple[C, Y]], carry: C, inputs: X, length: int) -> tuple[C, Y]:
    """Scans over stacked inputs; where there is only one, without a loop, whose stacks XLA would copy to and from."""
    if length > 1:
        return jax.lax.scan(body, carry, inputs)
    carry, outputs = backward_apart(body)(carry, jax.tree.map(lambda a: a.squeeze(0), inputs))
    return carry, jax.tree.map(lambda a: a[None], outputs)


def _remat(layer: Layer, config: TransformerConfig) -> Callable[..., Any]:
    """Recomputes in the backward pass what `config.remat` says not to keep."""
    if config.remat == "none":
        return layer
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if config.remat == "dots" else None
    # As in `recompute`, there is no common subexpression to protect.
    return jax.checkpoint(layer.__call__, policy=policy, prevent_cse=False)


def _no_moe_layers(config: TransformerConfig) -> MoEAux:
    """Returns the stacked losses and statistics of no layers at all."""
    return MoEAux(
        load_balancing_loss=jnp.zeros(0),
        router_z_loss=jnp.zeros(0),
        expert_load=jnp.zeros((0, config.num_experts)),
        mean_score=jnp.zeros((0, config.num_experts)),
        experts_per_token=jnp.zeros(0),
        dropped_fraction=jnp.zeros(0),
    )
