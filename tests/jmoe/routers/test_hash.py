"""Hash routing: a table from token ids to experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.routers import balanced_hash_table, random_hash_table, route_hash


def test_tokens_go_where_the_table_says_with_equal_weights():
    table = jnp.array([[0, 1], [2, 1], [3, 0]])
    routing = jax.jit(route_hash)(jnp.array([2, 1, 2, 0]), table)
    assert routing.expert_index.tolist() == [[3, 0], [2, 1], [3, 0], [0, 1]]
    assert routing.weight.tolist() == [[0.5, 0.5]] * 4


def test_unknown_ids_and_masked_tokens_are_absent():
    routing = route_hash(jnp.array([-1, 0, 3, 1]), jnp.array([[1], [2], [3]]), mask=jnp.array([1, 1, 1, 0], bool))
    assert routing.expert_index.tolist() == [[-1], [1], [-1], [-1]]


def test_a_random_table_names_different_experts_all_alike_often():
    table = np.asarray(random_hash_table(jax.random.key(0), 4000, 8, 3))
    assert table.shape == (4000, 3)
    assert all(len(set(row)) == 3 for row in table)
    assert np.abs(np.bincount(table.ravel(), minlength=8) / 1500 - 1).max() < 0.1
    np.testing.assert_array_equal(table, random_hash_table(jax.random.key(0), 4000, 8, 3))


def test_a_balanced_table_evens_a_skewed_vocabulary_out():
    counts = np.floor(1e6 / np.arange(1, 2001))
    table = np.asarray(balanced_hash_table(counts, 4))
    load = np.bincount(table[:, 0], weights=counts, minlength=4)
    assert load.max() / load.min() < 1.001


def test_a_balanced_table_gives_each_token_to_the_least_loaded_expert():
    counts = np.random.default_rng(0).integers(0, 50, 30)
    load, expected = [0, 0, 0], {}
    for token in sorted(range(30), key=lambda t: (-counts[t], t)):
        expected[token] = load.index(min(load))
        load[expected[token]] += counts[token]
    assert balanced_hash_table(counts, 3)[:, 0].tolist() == [expected[t] for t in range(30)]


def test_more_experts_than_there_are_raise():
    with pytest.raises(ValueError, match="k is 4; it must be between 1 and the number of experts, 3"):
        random_hash_table(jax.random.key(0), 10, 3, 4)
