"""Hash routing: a table from token ids to experts."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import checkify
from jax.sharding import AxisType

import jmoe
from jmoe.routers import HashRouter, balanced_hash_table, random_hash_table, route_hash


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


@pytest.mark.parametrize("axis_type", [None, AxisType.Auto, AxisType.Explicit])
def test_the_layer_passes_token_ids_to_the_router(axis_type, relative_error):
    table = jnp.array([[0, 1], [2, 1], [3, 0]])
    moe = jmoe.MoE(8, 10, 4, activation="relu", router=HashRouter(table), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((4, 6, 8)), jnp.float32)
    ids, mask = jnp.asarray(rng.integers(0, 3, (4, 6))), jnp.asarray(rng.random((4, 6)) < 0.8)
    mesh = jax.make_mesh((2, 2), ("data", "expert"), axis_types=(axis_type,) * 2) if axis_type else None
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        y, aux = nnx.jit(lambda moe, x: moe(x, mask=mask, token_ids=ids))(moe, x)
    expected, count = np.zeros((4, 6, 8)), np.zeros(4)
    w_up, w_down = np.asarray(moe.w_up[...]), np.asarray(moe.w_down[...])
    for place in map(tuple, np.argwhere(mask)):
        for e in np.asarray(table[ids[place]]):
            expected[place] += np.maximum(np.asarray(x[place]) @ w_up[e], 0) @ w_down[e] / 2
            count[e] += 1
    assert relative_error(y, expected) < 2e-6
    np.testing.assert_allclose(aux.expert_load, count / count.sum(), rtol=1e-6)
    assert aux.load_balancing_loss == aux.router_z_loss == 0


def test_an_expert_of_the_table_that_the_layer_lacks_is_absent_and_debug_checks_refuse_it(relative_error):
    moe = jmoe.MoE(
        8, 10, 2, activation="relu", router=HashRouter(jnp.array([[0, 2], [5, 3], [-1, 1]])), rngs=nnx.Rngs(0)
    )
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8)), jnp.float32)
    apply = nnx.jit(lambda moe, x, ids: moe(x, token_ids=ids))
    y, aux = apply(moe, x, jnp.arange(3))
    expected = [np.maximum(x[t] @ moe.w_up[e], 0) @ moe.w_down[e] / 2 for t, e in ((0, 0), (2, 1))]
    assert relative_error(y, [expected[0], np.zeros(8), expected[1]]) < 2e-6
    assert aux.expert_load.tolist() == [0.5, 0.5]
    np.testing.assert_allclose(aux.experts_per_token, 2 / 3, rtol=1e-6)

    with jmoe.debug_checks():
        error, _ = checkify.checkify(lambda ids: moe(x, token_ids=ids))(jnp.arange(3))
    assert "expert_index" in (error.get() or "")


def test_the_table_is_no_parameter_and_the_linen_layer_takes_it_too():
    router = HashRouter(jnp.array([[0], [1]]))
    assert not jax.tree.leaves(nnx.state(router, nnx.Param))
    layer, x, ids = jmoe.linen.MoE(8, 10, 2, router=router), jnp.ones((3, 8)), jnp.array([1, 1, 0])
    variables = layer.init(jax.random.key(0), x, token_ids=ids)
    assert set(variables["params"]) == {"w_up", "w_down"}
    aux = jax.jit(layer.apply)(variables, x, token_ids=ids)[1]
    np.testing.assert_allclose(aux.expert_load, [1 / 3, 2 / 3], rtol=1e-6)


@pytest.mark.usefixtures("without_annotation_checks")
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "token_ids is missing: the router needs it, so call the layer with it"),
        (
            {"token_ids": jnp.zeros(3, int), "ids": jnp.zeros(3, int)},
            "ids is given, and the router has no such argument",
        ),
        ({"token_ids": jnp.zeros(3)}, r"token_ids is float32\[3\]; it must be int"),
        ({"token_ids": jnp.zeros(4, int)}, r"token_ids is \[4\]; it must be \[3, '...'\]"),
    ],
)
def test_other_inputs_than_the_router_takes_raise(inputs, message):
    moe = jmoe.MoE(8, 10, 2, router=HashRouter(jnp.array([[0], [1]])), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        moe(jnp.ones((3, 8)), **inputs)


@pytest.mark.usefixtures("without_annotation_checks")
@pytest.mark.parametrize("table", [jnp.zeros(9, int), jnp.zeros((9, 1))])
def test_a_table_that_is_none_raises(table):
    with pytest.raises(ValueError, match=r"table is .*; it must be int\[V, K\]"):
        HashRouter(table)


def test_more_experts_than_there_are_raise():
    with pytest.raises(ValueError, match="k is 4; it must be between 1 and the number of experts, 3"):
        random_hash_table(jax.random.key(0), 10, 3, 4)
