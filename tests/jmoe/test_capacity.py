"""The token-dropping MoE against a queue for each expert, filled in NumPy an assignment at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import jmoe
from jmoe.capacity import expert_capacity

limit = jax.jit(jmoe.limit_to_capacity, static_argnums=(1, 2))


def random_index(tokens, experts, top_k, seed=0):
    """Experts that are not chosen equally often, each at most once by a token."""
    rng = np.random.default_rng([seed, tokens, experts, top_k])
    score = rng.random((tokens, experts)) + np.linspace(0, 0.7, experts)
    return np.argsort(-score, axis=1)[:, :top_k].astype(np.int32)


def queue_up(index, experts, capacity):
    """Serves all first choices in the order of the tokens, then all second ones, and so on."""
    room, served = np.full(experts, capacity), np.full(index.shape, -1)
    for k in range(index.shape[1]):
        for t in range(index.shape[0]):
            e = index[t, k]
            if 0 <= e < experts and room[e] > 0:
                room[e] -= 1
                served[t, k] = e
    return served


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "capacity"),
    [(40, 6, 2, 11), (40, 6, 1, 5), (33, 4, 4, 20), (64, 8, 3, 0), (1, 5, 5, 1), (17, 3, 2, 1000), (0, 3, 2, 1)],
)
def test_experts_serve_first_choices_first_and_tokens_in_order(tokens, experts, top_k, capacity):
    index = random_index(tokens, experts, top_k)
    index[np.random.default_rng(1).random(index.shape) < 0.1] = -1
    weight = jnp.asarray(np.random.default_rng(2).random(index.shape), jnp.float32)
    kept = limit(jmoe.Routing(jnp.asarray(index), weight), experts, capacity)
    served = queue_up(index, experts, capacity)
    np.testing.assert_array_equal(kept.expert_index, served)
    np.testing.assert_array_equal(kept.weight, np.where(served >= 0, weight, 0))


@pytest.mark.parametrize("expert", [0, 2])
def test_where_all_tokens_want_one_expert_the_first_ones_get_it(expert):
    kept = limit(jmoe.Routing(jnp.full((9, 1), expert), jnp.ones((9, 1))), 3, 4)
    assert kept.expert_index.ravel().tolist() == [expert] * 4 + [-1] * 5


def test_absent_assignments_take_no_place_whatever_index_marks_them():
    index = jnp.array([[-1], [7], [3], [-(2**31)], [1], [1], [1]])
    kept = limit(jmoe.Routing(index, jnp.ones((7, 1))), 3, 2)
    np.testing.assert_array_equal(jnp.where(kept.expert_index == 1, 1, 0).ravel(), [0, 0, 0, 0, 1, 1, 0])


def test_a_flat_list_is_served_in_its_order():
    index = random_index(20, 4, 2).ravel()
    tokens = jnp.asarray(np.random.default_rng(3).permutation(40) // 2)
    kept = limit(jmoe.Assignments(tokens, jnp.asarray(index), jnp.ones(40)), 4, 6)
    np.testing.assert_array_equal(kept.expert_index, queue_up(index[:, None], 4, 6)[:, 0])
    np.testing.assert_array_equal(kept.token_index, tokens)


@pytest.mark.parametrize(
    ("factor", "tokens", "top_k", "experts", "capacity"),
    [(1.0, 64, 2, 8, 16), (1.25, 64, 2, 8, 20), (1.0, 10, 1, 3, 4), (1.1, 10, 1, 1, 11), (0.5, 1, 1, 8, 1)],
)
def test_the_capacity_is_a_share_of_perfect_balance_rounded_up(factor, tokens, top_k, experts, capacity):
    assert expert_capacity(factor, tokens * top_k, experts) == capacity


def tokens(*batch, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((*batch, 12)), jnp.float32)


def make_layer(**options):
    moe = jmoe.MoE(12, 20, 4, 2, rngs=nnx.Rngs(0), **options)
    # Experts that are not wanted equally.
    moe.router.kernel[...] = 2 * moe.router.kernel[...]
    return moe


@nnx.jit
def apply(moe, x, mask=None):
    return moe(x, mask=mask)


def test_the_layer_computes_what_has_room_and_tells_the_dropped_share(relative_error):
    x, factor = tokens(30), 0.6
    moe = make_layer(capacity_factor=factor)
    y, aux = apply(moe, x)
    routing = jmoe.route_top_k(x @ moe.router.kernel[...], 2)
    served = queue_up(np.asarray(routing.expert_index), 4, 9)  # ceil(0.6 * 30 * 2 / 4)
    expected = np.zeros((30, 12))
    w_up, w_down = (np.asarray(p[...], np.float64) for p in (moe.w_up, moe.w_down))
    for (t, k), e in np.ndenumerate(served):
        if e >= 0:
            gate, up = np.split(np.asarray(x[t], np.float64) @ w_up[e], 2)
            expected[t] += float(routing.weight[t, k]) * (gate / (1 + np.exp(-gate)) * up) @ w_down[e]
    assert (served < 0).any()
    assert relative_error(y, expected) < 2e-6
    np.testing.assert_allclose(aux.dropped_fraction, np.mean(served < 0), rtol=1e-6)
    _, dropless = apply(make_layer(), x)
    np.testing.assert_array_equal(aux.expert_load, dropless.expert_load)
    np.testing.assert_array_equal(aux.load_balancing_loss, dropless.load_balancing_loss)


@pytest.mark.parametrize("factor", [None, 0.0, 4.0])
def test_without_a_factor_or_with_room_for_all_nothing_is_dropped(factor):
    y, aux = apply(make_layer(capacity_factor=factor), tokens(30))
    np.testing.assert_array_equal(y, apply(make_layer(), tokens(30))[0])
    assert aux.dropped_fraction == 0


def test_masked_tokens_take_no_place_and_are_not_counted_as_dropped():
    x, mask = tokens(30), jnp.arange(30) >= 20
    y, aux = apply(make_layer(capacity_factor=1.0), jnp.where(mask[:, None], x, jnp.nan), mask)
    # Places for the assignments of 30 tokens, which the 10 do not fill.
    np.testing.assert_array_equal(y[20:], apply(make_layer(), x[20:])[0])
    assert aux.dropped_fraction == 0
    assert np.all(y[:20] == 0)


def test_a_dropped_assignment_gets_no_gradient():
    x = tokens(30)

    def loss(moe, x):
        return jnp.sum(moe(x)[0] ** 2)

    moe = make_layer(capacity_factor=0.25)
    dx = nnx.jit(nnx.grad(loss, argnums=1))(moe, x)
    index = np.asarray(jmoe.route_top_k(x @ moe.router.kernel[...], 2).expert_index)
    nobody = (queue_up(index, 4, 4) < 0).all(axis=1)
    assert nobody.any()
    assert np.all(dx[nobody] == 0)
    assert np.all(np.any(dx[~nobody] != 0, axis=1))


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        (AxisType.Auto, jax.P(("data", "expert"))),
        (AxisType.Explicit, jax.P(("data", "expert"))),
        (AxisType.Explicit, jax.P(None, "data")),
        (AxisType.Explicit, jax.P("data", "expert")),
    ],
    ids=["auto", "sequences", "parts-of-sequences-only", "parts-of-sequences"],
)
def test_a_mesh_drops_what_one_device_drops(kind, spec, relative_error):
    x = tokens(16, 4)
    mask = jnp.ones((16, 4), bool).at[3:6].set(False)
    expected_y, expected = apply(make_layer(capacity_factor=0.7), x, mask)
    assert expected.dropped_fraction > 0.1
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        moe = make_layer(capacity_factor=0.7)
        x, mask = (jax.device_put(a, jax.NamedSharding(mesh, spec)) for a in (x, mask))
        y, aux = apply(moe, x, mask)
    assert relative_error(y, expected_y) < 2e-6
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), aux, expected)


@pytest.mark.usefixtures("without_annotation_checks")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_layer(capacity_factor=-1.0), "capacity_factor is -1.0; it must be positive and finite"),
        (lambda: make_layer(capacity_factor=float("inf")), "capacity_factor is inf"),
        (lambda: jmoe.limit_to_capacity(_routing(), 0, 1), "num_experts is 0; it must be at least 1"),
        (lambda: jmoe.limit_to_capacity(_routing(), 2, -1), "capacity is -1; it must be 0 or more"),
        (
            lambda: jmoe.limit_to_capacity(dataclasses.replace(_routing(), weight=jnp.ones(2)), 2, 1),
            "routing.weight is",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def _routing():
    return jmoe.Routing(jnp.zeros((2, 1), int), jnp.ones((2, 1)))
