import math
from collections import Counter

import numpy as np
import pytest

from train.baselines import (
    bigram_bits_per_byte,
    interpolated_ngram_bits_per_byte,
    ngram_probabilities,
    xz_bits_per_byte,
)


def words(size, seed=0):
    rng = np.random.default_rng(seed)
    return b" ".join(rng.choice([b"expert", b"token", b"router", b"gate"], size))


def plain_probability(train, context, byte, order):
    """The formula of the docstring, by recursion on the context."""
    if order == 0:
        return 1 / 256
    context = context[len(context) - order + 1 :] if order > 1 else b""
    shorter = plain_probability(train, context[1:], byte, min(order - 1, len(context)))
    n = len(context) + 1
    counts = Counter(train[i : i + n] for i in range(len(train) - n + 1))
    after = {gram: count for gram, count in counts.items() if gram[:-1] == context}
    if not after:
        return shorter
    return (after.get(context + bytes([byte]), 0) + len(after) * shorter) / (sum(after.values()) + len(after))


@pytest.mark.parametrize("order", [1, 2, 4, 6])
def test_probabilities_follow_the_formula(order):
    train, text = words(12), words(4, seed=1) + b"unseen\xff"
    expected = [
        plain_probability(train, text[max(0, i - order + 1) : i], text[i], min(order, i + 1)) for i in range(len(text))
    ]
    np.testing.assert_allclose(ngram_probabilities(train, text, order), expected, rtol=1e-12)


@pytest.mark.parametrize("context", [b"", b"r", b"oke", b"\xff\xfe\xfd"])
def test_probabilities_after_a_context_sum_to_one(context):
    total = sum(ngram_probabilities(words(30), context + bytes([byte]), 4)[-1] for byte in range(256))
    assert total == pytest.approx(1, rel=1e-12)


def test_a_bigram_knows_pairs_and_no_more():
    assert bigram_bits_per_byte(b"ab" * 5000, b"ab" * 500) < 0.05
    # What follows an "a" is a coin's toss, what follows two bytes is not.
    train, validation = b"aab" * 5000, b"aab" * 500
    assert bigram_bits_per_byte(train, validation) == pytest.approx(2 / 3, abs=0.01)
    assert interpolated_ngram_bits_per_byte(train, validation, order=3) < 0.05


def test_longer_contexts_predict_text_better_and_noise_costs_its_entropy():
    train, validation = words(3000), words(300, seed=1)
    bits = [interpolated_ngram_bits_per_byte(train, validation, order) for order in (1, 2, 4)]
    assert bits[0] > bits[1] > bits[2]
    # Two bits choose each word of 5.75 bytes, its blank included, on average: no model can do better.
    assert 2 / 6.75 < bits[2] < 1
    rng = np.random.default_rng(0)
    noise, other = (rng.integers(0, 256, 20000, dtype=np.uint8).tobytes() for _ in range(2))
    assert 8 < interpolated_ngram_bits_per_byte(noise, other) < 9


def test_without_training_text_every_byte_costs_eight_bits():
    assert interpolated_ngram_bits_per_byte(b"", b"anything") == 8


def test_xz_counts_the_whole_file():
    noise = np.random.default_rng(0).integers(0, 256, 10000, dtype=np.uint8).tobytes()
    assert 8 < xz_bits_per_byte(noise) < 8.2
    assert xz_bits_per_byte(b"expert " * 10000) < 0.05
    # The container alone is 60 bytes or so.
    assert xz_bits_per_byte(b"x") > 8 * 50


def test_an_order_out_of_range_and_an_empty_validation_text_are_refused():
    for order in (0, 9):
        with pytest.raises(ValueError, match=f"order must be between 1 and 8, got {order}"):
            interpolated_ngram_bits_per_byte(b"abc", b"abc", order)
    with pytest.raises(ValueError, match="validation must hold at least one byte"):
        bigram_bits_per_byte(b"abc", b"")
    with pytest.raises(ValueError, match="validation must hold at least one byte"):
        xz_bits_per_byte(b"")
    assert math.isfinite(bigram_bits_per_byte(b"a", b"b"))
