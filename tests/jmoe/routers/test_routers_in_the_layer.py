"""`jmoe.MoE(router=...)`: functions, modules and routings of a varying number of experts."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import jmoe
from jmoe import routers


def tokens(*batch, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((*batch, 8)), jnp.float32)


def make_moe(router=None, **options):
    return jmoe.MoE(8, 10, 6, None if router else 2, router=router, **options, rngs=nnx.Rngs(0))


apply = nnx.jit(lambda moe, x, mask=None: moe(x, mask=mask))


def test_a_function_of_ones_own_may_route(relative_error):
    def to_the_last(logits, mask=None):
        return jmoe.Routing(jnp.full((logits.shape[0], 1), 5), logits[:, 5:])

    moe, x = make_moe(to_the_last), tokens(3, 4)
    y, aux = apply(moe, x, jnp.arange(4) < jnp.array([[4], [2], [4]]))
    weight = x @ moe.router.kernel[...][:, 5:]
    gate, up = jnp.split(x @ moe.w_up[5], 2, axis=-1)
    expected = (weight * ((jax.nn.silu(gate) * up) @ moe.w_down[5])).at[1, 2:].set(0)
    assert relative_error(y, expected) < 2e-6
    assert aux.expert_load.tolist() == [0, 0, 0, 0, 0, 1]
    assert aux.dropped_fraction == 0
    assert aux.experts_per_token == 1


@pytest.mark.parametrize("mask", [None, jnp.arange(5) < 3], ids=["all", "masked"])
def test_a_function_needs_no_argument_for_what_it_does_not_use(mask):
    y, _ = apply(make_moe(lambda logits: jmoe.route_top_k(logits, 2)), tokens(5), mask)
    np.testing.assert_array_equal(y, apply(make_moe(), tokens(5), mask)[0])


def test_a_key_goes_only_to_a_function_that_names_it():
    rngs = nnx.Rngs(0)
    for route in (ROUTES["uniform"], lambda logits, **options: jmoe.route_top_k(logits, 2, **options)):
        moe = make_moe(route)
        np.testing.assert_array_equal(moe(tokens(5), rngs=rngs)[0], moe(tokens(5))[0])
    assert rngs.default.count[...] == 0


@pytest.mark.parametrize("masked", [False, True])
def test_assignments_of_tokens_that_are_not_there_count_nowhere(masked):
    def first_and_beyond(logits):
        token = jnp.array([5, 0, 1, -1, 7])
        return jmoe.Assignments(token, jnp.array([3, 2, 3, 4, 4]), jnp.ones(5))

    mask = jnp.ones(5, bool) if masked else None
    moe = make_moe(first_and_beyond, capacity_factor=6 / 5)
    y, aux = moe(tokens(5), mask=mask)
    assert aux.expert_load.tolist() == [0, 0, 0.5, 0.5, 0, 0]
    np.testing.assert_allclose(aux.experts_per_token, 2 / 5)
    assert aux.dropped_fraction == 0
    assert np.any(y[:2] != 0, axis=1).all()
    assert np.all(y[2:] == 0)


def test_k_is_the_routers_own_and_not_the_room_of_its_list():
    options = {"shared_hidden_features": 4, "shared_combine": "weighted_sum"}
    moe = make_moe(functools.partial(routers.route_token_rounding, k=2, block_rows=1), **options)
    np.testing.assert_allclose(moe(tokens(9))[0], make_moe(**options)(tokens(9))[0], rtol=1e-5, atol=1e-6)
    moe = make_moe(functools.partial(routers.route_token_rounding, k=2, block_rows=4), **options)
    y, _ = moe(tokens(9))  # of 9 tokens, or of the same 9 and 9 that are masked
    twice, _ = moe(jnp.tile(tokens(9), (2, 1)), mask=jnp.arange(18) < 9)
    np.testing.assert_allclose(twice[:9], y, rtol=1e-5, atol=1e-6)

    moe = make_moe(functools.partial(routers.route_expert_choice, capacity=2), **options)
    with pytest.raises(ValueError, match="room for 12 assignments of 9 tokens, and does not say K"):
        moe(tokens(9))


class Farthest(routers.Router):
    """To the expert that scores least, with weight 1; counts the tokens, and its calls."""

    def __init__(self):
        self.calls = nnx.Variable(jnp.zeros(()))
        self.kernel = nnx.Param(jax.random.normal(jax.random.key(0), (8, 6)))

    @property
    def score(self):
        return "sigmoid"

    def __call__(self, x, *, bonus=None):
        self.calls[...] += 1
        logits = x @ self.kernel[...]
        worst = jnp.argmin(logits if bonus is None else logits - bonus, axis=1, keepdims=True)
        return jmoe.Routing(worst, jnp.ones(worst.shape)), logits

    def statistics(self, logits, *, mask=None, axis_name=()):
        assert mask is not None
        return {"tokens": jax.lax.psum(mask.sum().astype(jnp.float32), axis_name)}


@pytest.mark.parametrize("on_mesh", [False, True])
def test_a_router_of_ones_own_gets_its_inputs_and_reports_statistics(on_mesh):
    moe, x, mask = make_moe(Farthest()), tokens(8, 3), jnp.arange(24).reshape(8, 3) % 4 > 0
    bonus = 99 * jax.nn.one_hot(jnp.full((8, 3), 4), 6)
    run = nnx.jit(lambda moe, x, **inputs: moe(x, mask=mask, **inputs)[1])
    mesh = jax.make_mesh((2, 2), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh) if on_mesh else contextlib.nullcontext():
        aux, aux_with_bonus = run(moe, x), run(moe, x, bonus=bonus)
    z = np.asarray(x)[np.asarray(mask)] @ np.asarray(moe.router.kernel[...])
    load = np.bincount(z.argmin(axis=1), minlength=6) / len(z)
    scores = 1 / (1 + np.exp(-z))
    scores /= scores.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(aux.expert_load, load, rtol=1e-6)
    np.testing.assert_allclose(aux.mean_score, scores.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(aux.load_balancing_loss, 6 * np.sum(load * scores.mean(axis=0)), rtol=1e-5)
    assert aux.router == {"tokens": 18}
    assert moe.router.calls[...] == 0  # the layer works on a copy
    assert aux_with_bonus.expert_load.tolist() == [0, 0, 0, 0, 1, 0]


def test_keys_reach_the_router_and_shards_draw_by_themselves():
    moe = make_moe(functools.partial(routers.route_sparsemixer, k=1, jitter=9.0))
    x = jnp.broadcast_to(tokens(), (64, 8))
    run = nnx.jit(lambda moe, x, rngs: moe(x, rngs=rngs))
    without, first, again, second = (run(moe, x, rngs)[0] for rngs in (None, nnx.Rngs(0), nnx.Rngs(0), nnx.Rngs(1)))
    assert len(np.unique(without, axis=0)) == 1
    assert len(np.unique(first, axis=0)) > 1
    np.testing.assert_array_equal(first, again)
    assert (first != second).any()
    with jax.set_mesh(jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))):
        shards = np.split(np.asarray(run(moe, x, nnx.Rngs(0))[0]), 4)
    assert all((shards[0] != shard).any() for shard in shards[1:])


def test_llama_4_is_a_sigmoid_top_1_on_the_input(relative_error):
    moe, x = jmoe.MoE(8, 10, 6, 1, score="sigmoid", normalize=False, weight_on="input", rngs=nnx.Rngs(0)), tokens(9)
    logits = np.asarray(x @ moe.router.kernel[...])
    expected = np.zeros((9, 8))
    for t, e in enumerate(logits.argmax(axis=1)):
        gate, up = np.split(np.asarray(x[t]) / (1 + np.exp(-logits[t, e])) @ np.asarray(moe.w_up[e]), 2)
        expected[t] = gate / (1 + np.exp(-gate)) * up @ np.asarray(moe.w_down[e])
    assert relative_error(apply(moe, x)[0], expected) < 2e-6


ROUTES = {
    "group_limited": functools.partial(routers.route_group_limited, k=2, num_groups=3, top_k_groups=2),
    "expert_choice": functools.partial(routers.route_expert_choice, capacity=3),
    "token_rounding": functools.partial(routers.route_token_rounding, k=2, block_rows=4),
    "relu": functools.partial(routers.route_relu, max_k=4),
    "uniform": functools.partial(routers.route_uniform, k=2),
    "sparsemixer": functools.partial(routers.route_sparsemixer, k=2, jitter=0.1),
}


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_masked_tokens_change_nothing_whatever_they_hold(route, relative_error):
    moe, x = make_moe(route), tokens(20)
    mask = np.arange(20) % 3 > 0

    def loss(moe, x, mask):
        y, aux = moe(x, mask=mask)
        return jnp.sum(jnp.sin(y)), (y, aux)

    run = nnx.jit(nnx.grad(loss, argnums=(0, 1), has_aux=True))
    (gradients, dx), (y, aux) = run(moe, jnp.where(mask[:, None], x, jnp.nan), jnp.asarray(mask))
    (expected_gradients, expected_dx), (expected_y, expected_aux) = run(moe, x[mask], jnp.ones(mask.sum(), bool))
    assert not np.any(y[~mask])
    assert not np.any(dx[~mask])
    assert relative_error(y[mask], expected_y) < 2e-6
    assert relative_error(dx[mask], expected_dx) < 1e-5
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        assert relative_error(a, b) < 1e-5
    np.testing.assert_allclose(aux.expert_load, expected_aux.expert_load, rtol=1e-6)
    np.testing.assert_allclose(aux.experts_per_token, expected_aux.experts_per_token, rtol=1e-6)


HYPER = routers.HyperRouter(8, 6, jmoe.route_top_k, k=2, rngs=nnx.Rngs(1))


@pytest.mark.parametrize("router", [ROUTES["relu"], ROUTES["sparsemixer"], HYPER], ids=["relu", "sparsemixer", "hyper"])
def test_routers_without_ties_between_tokens_give_the_same_on_a_mesh(router, relative_error):
    moe, x = make_moe(router), tokens(8, 3)
    expected, expected_aux = apply(moe, x)
    mesh = jax.make_mesh((2, 2), ("data", "expert"))
    with jax.set_mesh(mesh):
        y, aux = apply(moe, jax.device_put(x, jax.NamedSharding(mesh, jax.P(("data", "expert")))))
    assert relative_error(y, expected) < 1e-6
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), aux, expected_aux)


@pytest.mark.parametrize("name", ["expert_choice", "token_rounding", "uniform"])
def test_on_a_mesh_experts_choose_among_the_tokens_of_a_shard(name, relative_error):
    moe, x = make_moe(ROUTES[name]), tokens(16)
    shards = [apply(moe, shard) for shard in jnp.split(x, 4)]
    expected = jnp.concatenate([y for y, _ in shards])
    mesh = jax.make_mesh((2, 2), ("data", "expert"))
    with jax.set_mesh(mesh):
        y, aux = apply(moe, jax.device_put(x, jax.NamedSharding(mesh, jax.P(("data", "expert")))))
    assert relative_error(y, expected) < 1e-6
    if name != "token_rounding":
        np.testing.assert_allclose(aux.expert_load, np.mean([a.expert_load for _, a in shards], axis=0), rtol=1e-6)


def test_a_hyper_router_trains_the_embedding_and_nothing_else(relative_error):
    router = routers.HyperRouter(8, 6, jmoe.route_top_k, k=2, embedding_features=5, hidden_features=7, rngs=nnx.Rngs(1))
    e, w_in, w_out = (np.asarray(v[...], np.float64) for v in (router.embedding, router.w_in, router.w_out))
    x = tokens(9)
    routing, logits = router(x)
    expected = np.asarray(x) @ (np.maximum(e @ w_in, 0) @ w_out).reshape(8, 6)
    assert relative_error(logits, expected) < 1e-6
    np.testing.assert_array_equal(routing.expert_index, np.argsort(-expected, axis=1)[:, :2])

    half = routers.HyperRouter(8, 6, jmoe.route_top_k, k=2, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(1))
    e, w_in, w_out = (np.asarray(v[...], np.float64) for v in (half.embedding, half.w_in, half.w_out))
    assert relative_error(half.kernel, (np.maximum(e @ w_in, 0) @ w_out).reshape(8, 6)) < 1e-6

    moe = make_moe(router)
    gradients = nnx.grad(lambda moe: jnp.sum(moe(x)[0] ** 2))(moe)
    assert list(gradients.router) == ["embedding"]
    assert np.abs(gradients.router["embedding"]).sum() > 0


def test_the_linen_layer_takes_a_function_too():
    layer = jmoe.linen.MoE(8, 10, 6, router=ROUTES["group_limited"])
    variables = jax.jit(layer.init)(jax.random.key(0), tokens(4))
    assert set(variables["params"]["router"]) == {"kernel"}
    assert jax.jit(layer.apply)(variables, tokens(4))[0].shape == (4, 8)


@pytest.mark.parametrize("partial", [False, True])
def test_layers_with_equal_options_have_equal_structures(partial):
    def make():
        return make_moe(functools.partial(jmoe.route_top_k, k=2)) if partial else make_moe(scale=2.5)

    first, second = (nnx.graphdef(make()) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)


def test_a_partial_that_holds_arrays_is_taken_as_it_is():
    bias = jnp.array([0.0, 0, 9, 9, 0, 0])
    moe = make_moe(functools.partial(routers.route_group_limited, k=2, selection_bias=bias))
    assert apply(moe, tokens(5))[1].expert_load.tolist() == [0, 0, 0.5, 0.5, 0, 0]
    assert moe.router.top_k == 2


class InBfloat16(routers.Router):
    def __init__(self):
        self.kernel = nnx.Param(jax.random.normal(jax.random.key(0), (8, 6)))

    def __call__(self, x):
        logits = (x @ self.kernel[...]).astype(jnp.bfloat16)
        return jmoe.route_top_k(logits, 2), logits


def test_losses_are_in_float32_where_logits_are_not():
    moe, x = make_moe(InBfloat16()), tokens(30)
    logits = (x @ moe.router.kernel[...]).astype(jnp.bfloat16).astype(jnp.float32)
    _, aux = moe(x)
    np.testing.assert_allclose(aux.router_z_loss, jmoe.router_z_loss(logits), rtol=1e-6)
    np.testing.assert_allclose(aux.mean_score, jax.nn.softmax(logits).mean(axis=0), rtol=1e-5)


def test_options_beside_a_router_raise():
    with pytest.raises(ValueError, match=r"scale is 2.0 beside a router; leave it out, and give the router its own"):
        make_moe(ROUTES["relu"], scale=2.0)
    with pytest.raises(ValueError, match="top_k is 2 beside a router"):
        jmoe.MoE(8, 10, 6, 2, router=ROUTES["relu"], rngs=nnx.Rngs(0))


class OnlyARouting(routers.Router):
    def __call__(self, x) -> Any:
        return jmoe.route_top_k(x[:, :6], 2)


@pytest.mark.usefixtures("without_annotation_checks")
@pytest.mark.parametrize(
    ("router", "inputs", "message"),
    [
        (lambda: nnx.Linear(8, 6, rngs=nnx.Rngs(0)), {}, "router is a Linear; a module must be a jmoe.routers.Router"),
        (lambda: routers.HashRouter, {}, "router is the class HashRouter; it must be a routing function"),
        (
            lambda: functools.partial(routers.route_relu, k=2),  # pyright: ignore[reportCallIssue]
            {},
            "k is no option of the routing function; it takes",
        ),
        (lambda: routers.route_group_limited, {}, "k is missing: the router needs it"),
        (OnlyARouting, {}, "the router returns a Routing; it must be a pair"),
        (lambda: functools.partial(jmoe.route_top_k, k=2), {"k": jnp.ones(5)}, "k is given, and is an option of the"),
        (lambda: ROUTES["uniform"], {"deterministic": True}, "deterministic is True; it must be an array"),
    ],
)
def test_a_router_that_does_not_fit_is_named(router, inputs, message):
    with pytest.raises(ValueError, match=message):
        make_moe(router())(tokens(5), **inputs)
