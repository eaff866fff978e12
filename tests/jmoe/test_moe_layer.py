"""`jmoe.MoE`, the Flax NNX layer, and its Linen twin."""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec

import jmoe


def tokens(*batch, features=12, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((*batch, features)), dtype)


def numpy_layer(moe, x, *, activation):
    """The layer from the formulas, in float64, with a normalised softmax router."""

    def values(module):
        w_up, w_down = (np.asarray(p[...], np.float64) for p in (module.w_up, module.w_down))
        if module.b_up is None:
            return w_up, w_down, np.zeros_like(w_up[..., 0, :]), np.zeros_like(w_down[..., 0, :])
        return w_up, w_down, np.asarray(module.b_up[...]), np.asarray(module.b_down[...])

    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    logits = x @ np.asarray(moe.router.kernel[...], np.float64)
    w_up, w_down, b_up, b_down = values(moe)
    y = np.zeros_like(x)
    for t, row in enumerate(x):
        experts = np.argsort(-logits[t])[: moe.top_k]
        weight = np.exp(logits[t, experts] - logits[t].max())
        for e, w in zip(experts, weight / weight.sum(), strict=True):
            y[t] += w * (activation(row @ w_up[e] + b_up[e]) @ w_down[e] + b_down[e])
    if moe.shared is not None:
        w_up, w_down, b_up, b_down = values(moe.shared)
        y += activation(x @ w_up + b_up) @ w_down + b_down
    return y


def kept_for_the_backward(moe, x):
    """Counts the arrays of each shape and dtype that live between forward and backward."""
    graphdef, state = nnx.split(moe)

    def apply(state, x):
        return nnx.merge(graphdef, state)(x)[0]

    kept = jax.tree.leaves(jax.eval_shape(lambda *arrays: jax.vjp(apply, *arrays)[1], state, x))
    return collections.Counter((a.shape, a.dtype.name) for a in kept)


def swiglu(h):
    gate, up = np.split(h, 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * up


@pytest.mark.parametrize(
    ("activation", "options"),
    [
        ("swiglu", {"use_bias": True, "shared_hidden_features": 10, "bias_init": nnx.initializers.normal()}),
        ("relu", {}),
    ],
)
def test_the_layer_matches_the_formulas(activation, options, relative_error):
    moe = jmoe.MoE(12, 20, 6, 2, activation=activation, rngs=nnx.Rngs(0), **options)
    x = tokens(3, 5)
    y, aux = nnx.jit(lambda moe, x: moe(x))(moe, x)
    function = swiglu if activation == "swiglu" else lambda h: np.maximum(h, 0)
    assert relative_error(y, numpy_layer(moe, x, activation=function).reshape(3, 5, 12)) < 2e-6
    assert aux.dropped_fraction == 0
    np.testing.assert_allclose(aux.expert_load.sum(), 1, rtol=1e-6)


def test_aux_is_what_the_loss_functions_give():
    moe = jmoe.MoE(12, 20, 6, 2, score="sigmoid", scale=2.0, rngs=nnx.Rngs(0))
    x = tokens(30)
    _, aux = nnx.jit(lambda moe, x: moe(x))(moe, x)
    logits = x @ moe.router.kernel[...]
    routing = jmoe.route_top_k(logits, 2, score="sigmoid")
    scores = jax.nn.sigmoid(logits)
    scores /= scores.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(aux.load_balancing_loss, jmoe.load_balancing_loss(scores, routing), rtol=1e-5)
    np.testing.assert_allclose(aux.router_z_loss, jmoe.router_z_loss(logits), rtol=1e-5)
    np.testing.assert_allclose(aux.expert_load, jmoe.expert_load(routing, 6), rtol=1e-6)


def test_masked_tokens_give_zeros_get_no_gradient_and_enter_no_statistic(relative_error):
    ones = nnx.initializers.ones_init()
    options = {"use_bias": True, "shared_hidden_features": 8, "implementation": "reference"}
    moe = jmoe.MoE(12, 20, 6, 2, bias_init=ones, **options, rngs=nnx.Rngs(0))
    x = tokens(20)
    mask = jnp.asarray(np.random.default_rng(1).random(20) < 0.5)
    dirty = jnp.where(mask[:, None], x, jnp.nan)

    @nnx.jit
    def run(moe, x, mask):
        def loss(moe, x):
            y, aux = moe(x, mask=mask)
            return jnp.sum(y**2) + aux.load_balancing_loss + aux.router_z_loss, (y, aux)

        return nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(moe, x)

    (_, (y, aux)), (parameters, dx) = run(moe, dirty, mask)
    kept = np.asarray(mask)
    (_, (expected_y, expected_aux)), (expected_parameters, expected_dx) = run(moe, x[kept], None)
    assert np.all(y[~kept] == 0)
    assert np.all(dx[~kept] == 0)
    assert relative_error(y[kept], expected_y) < 2e-6
    assert relative_error(dx[kept], expected_dx) < 5e-6
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), aux, expected_aux)
    for actual, expected in zip(jax.tree.leaves(parameters), jax.tree.leaves(expected_parameters), strict=True):
        assert relative_error(actual, expected) < 5e-6


