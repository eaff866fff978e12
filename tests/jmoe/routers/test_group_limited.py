"""Group-limited top-k, the bias on the selection, and the router whose bias follows the load."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jmoe
from jmoe.routers import BiasCorrectedRouter, SelectionBias, route_group_limited, updated_bias

SCORES = {
    "softmax": lambda z: np.exp(z - z.max()) / np.exp(z - z.max()).sum(),
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "sqrt_softplus": lambda z: np.sqrt(np.log1p(np.exp(z))),
}


def numpy_route(logits, k, num_groups, top_k_groups, group_score, score, bias, normalize, scale):
    """DeepSeek's selection, token by token, from the formulas."""
    index, weight = [], []
    for z in np.asarray(logits, np.float64):
        s = SCORES[score](z)
        groups = (s + bias).reshape(num_groups, -1)
        goodness = [max(g) if group_score == "max" else sum(sorted(g)[-2:]) for g in groups]
        kept = np.argsort(-np.array(goodness), kind="stable")[:top_k_groups]
        size = groups.shape[1]
        candidates = [e for e in range(len(z)) if e // size in kept]
        chosen = sorted(candidates, key=lambda e: -(s + bias)[e])[:k]
        index.append(chosen)
        weight.append(scale * s[chosen] / (np.linalg.norm(s[chosen], ord=int(normalize)) if normalize else 1))
    return np.array(index), np.array(weight)


@pytest.fixture
def logits():
    return jnp.asarray(np.random.default_rng(0).standard_normal((40, 12)) * 2, jnp.float32)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("group_score", ["max", "top_2_sum"])
@pytest.mark.parametrize("normalize", [True, False, 2.0])
def test_experts_and_weights_follow_the_formulas(score, group_score, normalize, logits, relative_error):
    bias = np.random.default_rng(1).standard_normal(12).astype(np.float32) / 5
    routing = jax.jit(
        lambda z: route_group_limited(
            z,
            3,
            num_groups=4,
            top_k_groups=2,
            group_score=group_score,
            score=score,
            selection_bias=jnp.asarray(bias),
            normalize=normalize,
            scale=2.5,
        )
    )(logits)
    index, weight = numpy_route(logits, 3, 4, 2, group_score, score, bias, normalize, 2.5)
    np.testing.assert_array_equal(routing.expert_index, index)
    assert relative_error(routing.weight, weight) < 1e-6


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_one_group_without_bias_is_top_k(score, logits):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6),
        route_group_limited(logits, 3, score=score),
        jmoe.route_top_k(logits, 3, score=score),
    )


def test_no_expert_of_an_excluded_group_is_chosen_even_where_selection_scores_are_negative(logits):
    bias = jnp.full(12, -7.0)
    routing = route_group_limited(logits, 6, num_groups=4, top_k_groups=2, selection_bias=bias)
    assert all(len(set(np.asarray(row) // 3)) == 2 for row in routing.expert_index)


def test_a_single_token_masked_tokens_and_nan_keep_to_themselves():
    logits = jnp.array([[1.0, 2.0, 3.0, 4.0], [jnp.nan, 0.0, 0.0, 0.0], [4.0, 3.0, 2.0, 1.0]])
    route = functools.partial(route_group_limited, k=2, num_groups=2)
    routing = route(logits, mask=jnp.array([True, True, False]))
    assert routing.expert_index[2].tolist() == [-1, -1]
    assert np.isnan(routing.weight[1]).any()
    assert ((routing.expert_index[1] >= 0) & (routing.expert_index[1] < 4)).all()
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda a: a[:1], routing), route(logits[:1]))


def test_gradients_match_finite_differences_and_none_reaches_the_bias():
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        logits, direction, dw = (rng.standard_normal(s) for s in ((4, 6), (4, 6), (4, 2)))

        def loss(logits, bias):
            routing = route_group_limited(logits, 2, num_groups=3, top_k_groups=2, selection_bias=bias)
            return jnp.sum(routing.weight * dw)

        bias = jnp.asarray(rng.standard_normal(6))
        slope, dbias = jax.grad(loss, argnums=(0, 1))(jnp.asarray(logits), bias)
        up, down = (loss(jnp.asarray(logits + sign * 1e-6 * direction), bias) for sign in (1, -1))
        np.testing.assert_allclose(np.sum(slope * direction), (up - down) / 2e-6, rtol=1e-6)
        assert not dbias.any()


@pytest.mark.usefixtures("without_annotation_checks")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 5}, "num_groups is 5; it must divide the number of experts, 12"),
        ({"num_groups": 4, "top_k_groups": 5}, "top_k_groups is 5; it must be between 1 and num_groups, 4"),
        ({"num_groups": 6, "k": 3}, "k is 3; 1 groups have only 2 experts: raise top_k_groups"),
        ({"num_groups": 12}, "'top_2_sum' needs two"),
        ({"group_score": "mean"}, "group_score is 'mean'"),
        ({"score": "tanh"}, "score is 'tanh'"),
        ({"k": 13}, "k is 13"),
        ({"selection_bias": jnp.ones(3)}, r"selection_bias has shape \[3\]; it must be \[E=12\]"),
    ],
)
def test_bad_arguments_raise(options, message, logits):
    with pytest.raises(ValueError, match=message):
        route_group_limited(logits, **{"k": 1, **options})


def make_moe(**options):
    router = BiasCorrectedRouter(8, 6, 2, num_groups=3, top_k_groups=2, **options, rngs=nnx.Rngs(1))
    return jmoe.MoE(8, 10, 6, router=router, rngs=nnx.Rngs(0))


