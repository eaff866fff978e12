"""Grouped-query attention (arXiv 2305.13245) with rotary position embedding (arXiv 2104.09864)."""

import dataclasses
import functools
from typing import Literal, NamedTuple, get_args, no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jmoe.debug import check
from jmoe.models.config import AttentionImplementation, TransformerConfig
from jmoe.models.layers import Projection, RMSNorm, recompute


class Rotation(NamedTuple):
    """The rotation of each pair of a head's features at each position: its cosine and sine."""

    cos: Float[Array, "B S 1 half"]
    sin: Float[Array, "B S 1 half"]


def rope_rotation(positions: Int[Array, "B S"], head_dim: int, theta: float) -> Rotation:
    """Computes RoPE's rotations: pair i at position p turns by `p * theta ** (-2 i / head_dim)` radians."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)  # [h / 2]
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency  # [B, S, 1, h / 2]
    return Rotation(jnp.cos(angle), jnp.sin(angle))


def rotate(x: Float[Array, "B S N h"], rotation: Rotation) -> Float[Array, "B S N h"]:
    """Applies RoPE in float32; features i and i + h / 2 form a pair, as in Hugging Face's models."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # [B, S, N, h / 2] each
    rotated = [first * rotation.cos - second * rotation.sin, second * rotation.cos + first * rotation.sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)  # [B, S, N, h]


@no_type_check  # JAX also builds pytrees of things that are no arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The keys and values of the tokens seen so far: slot p of C holds those of position p.

    Attributes:
        key: Rotated keys, [B, C, num_kv_heads, head_dim].
        value: Values, of the same shape.
    """

    key: Float[Array, "*layers B C N h"]
    value: Float[Array, "*layers B C N h"]

    def write(
        self, positions: Int[Array, "B S"], key: Float[Array, "B S N h"], value: Float[Array, "B S N h"]
    ) -> "KVCache":
        """Returns the cache with these keys and values at their positions."""
        at = jnp.arange(positions.shape[0])[:, None], positions  # [B, 1], [B, S]
        return KVCache(self.key.at[at].set(key), self.value.at[at].set(value))


class Attention(nnx.Module):
    """Causal grouped-query attention with optional QK-norm.

    Args:
        config: The model's configuration.
        rngs: Keys for the parameters.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        D, h = config.embed_dim, config.head_dim
        query_dim, kv_dim = config.num_heads * h, config.num_kv_heads * h
        self.query = Projection(D, query_dim, ("embed", "heads"), config, rngs=rngs)
        self.key = Projection(D, kv_dim, ("embed", "kv_heads"), config, rngs=rngs)
        self.value = Projection(D, kv_dim, ("embed", "kv_heads"), config, rngs=rngs)
        self.out = Projection(query_dim, D, ("heads", "embed"), config, rngs=rngs)
        if config.qk_norm != "none":
            self.query_norm = RMSNorm(h if config.qk_norm == "head" else query_dim, config, rngs=rngs)
            self.key_norm = RMSNorm(h if config.qk_norm == "head" else kv_dim, config, rngs=rngs)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        rotation: Rotation,
        *,
        segment_ids: Int[Array, "B S"] | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "B S D"], KVCache | None]:
        """Lets each token attend to itself and to the earlier tokens of its segment.

        Args:
            x: Normalized activations.
            positions: The position of each token; only the cache reads them.
            rotation: The rotations of `positions`.
            segment_ids: Which document each token belongs to; None if each sequence is one document.
            cache: Where to write the keys and values. With S = 1 the token attends to the cache up to its
                position, whatever `segment_ids` say; longer sequences must start at position 0 and attend to
                themselves. All positions must be less than the cache's C (`jmoe.debug_checks()` reports others).

        Returns:
            The attention output, and the written cache (None without a cache).
        """
        B, S, _ = x.shape
        h, qk_norm = self.config.head_dim, self.config.qk_norm
        query, key, value = self.query(x), self.key(x), self.value(x)  # [B, S, N * h]
        if qk_norm == "full":
            query, key = self.query_norm(query), self.key_norm(key)
        query, key, value = (y.reshape(B, S, -1, h) for y in (query, key, value))  # [B, S, N, h]
        if qk_norm == "head":
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = rotate(query, rotation), rotate(key, rotation)

        implementation = attention_implementation(self.config.attention_implementation, self.config.dtype, h)
        y, cache = cached_attention(query, key, value, positions, segment_ids, cache, implementation)
        return self.out(y.reshape(B, S, -1)), cache  # [B, S, D]


