"""What text costs without a neural network: n-gram models and xz, in bits per byte."""

import lzma

import numpy as np
from jaxtyping import Float64

_ALPHABET = 256


def ngram_probabilities(train: bytes, text: bytes, order: int) -> Float64[np.ndarray, " N"]:
    """Probability of each byte of `text` after those before it, by an interpolated n-gram model of `train`.

    The model mixes the n-grams of every length up to `order` by Witten and Bell's method: after a context h
    that was seen c(h) times before t(h) distinct bytes, with h' the context less its first byte,

        p(b | h) = (c(hb) + t(h) * p(b | h')) / (c(h) + t(h)),

    down to the uniform distribution over the 256 bytes; a context that was never seen leaves it to h'. The
    probabilities after any context sum to 1. The first bytes of `text` have the contexts there are.

    Args:
        train: Text that the counts are taken from.
        text: Text to predict.
        order: Longest n-gram counted, 1 to 8: `order` - 1 bytes of context.

    Raises:
        ValueError: If `order` is out of range.

    Source: Witten and Bell, "The zero-frequency problem" (1991), method C; interpolated as in Chen and
    Goodman, "An empirical study of smoothing techniques for language modeling" (1999).
    """
    if not 1 <= order <= 8:
        raise ValueError(f"order must be between 1 and 8, got {order}")
    probabilities = np.full(len(text), 1 / _ALPHABET)
    for n in range(1, order + 1):
        if len(train) < n or len(text) < n:
            break
        grams, gram_counts = np.unique(_ngrams(train, n), return_counts=True)
        contexts, first_gram = np.unique(grams >> 8, return_index=True)
        context_counts = np.add.reduceat(gram_counts, first_gram)
        context_types = np.diff(first_gram, append=len(grams))
        wanted = _ngrams(text, n)
        count = _lookup(grams, gram_counts, wanted)
        total = _lookup(contexts, context_counts, wanted >> 8)
        types = _lookup(contexts, context_types, wanted >> 8)
        shorter = probabilities[n - 1 :]
        np.divide(count + types * shorter, total + types, out=shorter, where=total > 0)
    return probabilities


def interpolated_ngram_bits_per_byte(train: bytes, validation: bytes, order: int = 4) -> float:
    """Mean of -log2 p over the bytes of `validation`, with p the `ngram_probabilities` after `train`.

    Args:
        train: Text that the model is fitted on.
        validation: Text to predict; not empty.
        order: Longest n-gram.
    """
    _require_text(validation)
    return float(-np.log2(ngram_probabilities(train, validation, order)).mean())


def bigram_bits_per_byte(train: bytes, validation: bytes) -> float:
    """Bits per byte of `validation`, each byte predicted from the one before: the n-grams of order 2."""
    return interpolated_ngram_bits_per_byte(train, validation, order=2)


def xz_bits_per_byte(validation: bytes) -> float:
    """Size of `validation` after `xz -9e`, in bits per byte of the text.

    What is compressed is the validation text alone: xz, unlike the n-gram models, has not seen the training
    text. The size is that of the whole file that `xz` writes, container included.
    """
    _require_text(validation)
    return 8 * len(lzma.compress(validation, preset=9 | lzma.PRESET_EXTREME)) / len(validation)


def _ngrams(text: bytes, n: int) -> np.ndarray:
    """The n-grams of `text`, each as one integer whose last byte is the lowest."""
    data = np.frombuffer(text, np.uint8).astype(np.uint64 if n > 4 else np.uint32)
    grams = data[: len(data) - n + 1].copy()
    for i in range(1, n):
        grams <<= 8
        grams |= data[i : len(data) - n + 1 + i]
    return grams


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`values` at the places of `wanted` in the sorted `keys`, 0 where there is none."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def _require_text(validation: bytes) -> None:
    if not validation:
        raise ValueError("validation must hold at least one byte, got none")
