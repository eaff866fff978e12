"""The product with the vocabulary's matrix, and the cross entropy over it, with their own derivatives."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


@jax.custom_vjp
def vocabulary_matmul(hidden: Float[Array, "B S D"], embedding: Float[Array, "V D"]) -> Float[Array, "B S V"]:
    """Computes `hidden @ embedding.T` in float32 from operands in the dtype of `hidden`.

    Its gradients multiply in the dtype of `hidden` too, where the derivative of a mixed-precision product
    would run in float32, and the gradient of the embedding is accumulated in the embedding's own dtype.
    """
    return _multiply(hidden, embedding.astype(hidden.dtype))


def _vocabulary_matmul_forward(hidden: Array, embedding: Array) -> tuple[Array, tuple[Array, Array]]:
    return vocabulary_matmul(hidden, embedding), (hidden, embedding)


def _vocabulary_matmul_backward(saved: tuple[Array, Array], logits_grad: Array) -> tuple[Array, Array]:
    hidden, embedding = saved
    logits_grad = logits_grad.astype(hidden.dtype)
    return _multiply_backward(hidden, embedding.astype(hidden.dtype), logits_grad, embedding.dtype)


vocabulary_matmul.defvjp(_vocabulary_matmul_forward, _vocabulary_matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def mean_cross_entropy(
    hidden: Float[Array, "B S D"],
    embedding: Float[Array, "V D"],
    targets: Int[Array, "B S"],
    mask: Bool[Array, "B S"],
    chunk_size: int,
) -> Float[Array, ""]:
    """Computes the mean cross entropy between `softmax(hidden @ embedding.T)` and the counted targets, in nats.

    The logits exist for `chunk_size` tokens at a time, and are computed once: where the function is
    differentiated, its forward pass turns those of a chunk into gradients before it goes on to the next.
    Softmax and sums are in float32 (float64 for float64), the matrix products as in `vocabulary_matmul`; the
    gradient of the embedding adds up over the chunks in the embedding's dtype, in float32 for master weights.
    Differentiable once, in reverse mode.

    Args:
        hidden: The model's output for each token.
        embedding: A row for each token id.
        targets: The id each token should predict; any value where it does not count.
        mask: Which targets count; without any the result is 0.
        chunk_size: Tokens of a chunk, at least one of each sequence. Chunks run along the sequence, so that a
            batch sharded over devices stays so.
    """
    matrix = embedding.astype(hidden.dtype)  # [V, D]

    def add_chunk(total, chunk):
        hidden, targets, mask = chunk
        cross_entropy, _ = _cross_entropy(_multiply(hidden, matrix), targets)  # [B, chunk]
        return total + jnp.sum(cross_entropy, where=mask), None

    zero = jnp.zeros((), _sum_dtype(hidden))
    total, _ = lax.scan(add_chunk, zero, _in_chunks(hidden, targets, mask, chunk_size))
    return total / jnp.maximum(jnp.sum(mask), 1)


def _mean_cross_entropy_forward(
    hidden: Array, embedding: Array, targets: Array, mask: Array, chunk_size: int
) -> tuple[Array, tuple[Array, Array, Array]]:
    """Computes the mean, and its gradients up to a factor: they are those of `2**exponent * mean`."""
    # The mean divides by mantissa * 2**exponent. Divided here by the mantissa alone, 0.5 to 1, a logit's gradient
    # lies between -2 and 2 however many targets there are, so that float16 holds it. What is left for the backward
    # pass is a power of two, which rounds nothing, times the cotangent: 1, or the scale of the loss.
    num_targets = jnp.maximum(jnp.sum(mask), 1)
    mantissa, exponent = jnp.frexp(num_targets.astype(_sum_dtype(hidden)))
    weight = 1 / mantissa
    matrix = embedding.astype(hidden.dtype)  # [V, D]
    ids = jnp.arange(len(matrix))

    def add_chunk(sums, chunk):
        total, embedding_grad = sums
        hidden, targets, mask = chunk
        logits = _multiply(hidden, matrix)  # [B, chunk, V]
        cross_entropy, (largest, exp_sum) = _cross_entropy(logits, targets)  # [B, chunk]

        softmax = jnp.exp(logits - largest[:, :, None]) * (weight / exp_sum)[:, :, None]
        one_hot = jnp.where(targets[:, :, None] == ids, weight, 0)
        logits_grad = jnp.where(mask[:, :, None], softmax - one_hot, 0).astype(hidden.dtype)  # [B, chunk, V]
        # Two products read it: without the barrier XLA may compute it for each of them.
        logits_grad = lax.optimization_barrier(logits_grad)
        hidden_grad, chunk_grad = _multiply_backward(hidden, matrix, logits_grad, embedding.dtype)
        return (total + jnp.sum(cross_entropy, where=mask), embedding_grad + chunk_grad), hidden_grad

    zeros = jnp.zeros((), mantissa.dtype), jnp.zeros_like(embedding)
    (total, embedding_grad), hidden_grad = lax.scan(add_chunk, zeros, _in_chunks(hidden, targets, mask, chunk_size))
    hidden_grad = jnp.moveaxis(hidden_grad, 0, 1).reshape(len(hidden), -1, hidden.shape[2])[:, : hidden.shape[1]]
    return total / num_targets, (hidden_grad, embedding_grad, exponent)


def _mean_cross_entropy_backward(
    _: int, saved: tuple[Array, Array, Array], cotangent: Array
) -> tuple[Array, Array, None, None]:
    hidden_grad, embedding_grad, exponent = saved
    scale = jnp.ldexp(cotangent, -exponent)  # float32, and so are the products before they are rounded
    hidden_grad = (scale * hidden_grad).astype(hidden_grad.dtype)
    embedding_grad = (scale * embedding_grad).astype(embedding_grad.dtype)
    return hidden_grad, embedding_grad, None, None


mean_cross_entropy.defvjp(_mean_cross_entropy_forward, _mean_cross_entropy_backward)


def _multiply(hidden: Float[Array, "B S D"], matrix: Float[Array, "V D"]) -> Float[Array, "B S V"]:
    return jnp.einsum("bsd,vd->bsv", hidden, matrix, preferred_element_type=_sum_dtype(hidden))


def _multiply_backward(
    hidden: Float[Array, "B S D"],
    matrix: Float[Array, "V D"],
    logits_grad: Float[Array, "B S V"],
    embedding_dtype: jnp.dtype,
) -> tuple[Float[Array, "B S D"], Float[Array, "V D"]]:
    """Computes the gradients of `hidden`, in its dtype, and of the embedding; all operands have that dtype."""
    hidden_grad = jnp.einsum("bsv,vd->bsd", logits_grad, matrix)
    embedding_grad = jnp.einsum("bsv,bsd->vd", logits_grad, hidden, preferred_element_type=embedding_dtype)
    return hidden_grad, embedding_grad


def _sum_dtype(hidden: Array) -> jnp.dtype:
    return jnp.promote_types(hidden.dtype, jnp.float32)


def _in_chunks(
    hidden: Float[Array, "B S D"], targets: Int[Array, "B S"], mask: Bool[Array, "B S"], chunk_size: int
) -> tuple[Float[Array, "chunks B chunk D"], Int[Array, "chunks B chunk"], Bool[Array, "chunks B chunk"]]:
    """Cuts the sequences; the last chunk is filled up with tokens that do not count."""
    B, S = targets.shape
    chunk = min(max(chunk_size // B, 1), S)
    num_chunks = -(-S // chunk)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, num_chunks * chunk - S)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, num_chunks, chunk, *x.shape[2:]), 1, 0)  # [chunks, B, chunk, ...]

    return cut(hidden), cut(jnp.where(mask, targets, 0)), cut(mask)


def _cross_entropy(
    logits: Float[Array, "B S V"], targets: Int[Array, "B S"]
) -> tuple[Float[Array, "B S"], tuple[Float[Array, "B S"], Float[Array, "B S"]]]:
    """Computes the cross entropy of each token, its largest logit, and the sum of `exp(logits - largest)`."""
    largest, exp_sum = _max_and_exp_sum(logits)
    target_logits = jnp.take_along_axis(logits, targets[:, :, None], axis=2)[:, :, 0]
    return jnp.log(exp_sum) - (target_logits - largest), (largest, exp_sum)


def _max_and_exp_sum(logits: Float[Array, "B S V"]) -> tuple[Float[Array, "B S"], Float[Array, "B S"]]:
    """Computes the maximum and `sum(exp(logits - maximum))` of the last axis in one pass (arXiv 1805.02867)."""

    def merge(a, b):
        (max_a, sum_a), (max_b, sum_b) = a, b
        decay = lax.exp(-lax.abs(max_a - max_b))  # of the sum that belongs to the lesser maximum
        exp_sum = lax.select(max_a > max_b, sum_a + decay * sum_b, decay * sum_a + sum_b)
        return lax.max(max_a, max_b), exp_sum

    nothing = jnp.finfo(logits.dtype).min.astype(logits.dtype), jnp.zeros((), logits.dtype)
    return lax.reduce((logits, jnp.ones_like(logits)), nothing, merge, (2,))