def cached_attention(
    query: Float[Array, "B S N h"],
    key: Float[Array, "B S Nkv h"],
    value: Float[Array, "B S Nkv h"],
    positions: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"] | None,
    cache: KVCache | None,
    implementation: Literal["cudnn", "xla"],
) -> tuple[Float[Array, "B S N h"], KVCache | None]:
    """Computes `causal_attention`, or with a cache and S = 1 that of one token to all that the cache holds.

    The cache knows no segments, has no slot for positions from C on, and is not read for longer sequences, which
    therefore must start at position 0; `jmoe.debug_checks()` reports positions that break this.

    Returns:
        The heads' outputs, and the cache with these keys and values written to it (None without a cache).
    """
    if cache is not None:
        in_cache = (positions >= 0) & (positions < cache.key.shape[1])
        check(in_cache, "a position is outside [0, C), the slots of the cache")
        if query.shape[1] > 1:
            check(positions[:, 0] == 0, "a sequence of more than one token starts past position 0 of its cache")
        cache = cache.write(positions, key, value)
    if cache is not None and query.shape[1] == 1:
        # The scores of a single query are small: XLA everywhere.
        y = jax.nn.dot_product_attention(
            query, cache.key, cache.value, key_value_seq_lengths=positions[:, 0] + 1, implementation="xla"
        )
    else:
        y = causal_attention(query, key, value, segment_ids, implementation)
    return y, cache


def causal_attention(
    query: Float[Array, "B S N h"],
    key: Float[Array, "B S Nkv h"],
    value: Float[Array, "B S Nkv h"],
    segment_ids: Int[Array, "B S"] | None,
    implementation: Literal["cudnn", "xla"],
) -> Float[Array, "B S N h"]:
    """Computes softmax attention of each token to itself and the earlier tokens of its segment.

    The backward pass recomputes XLA's scores, [B, N, S, S], so that they exist for one layer at a time. cuDNN
    never materialises them, but segments cost it a bias of [B, 1, S, S].
    """
    mask = None
    if segment_ids is not None:
        mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]  # [B, 1, S, S]
    attend = functools.partial(jax.nn.dot_product_attention, mask=mask, is_causal=True, implementation=implementation)
    return attend(query, key, value) if implementation == "cudnn" else recompute(attend, query, key, value)


def check_attention_implementation(asked: AttentionImplementation) -> None:
    """Raises a ValueError if there is no such implementation."""
    if asked not in get_args(AttentionImplementation):
        names = ", ".join(map(repr, get_args(AttentionImplementation)))
        raise ValueError(f"attention_implementation is {asked!r}; it must be one of {names}.")


def attention_implementation(
    asked: AttentionImplementation, dtype: jax.typing.DTypeLike, head_dim: int
) -> Literal["cudnn", "xla"]:
    """Picks cuDNN's flash attention where it can run, XLA (which materialises the scores) elsewhere.

    Raises:
        ValueError: If the name is unknown, or cuDNN is asked for and cannot run here.
    """
    check_attention_implementation(asked)
    dtype = jnp.dtype(dtype)
    obstacles = {
        "the default backend is not an NVIDIA GPU": not _on_nvidia_gpu(),
        f"dtype is {dtype}, not bfloat16 or float16": dtype not in (jnp.bfloat16, jnp.float16),
        f"head_dim is {head_dim}, not a multiple of 8 up to 128": head_dim % 8 or head_dim > 128,
    }
    reasons = [reason for reason, holds in obstacles.items() if holds]
    match asked:
        case "cudnn" if reasons:
            raise ValueError(f"attention_implementation='cudnn' cannot run: {'; '.join(reasons)}. Use 'auto' or 'xla'.")
        case "xla":
            return "xla"
        case _:
            return "xla" if reasons else "cudnn"


def _on_nvidia_gpu() -> bool:
    return jax.default_backend() == "gpu" and "cuda" in jax.devices()[0].client.platform_version.lower()
