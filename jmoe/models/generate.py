"""Sampling from a language model with a key-value cache."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jmoe.models.mesh import batch_spec, with_auto_axes
from jmoe.models.transformer import Transformer


def generate(
    model: Transformer,
    prompt: Int[Array, "B P"],
    num_tokens: int,
    *,
    key: Key[Array, ""],
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    prompt_lengths: Int[Array, " B"] | None = None,
) -> Int[Array, "B total"]:
    """Continues each prompt by `num_tokens` tokens, drawn one after another from the model.

    One compiled program: the prompt fills the cache in one pass, then a scan feeds back one token at a time.

    Args:
        model: The model. One with a `capacity_factor` drops tokens here too (T is the B tokens of a step): give its
            parameters to a model without, if that is not wanted.
        prompt: Token ids; at least one for each sequence.
        num_tokens: How many tokens to add.
        key: Random key; the same key gives the same tokens.
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_k: Draw from the `top_k` likeliest tokens only.
        top_p: Draw only from the smallest set of likeliest tokens whose probability reaches `top_p`
            (nucleus sampling, arXiv 1904.09751), after `temperature` and `top_k`.
        prompt_lengths: Tokens of each prompt, from 1 to P, where they differ; what follows them in `prompt`
            is ignored. None if all are P long.

    Returns:
        Each prompt followed directly by its continuation, `[B, P + num_tokens]`; with `prompt_lengths`, zeros
        fill the end of the shorter ones.

    Raises:
        ValueError: If an option is out of its range, or the result would be longer than
            `config.max_sequence_length`.
    """
    total = prompt.shape[1] + num_tokens
    if prompt.shape[1] < 1:
        raise ValueError("prompt must have at least one token, got none")
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
    if total > model.config.max_sequence_length:
        raise ValueError(
            "prompt and num_tokens must fit into max_sequence_length = "
            f"{model.config.max_sequence_length} tokens together, got {prompt.shape[1]} + {num_tokens}"
        )
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if top_k is not None and not 1 <= top_k <= model.config.vocab_size:
        raise ValueError(f"top_k must be from 1 to vocab_size = {model.config.vocab_size}, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if prompt_lengths is None:
        prompt_lengths = jnp.full(prompt.shape[0], prompt.shape[1], jnp.int32)
    return _generate(
        model,
        prompt,
        prompt_lengths,
        key,
        num_tokens=num_tokens,
        temperature=float(temperature),
        top_k=top_k,
        top_p=top_p,
    )


@functools.partial(jax.jit, static_argnames=("num_tokens", "temperature", "top_k", "top_p"))
def _generate(
    model: Transformer,
    prompt: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    key: Key[Array, ""],
    num_tokens: int,
    **sampling: Any,
) -> Int[Array, "B total"]:
    extend = functools.partial(_extend, num_tokens=num_tokens, sample=functools.partial(sample_token, **sampling))
    return with_auto_axes(extend, batch_spec(prompt))(model, prompt, prompt_lengths, key)


def _extend(
    model: Transformer,
    prompt: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    key: Key[Array, ""],
    *,
    num_tokens: int,
    sample: Callable[[Array, Array], Array],
) -> Int[Array, "B total"]:
    B, P = prompt.shape

    # What follows a short prompt fills later cache slots; the continuation overwrites each before reading it.
    cache = model.empty_cache(B, P + num_tokens)
    positions = jnp.broadcast_to(jnp.arange(P), (B, P))
    hidden, cache = model.hidden_with_cache(prompt, positions, cache)  # [B, P, D]
    last_hidden = jnp.take_along_axis(hidden, prompt_lengths[:, None, None] - 1, axis=1)  # [B, 1, D]

    def add_token(carry, key):
        last_hidden, positions, cache = carry
        logits = model.logits(last_hidden)[:, 0]  # [B, V]
        tokens = sample(logits, key)  # [B]
        last_hidden, cache = model.hidden_with_cache(tokens[:, None], positions[:, None], cache)  # [B, 1, D]
        return (last_hidden, positions + 1, cache), tokens

    keys = jax.random.split(key, num_tokens)
    _, continuation = jax.lax.scan(add_token, (last_hidden, prompt_lengths, cache), keys)  # [num_tokens, B]

    kept_prompt = jnp.where(positions < prompt_lengths[:, None], prompt, 0)  # [B, P]
    result = jnp.pad(kept_prompt, ((0, 0), (0, num_tokens)))  # [B, P + num_tokens]
    columns = prompt_lengths[:, None] + jnp.arange(num_tokens)  # [B, num_tokens]
    return result.at[jnp.arange(B)[:, None], columns].set(continuation.T)


def sample_token(
    logits: Float[Array, "B V"],
    key: Key[Array, ""],
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> Int[Array, " B"]:
    """Draws one token from each row of logits; the options are those of `generate`."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / temperature
    if top_k is not None:
        smallest_kept = jax.lax.top_k(logits, top_k)[0][:, -1:]  # [B, 1]
        logits = jnp.where(logits < smallest_kept, -jnp.inf, logits)
    if top_p is not None:
        descending = -jnp.sort(-logits, axis=-1)  # [B, V]
        probability = jax.nn.softmax(descending, axis=-1)
        likelier = jnp.cumsum(probability, axis=-1) - probability  # probability of all likelier tokens together
        smallest_kept = jnp.min(descending, axis=-1, where=likelier < top_p, initial=jnp.inf, keepdims=True)
        logits = jnp.where(logits < smallest_kept, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1)