def test_parameters_have_the_documented_names_shapes_and_axes():
    moe = jmoe.MoE(12, 20, 6, 2, use_bias=True, shared_hidden_features=8, rngs=nnx.Rngs(0))
    parameters = {
        ".".join(map(str, path)): (variable.shape, variable.get_metadata()["out_sharding"])
        for path, variable in nnx.to_flat_state(nnx.state(moe))
    }
    assert parameters == {
        "router.kernel": ((12, 6), ("embed", None)),
        "w_up": ((6, 12, 40), ("expert", "embed", "expert_hidden")),
        "w_down": ((6, 20, 12), ("expert", "expert_hidden", "embed")),
        "b_up": ((6, 40), ("expert", "expert_hidden")),
        "b_down": ((6, 12), ("expert", "embed")),
        "shared.w_up": ((12, 16), ("embed", "mlp")),
        "shared.w_down": ((8, 12), ("mlp", "embed")),
        "shared.b_up": ((16,), ("mlp",)),
        "shared.b_down": ((12,), ("embed",)),
    }


def test_a_call_leaves_nothing_in_the_modules_state():
    moe = jmoe.MoE(12, 20, 6, 2, shared_hidden_features=8, rngs=nnx.Rngs(0))
    before = nnx.to_flat_state(nnx.state(moe))
    moe(tokens(4))
    after = nnx.to_flat_state(nnx.state(moe))
    assert [path for path, _ in before] == [path for path, _ in after]
    assert all(a[...] is b[...] for (_, a), (_, b) in zip(before, after, strict=True))


