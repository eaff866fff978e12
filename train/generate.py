"""Text from a trained model."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jmoe.models import Transformer, generate
from train.step import Params
from train.tokenizer import Tokenizer


def generate_text(
    graph: nnx.GraphDef[Transformer],
    params: Params,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    num_tokens: int,
    seed: int = 0,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
) -> str:
    """Continues `prompt` as the start of a document, up to its end or `num_tokens` tokens.

    Args:
        graph: The model without its parameters.
        params: Its parameters.
        tokenizer: The one it was trained with.
        prompt: Text to continue; may be empty.
        num_tokens: Most tokens to draw.
        seed: Seed of the draws.
        temperature: Divides the logits; 0 takes the likeliest token each time.
        top_k: Draw from the likeliest k tokens only.
        top_p: Draw from the likeliest tokens that together have this probability only.

    Returns:
        The continuation, without the prompt.
    """
    tokens = np.concatenate([[tokenizer.end_of_text], tokenizer.encode(prompt)]).astype(np.int32)
    drawn = generate(
        nnx.merge(graph, params),
        jnp.asarray(tokens)[None],
        num_tokens,
        key=jax.random.key(seed),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    continuation = np.asarray(drawn)[0, -num_tokens:]
    ends = np.flatnonzero(continuation == tokenizer.end_of_text)
    text = continuation[: ends[0]] if len(ends) else continuation
    # Models round their vocabulary up: a row beyond the tokenizer's ids is no text, however unlikely to be
    # drawn.
    return tokenizer.decode(text[text < tokenizer.vocab_size])