def tokens(*batch):
    return jnp.asarray(np.random.default_rng(0).standard_normal((*batch, 8)), jnp.float32)


def test_a_layer_routes_by_its_bias_which_is_no_parameter():
    moe, x = make_moe(), tokens(20)
    moe.router.bias[...] = jnp.array([0.0, 0.0, 0.0, 0.0, 9.0, 9.0])
    _, aux = nnx.jit(lambda moe, x: moe(x))(moe, x)
    assert aux.expert_load.tolist() == [0, 0, 0, 0, 0.5, 0.5]
    assert set(dict(nnx.to_flat_state(nnx.state(moe, SelectionBias)))) == {("router", "bias")}
    gradients = nnx.grad(lambda moe: moe(x)[0].sum())(moe)
    assert "bias" not in gradients.router
    assert np.abs(gradients.router.kernel).sum() > 0


def test_the_bias_moves_towards_balance_and_by_nothing_at_balance():
    router = BiasCorrectedRouter(8, 6, 2, update_rate=0.25, rngs=nnx.Rngs(0))
    router.update_bias(jnp.array([12, 0, 2, 2, 2, 0]) / 18)  # of counts whose mean is 3
    assert router.bias[...].tolist() == [-0.25, 0.25, 0.25, 0.25, 0.25, 0.25]
    for balanced in (jnp.full(6, 1 / 6), jnp.zeros(6)):
        before = router.bias[...]
        router.update_bias(balanced)
        assert router.bias[...].tolist() == before.tolist()


def test_only_updates_change_the_bias_and_they_even_the_load_out():
    moe, x = make_moe(update_rate=0.02), tokens(300) + 1  # all tokens alike in part: uneven
    optimizer = nnx.Optimizer(moe, optax.sgd(1e-3), wrt=nnx.Param)

    def loss(moe):
        y, aux = moe(x)
        return jnp.mean(y**2), aux

    @nnx.jit
    def step(moe, optimizer):
        gradients, aux = nnx.grad(loss, has_aux=True)(moe)
        optimizer.update(moe, gradients)
        bias = moe.router.bias[...]
        moe.router.update_bias(aux.expert_load)
        return aux.expert_load, bias

    loads, bias = zip(*(step(moe, optimizer) for _ in range(40)), strict=True)
    assert not bias[0].any()
    assert bias[1].any()
    assert np.std(loads[-1]) < np.std(loads[0]) / 3


def test_the_layer_on_a_mesh_equals_the_one_on_one_device(relative_error):
    moe, x = make_moe(), tokens(8, 5)
    moe.router.bias[...] = jnp.linspace(-0.3, 0.3, 6)
    apply = nnx.jit(lambda moe, x: moe(x))
    expected, expected_aux = apply(moe, x)
    mesh = jax.make_mesh((2, 2), ("data", "expert"))
    with jax.set_mesh(mesh):
        y, aux = apply(moe, jax.device_put(x, jax.NamedSharding(mesh, jax.P("data"))))
    assert relative_error(y, expected) < 1e-6
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), aux, expected_aux)


def test_stacked_biases_are_updated_layer_by_layer():
    loads = jnp.array([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    biases = updated_bias(jnp.ones((2, 3)), loads, 0.25)
    assert biases.tolist() == [[0.75, 0.75, 1.25], [1.25, 1.25, 0.75]]


def test_rounding_of_the_shares_moves_no_bias():
    counts = np.random.default_rng(0).integers(1, 40, (300, 8))
    counts[:, 0] = 0
    counts[:, 0] = np.maximum(np.round(counts.sum(axis=1) / 7), 1)  # the mean, where 7 divides the others
    shares = jnp.asarray(counts, jnp.float32) / counts.sum(axis=1, keepdims=True).astype(np.float32)
    biases = updated_bias(jnp.zeros((300, 8)), shares, 1.0)
    np.testing.assert_array_equal(biases, np.sign(counts.mean(axis=1, keepdims=True) - counts))
    assert (biases == 0).any()


def test_the_linen_layer_keeps_the_bias_in_a_collection_of_its_own():
    layer = jmoe.linen.MoE(
        8, 10, 6, router=BiasCorrectedRouter(8, 6, 2, num_groups=3, top_k_groups=2, rngs=nnx.Rngs(1))
    )
    x = tokens(20)
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    assert set(variables) == {"params", "SelectionBias"}
    assert set(variables["params"]["router"]) == {"kernel"}
    apply = jax.jit(lambda variables: layer.apply(variables, x))
    biases = variables["SelectionBias"]["router"]
    load = apply(variables)[1].expert_load
    assert updated_bias(biases["bias"], load, 0.5).shape == (6,)
    biases["bias"] = jnp.array([0.0, 0.0, 0.0, 0.0, 9.0, 9.0])
    assert apply(variables)[1].expert_load.tolist() == [0, 0, 0, 0, 0.5, 0.5]


def test_the_load_balancing_loss_reads_logits_as_the_router_does():
    moe, x = make_moe(), tokens(20)
    _, aux = nnx.jit(lambda moe, x: moe(x))(moe, x)
    routing, logits = moe.router(x)
    scores = jax.nn.sigmoid(logits)
    scores /= scores.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(aux.load_balancing_loss, jmoe.load_balancing_loss(scores, routing), rtol=1e-5)


@pytest.mark.usefixtures("without_annotation_checks")
def test_an_update_with_another_shape_raises():
    router = BiasCorrectedRouter(8, 6, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"expert_load has shape \[5\]; it must be \[6\]"):
        router.update_bias(jnp.ones(5))