def test_initialisation_counts_fan_in_per_expert():
    moe = jmoe.MoE(64, 256, 32, 2, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(np.var(moe.w_up[...]), 1 / 64, rtol=0.02)
    np.testing.assert_allclose(np.var(moe.w_down[...]), 1 / 256, rtol=0.02)
    orthogonal = jmoe.MoE(4, 4, 3, 1, activation="relu", kernel_init=nnx.initializers.orthogonal(), rngs=nnx.Rngs(0))
    gram = jnp.einsum("edf,edg->efg", orthogonal.w_up[...], orthogonal.w_up[...])
    np.testing.assert_allclose(gram, np.tile(np.eye(4), (3, 1, 1)), atol=1e-5)
    assert not np.allclose(orthogonal.w_up[0], orthogonal.w_up[1])


@pytest.mark.parametrize(
    ("x", "dtype", "param_dtype", "result"),
    [
        (jnp.float32, None, jnp.float32, jnp.float32),
        (jnp.bfloat16, None, jnp.bfloat16, jnp.bfloat16),
        (jnp.bfloat16, None, jnp.float32, jnp.float32),
        (jnp.float32, jnp.bfloat16, jnp.float32, jnp.bfloat16),
    ],
)
def test_the_output_has_the_compute_dtype_and_aux_is_float32(x, dtype, param_dtype, result):
    moe = jmoe.MoE(12, 20, 6, 2, dtype=dtype, param_dtype=param_dtype, shared_hidden_features=8, rngs=nnx.Rngs(0))
    y, aux = jax.eval_shape(moe, tokens(4, dtype=x))
    assert y.dtype == result
    assert {leaf.dtype for leaf in jax.tree.leaves(aux)} == {jnp.dtype(jnp.float32)}


def test_the_router_computes_in_float32_whatever_the_compute_dtype():
    moe = jmoe.MoE(256, 8, 16, 2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = tokens(200, features=256)
    _, aux = nnx.jit(lambda moe, x: moe(x))(moe, x)
    logits = jnp.dot(x, moe.router.kernel[...], precision="highest")
    np.testing.assert_allclose(aux.router_z_loss, jmoe.router_z_loss(logits), rtol=1e-6)


def test_the_router_keeps_no_float32_copy_of_x():
    x = tokens(50, features=64, dtype=jnp.bfloat16)
    kept = kept_for_the_backward(jmoe.MoE(64, 4, 2, 1, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), x)
    assert kept[x.shape, "bfloat16"]
    assert not kept[x.shape, "float32"]


@pytest.mark.parametrize(("activation", "width"), [("swiglu", 2), ("gelu", 1)])
def test_the_shared_expert_keeps_its_pre_activations_and_its_parameters_as_they_are(activation, width):
    x = tokens(60, features=32, dtype=jnp.bfloat16)
    options = {"activation": activation, "use_bias": True, "dtype": jnp.bfloat16}
    without, with_shared = (
        kept_for_the_backward(jmoe.MoE(32, 16, 4, 2, shared_hidden_features=F, **options, rngs=nnx.Rngs(0)), x)
        for F in (0, 24)
    )
    assert with_shared - without == {
        ((60, width * 24), "bfloat16"): 1,
        ((32, width * 24), "float32"): 1,
        ((24, 32), "float32"): 1,
    }


def test_router_jitter_acts_only_where_keys_are_passed():
    moe = jmoe.MoE(12, 20, 6, 2, router_jitter=0.5, rngs=nnx.Rngs(0))
    x = tokens(30)
    run = nnx.jit(lambda moe, x, rngs: moe(x, rngs=rngs))
    plain, noisy, again = run(moe, x, None), run(moe, x, nnx.Rngs(1)), run(moe, x, nnx.Rngs(1))
    np.testing.assert_array_equal(noisy[0], again[0])
    assert plain[1].router_z_loss != noisy[1].router_z_loss
    with pytest.raises(ValueError, match=r"rngs has the streams \['dropout'\]; .* needs 'router' or 'default'"):
        moe(x, rngs=nnx.Rngs(dropout=0))
    moe.router_jitter = 0.0
    np.testing.assert_array_equal(run(moe, x, nnx.Rngs(1))[0], plain[0])
    rngs = nnx.Rngs(dropout=0)
    moe(x, rngs=rngs)  # nothing draws
    assert rngs.dropout.count[...] == 0
    linen = jmoe.linen.MoE(12, 20, num_experts=6, top_k=2, router_jitter=0.5)
    apply = jax.jit(lambda key: linen.apply({"params": nnx.to_pure_dict(nnx.state(moe))}, x, rngs=key))
    first, second = (apply({"router": jax.random.key(i)}) for i in range(2))
    np.testing.assert_allclose(apply({})[0], plain[0], rtol=1e-5, atol=1e-6)
    assert len({float(aux.router_z_loss) for _, aux in (plain, first, second)}) == 3


def test_a_single_token_without_batch_axes_is_accepted():
    moe = jmoe.MoE(12, 20, 6, 2, rngs=nnx.Rngs(0))
    x = tokens()
    run = nnx.jit(lambda moe, x: moe(x)[0])
    np.testing.assert_allclose(run(moe, x), run(moe, x[None])[0], rtol=1e-5)


def test_an_optimizer_step_lowers_the_loss_without_a_mesh():
    moe = jmoe.MoE(12, 20, 6, 2, shared_hidden_features=8, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(moe, optax.adam(1e-2), wrt=nnx.Param)
    x, target = tokens(30), tokens(30, seed=1)

    @nnx.jit
    def step(moe, optimizer):
        def loss(moe):
            y, aux = moe(x)
            return jnp.mean((y - target) ** 2) + 0.01 * aux.load_balancing_loss

        value, gradients = nnx.value_and_grad(loss)(moe)
        optimizer.update(moe, gradients)
        return value

    losses = [float(step(moe, optimizer)) for _ in range(10)]
    assert losses[-1] < 0.9 * losses[0]


def test_layers_are_stacked_by_nnx_vmap():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
    def create(rngs):
        return jmoe.MoE(12, 20, 6, 2, rngs=rngs)

    moe = create(nnx.Rngs(0))
    assert moe.w_up.shape == (3, 6, 12, 40)
    assert moe.w_up.get_metadata()["out_sharding"] == ("layers", "expert", "embed", "expert_hidden")


@pytest.mark.usefixtures("without_annotation_checks")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": 0}, "features is 0; it must be at least 1"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"top_k": 7}, "top_k is 7; without a router it must be between 1 and the number of experts, 6"),
        ({"top_k": None}, "top_k is None; without a router it must be"),
        ({"num_zero_experts": -1}, "num_zero_experts is -1"),
        ({"load_balancing": "token"}, "load_balancing is 'token'; it must be one of 'layer', 'sequence'"),
        ({"shared_hidden_features": -1}, "shared_hidden_features is -1"),
        (
            {"shared_combine": "mean"},
            "shared_combine is 'mean'; it must be one of 'sum', 'weighted_sum', 'sigmoid_gate'",
        ),
        ({"shared_combine": "weighted_sum"}, "without a shared expert; set shared_hidden_features"),
        ({"activation": "swish"}, "activation is 'swish'"),
        ({"score": "tanh"}, "score is 'tanh'"),
        ({"normalize": 0}, "normalize is 0; it must be True, False or the p of a p-norm"),
        ({"weight_on": "x"}, "weight_on is 'x'; it must be one of 'output', 'input'"),
        ({"router_jitter": 1.0}, "router_jitter is 1.0; it must be from 0"),
        ({"hidden_features": 8.0}, "hidden_features is 8.0; it must be an int, or a list"),
        ({"hidden_features": np.full(6, 128)}, "hidden_features is array"),
        ({"implementation": "cuda"}, "implementation is 'cuda'"),
    ],
)
def test_a_bad_option_is_a_value_error_that_names_it(arguments, message):
    sizes = {"features": 12, "hidden_features": 20, "num_experts": 6, "top_k": 2}
    with pytest.raises(ValueError, match=message):
        jmoe.MoE(**{**sizes, **arguments}, rngs=nnx.Rngs(0))


@pytest.mark.usefixtures("without_annotation_checks")
@pytest.mark.parametrize(
    ("x", "mask", "message"),
    [
        (jnp.ones((4, 13)), None, r"x is float32\[4, 13\]; it must be a floating-point array \[..., D=12\]"),
        (jnp.ones((4, 12), int), None, "x is int32"),
        (jnp.ones((4, 12)), jnp.ones((4, 1), bool), r"mask is bool\[4, 1\]; it must be bool\[4\]"),
        (jnp.ones((4, 12)), jnp.ones(4), r"mask is float32\[4\]"),
        (jnp.ones((4, 12)), [True] * 4, r"mask is \[True, True, True, True\]; it must be an array"),
    ],
)
def test_a_bad_input_is_a_value_error_that_names_it(x, mask, message):
    moe = jmoe.MoE(12, 20, 6, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        moe(x, mask=mask)


def test_linen_gives_the_same_numbers_for_the_same_parameters(relative_error):
    options = {"use_bias": True, "shared_hidden_features": 8, "implementation": "reference"}
    moe = jmoe.MoE(12, 20, 6, 2, **options, rngs=nnx.Rngs(0))
    linen = jmoe.linen.MoE(12, 20, num_experts=6, top_k=2, **options)
    x, mask = tokens(3, 5), jnp.ones((3, 5), bool).at[0, 0].set(False)
    variables = jax.eval_shape(linen.init, jax.random.key(0), x)
    assert set(variables) == {"params"}
    assert nn.get_partition_spec(variables)["params"]["w_up"] == PartitionSpec("expert", "embed", "expert_hidden")

    params = nnx.to_pure_dict(nnx.state(moe))
    assert jax.tree.structure(nn.unbox(variables["params"])) == jax.tree.structure(params)

    def loss_linen(params):
        result: Any = linen.apply({"params": params}, x, mask=mask)
        y, aux = result
        return jnp.sum(y**2) + aux.router_z_loss, y

    def loss_nnx(moe):
        y, aux = moe(x, mask=mask)
        return jnp.sum(y**2) + aux.router_z_loss, y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss_linen, has_aux=True))(params)
    (_, expected_y), expected = nnx.jit(nnx.value_and_grad(loss_nnx, has_aux=True))(moe)
    np.testing.assert_array_equal(y, expected_y)
    jax.tree.map(np.testing.assert_array_equal, gradients, nnx.to_pure_dict(expected))


