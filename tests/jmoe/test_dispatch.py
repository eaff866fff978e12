"""Dispatch: the assignments sorted by expert."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe import dispatch


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 1, 1), (7, 3, 2), (100, 8, 8), (64, 64, 1)])
def test_rows_are_a_stable_sort_by_expert_with_absent_assignments_last(tokens, experts, top_k):
    index = np.random.default_rng(tokens).integers(-1, experts + 1, (tokens, top_k))
    routing = jmoe.Routing(jnp.asarray(index), jnp.ones((tokens, top_k)))
    sorted_rows = jax.jit(jmoe.make_dispatch, static_argnums=1)(routing, experts)

    in_order = [(t, k) for t in range(tokens) for k in range(top_k)]
    key = {(t, k): index[t, k] if 0 <= index[t, k] < experts else experts for t, k in in_order}
    rows = sorted(in_order, key=key.__getitem__)
    assert sorted_rows.token_index.tolist() == [t for t, _ in rows]
    assert sorted_rows.slot.tolist() == [k for _, k in rows]
    assert sorted_rows.expert_index.tolist() == [key[row] for row in rows]
    assert sorted_rows.group_sizes.tolist() == [sum(key[row] == e for row in rows) for e in range(experts)]
    assert [int(sorted_rows.position[row]) for row in rows] == list(range(tokens * top_k))


def test_few_keys_are_sorted_by_comparing_as_by_a_sort():
    keys = jnp.asarray(np.random.default_rng(0).integers(0, 5, (100, 3)), jnp.int32)
    jax.tree.map(np.testing.assert_array_equal, dispatch._sort_by_comparing(keys), dispatch._sort(keys))


def test_a_number_that_32_bits_do_not_hold_is_absent_and_not_another_expert():
    with jax.enable_x64(True):
        routing = jmoe.Routing(jnp.array([[2**32 + 1, 1]]), jnp.ones((1, 2)))
        for sorted_rows in (jmoe.make_dispatch(routing, 4), dispatch.dispatch_unsorted(routing, 4)):
            present = sorted_rows.position < sorted_rows.group_sizes.sum()
            assert present.tolist() == [[False, True]]


def test_flat_assignments_are_sorted_the_same_way():
    flat = jmoe.Assignments(jnp.array([4, 0, 4, 2]), jnp.array([1, 0, -1, 0]), jnp.ones(4))
    sorted_rows = jmoe.make_dispatch(flat, 2)
    assert sorted_rows.token_index.tolist() == [0, 2, 4, 4]
    assert sorted_rows.slot.tolist() == [1, 3, 0, 2]
    assert sorted_rows.position.tolist() == [2, 0, 3, 1]
    assert sorted_rows.group_sizes.tolist() == [2, 1]


def test_dispatch_is_batched_by_vmap():
    index = jnp.asarray(np.random.default_rng(0).integers(0, 4, (3, 10, 2)))
    batched = jax.vmap(lambda index: jmoe.make_dispatch(jmoe.Routing(index, jnp.ones((10, 2))), 4))(index)
    for i in range(3):
        single = jmoe.make_dispatch(jmoe.Routing(index[i], jnp.ones((10, 2))), 4)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda a, i=i: a[i], batched), single)


@pytest.mark.usefixtures("without_annotation_checks")
@pytest.mark.parametrize(
    ("routing", "experts", "message"),
    [
        (
            jmoe.Routing(jnp.zeros((2, 1), int), jnp.ones((2, 1))),
            0,
            "num_experts is 0; it must be at least 1",
        ),
        (jmoe.Routing(jnp.zeros((2, 1), int), jnp.ones(2)), 4, r"routing.weight is float32\[2\]"),
        (
            jmoe.Assignments(jnp.zeros(3, int), jnp.zeros(2, int), jnp.ones(2)),
            4,
            r"routing.token_index is int32\[3\]",
        ),
    ],
    ids=["experts", "weight", "token_index"],
)
def test_a_bad_argument_is_a_value_error_that_names_it(routing, experts, message):
    with pytest.raises(ValueError, match=message):
        jmoe.make_dispatch(routing, experts)