def test_linen_layers_live_inside_linen_modules():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            y, aux = jmoe.linen.MoE(12, 20, num_experts=6, top_k=2, name="moe")(nn.LayerNorm()(x))
            return x + y, aux

    block, x = Block(), tokens(4)
    (y, _), variables = jax.jit(block.init_with_output)(jax.random.key(0), x)
    assert sorted(variables["params"]["moe"]) == ["router", "w_down", "w_up"]
    np.testing.assert_allclose(jax.jit(block.apply)(variables, x)[0], y, rtol=1e-5)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("combine", ["sum", "weighted_sum", "sigmoid_gate"])
def test_the_shared_expert_and_the_output_bias_are_combined_as_asked(combine, masked, relative_error):
    options = {"bias_init": nnx.initializers.normal(1.0), "use_bias": True}
    moe = jmoe.MoE(
        12,
        20,
        6,
        2,
        shared_hidden_features=10,
        shared_combine=combine,
        use_output_bias=True,
        **options,
        rngs=nnx.Rngs(0),
    )
    x, mask = tokens(20), np.ones(20, bool)
    mask[3:7] = not masked
    dirty = jnp.where(mask[:, None], x, jnp.nan)
    y, _ = nnx.jit(lambda moe, x, mask: moe(x, mask=mask))(moe, dirty, jnp.asarray(mask) if masked else None)

    both = numpy_layer(moe, x, activation=swiglu)
    shared, moe.shared = moe.shared, None
    routed = numpy_layer(moe, x, activation=swiglu)
    of_shared = both - routed
    if combine == "weighted_sum":
        expected = (2 * routed + of_shared) / 3
    elif combine == "sigmoid_gate":
        assert shared is not None
        assert shared.gate is not None
        expected = routed + sigmoid(np.asarray(x, np.float64) @ np.asarray(shared.gate[...])) * of_shared
    else:
        expected = both
    assert moe.bias is not None
    expected = np.where(mask[:, None], expected + np.asarray(moe.bias[...]), 0)
    assert relative_error(y, expected) < 2e-6


def test_the_gate_and_the_output_bias_get_the_gradients_of_the_formula(relative_error):
    options = {"shared_hidden_features": 10, "use_bias": True, "use_output_bias": True}
    moe = jmoe.MoE(
        12, 20, 6, 2, shared_combine="sigmoid_gate", bias_init=nnx.initializers.normal(1.0), **options, rngs=nnx.Rngs(0)
    )
    x, dy = tokens(20), tokens(20, seed=1)
    actual = nnx.jit(nnx.grad(lambda moe: jnp.vdot(moe(x)[0], dy)))(moe)

    def shared(parameters):
        gate, up = jnp.split(x @ parameters["w_up"] + parameters["b_up"], 2, axis=-1)
        v = (jax.nn.silu(gate) * up) @ parameters["w_down"] + parameters["b_down"]
        return jnp.vdot(jax.nn.sigmoid(x @ parameters["gate"]) * v, dy)

    expected = jax.grad(shared)(nnx.to_pure_dict(nnx.state(moe.shared)))
    for name, gradient in expected.items():
        assert relative_error(actual.shared[name][...], gradient) < 5e-6, name
    assert relative_error(actual.bias[...], dy.sum(axis=0)) < 2e-6


def test_the_gate_of_the_shared_expert_keeps_no_output_of_it():
    x = tokens(60, features=32, dtype=jnp.bfloat16)
    options = {"shared_hidden_features": 24, "dtype": jnp.bfloat16}
    plain, gated = (
        kept_for_the_backward(jmoe.MoE(32, 16, 4, 2, shared_combine=combine, **options, rngs=nnx.Rngs(0)), x)
        for combine in ("sum", "sigmoid_gate")
    )
    assert gated - plain == {((32, 1), "float32"): 1}


def test_any_function_can_gate(relative_error):
    moe = jmoe.MoE(12, 20, 6, 2, activation=jmoe.Gated(jnp.tanh), shared_hidden_features=8, rngs=nnx.Rngs(0))
    assert moe.w_up.shape == (6, 12, 40)
    x = tokens(20)
    y, _ = nnx.jit(lambda moe, x: moe(x))(moe, x)

    def tanh_gated(h):
        gate, up = np.split(h, 2, axis=-1)
        return np.tanh(gate) * up

    assert relative_error(y, numpy_layer(moe, x, activation=tanh_gated)) < 2e-6


@pytest.mark.parametrize(("activation", "width"), [("swiglu", 2), (jnp.sin, 1)])
def test_with_remat_no_pre_activations_are_kept_and_the_gradients_are_the_same(activation, width, relative_error):
    x = tokens(60, features=32, dtype=jnp.bfloat16)
    options = {"activation": activation, "use_bias": True, "shared_hidden_features": 24, "dtype": jnp.bfloat16}
    stored, recomputed = (jmoe.MoE(32, 16, 4, 2, remat=remat, **options, rngs=nnx.Rngs(0)) for remat in (False, True))
    assert kept_for_the_backward(stored, x) - kept_for_the_backward(recomputed, x) == {
        ((120, width * 16), "bfloat16"): 1,
        ((60, width * 24), "bfloat16"): 1,
    }

    @nnx.jit
    def gradients(moe, x):
        return nnx.grad(lambda moe, x: jnp.sum(moe(x)[0] ** 2), argnums=(0, 1))(moe, x)

    for a, e in zip(jax.tree.leaves(gradients(recomputed, x)), jax.tree.leaves(gradients(stored, x)), strict=True):
        assert relative_error(a, e) < 1e-2
