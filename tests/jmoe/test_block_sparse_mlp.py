"""`jmoe.moe_mlp` by block-sparse products: against the grouped path, and against the formulas where widths differ."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jmoe

CASES = [
    # tokens, experts, top_k, options
    (1, 1, 1, {"activation": "relu"}),
    (1, 4, 2, {"activation": "geglu", "bias": True}),
    (7, 2, 2, {"activation": "reglu", "weight_on": "input"}),
    (100, 4, 4, {"activation": "gelu", "bias": True, "weight_on": "input"}),
    (300, 8, 2, {"activation": "swiglu", "bias": True, "hidden": 128}),
    (300, 8, 2, {"activation": "relu_squared", "hidden": 192}),
    (90, 3, 1, {"activation": jnp.cbrt}),  # whose derivative at 0, where rows only fill a block, is infinite
]


def output_and_gradients(function, arrays, dy):
    @jax.jit
    def run(arrays, dy):
        y, vjp = jax.vjp(lambda arrays: function(**arrays), arrays)
        return y, vjp(dy)[0]

    return run(arrays, dy)


def cotangent(x):
    return jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), x.dtype)


def with_implementation(problem, implementation):
    return dataclasses.replace(problem, options=problem.options | {"implementation": implementation})


@pytest.mark.sample(3)
@pytest.mark.parametrize(("tokens", "experts", "top_k", "options"), CASES)
def test_the_block_sparse_path_equals_the_grouped_one_forward_and_backward(
    tokens, experts, top_k, options, make_problem, relative_error
):
    problem = make_problem(tokens, experts, top_k, **{"hidden": 64} | options)
    dy = cotangent(problem.x)
    results = [
        output_and_gradients(with_implementation(problem, name).moe_mlp, problem.differentiable, dy)
        for name in ("block_sparse", "xla")
    ]
    (y, gradients), (expected_y, expected) = results
    assert relative_error(y, expected_y) < 2e-6
    for name in expected:
        assert gradients[name].dtype == expected[name].dtype
        assert relative_error(gradients[name], expected[name]) < 1e-5, name


@pytest.mark.sample(2)
@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_remat_gives_the_same_and_keeps_no_pre_activations(weight_on, make_problem, relative_error):
    results, kept = [], []
    for remat in (False, True):
        problem = make_problem(
            100, 4, 2, hidden=64, bias=True, weight_on=weight_on, remat=remat, implementation="block_sparse"
        )
        results.append(output_and_gradients(problem.moe_mlp, problem.differentiable, cotangent(problem.x)))
        residuals = jax.eval_shape(
            lambda arrays, p=problem: jax.vjp(lambda a: p.moe_mlp(**a), arrays)[1], problem.differentiable
        )
        kept.append(sum(leaf.size for leaf in jax.tree.leaves(residuals) if leaf.dtype == jnp.float32))
    for actual, expected in zip(*map(jax.tree.leaves, results), strict=True):
        assert relative_error(actual, expected) < 1e-6
    assert kept[0] - kept[1] == 2 * 64 * 7 * 64  # 200 rows in four groups: up to seven blocks of 64


@pytest.mark.sample(2)
@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_absent_assignments_and_nan_weights_of_theirs_change_nothing(weight_on, make_problem, relative_error):
    problem = make_problem(50, 4, 3, hidden=64, bias=True, weight_on=weight_on)
    # All present ones go to the experts 0 and 2, and a third of the tokens has none.
    absent = np.random.default_rng(0).random((50, 3)) < 0.3
    absent[::3] = True
    expert_index = jnp.where(absent, jnp.array([-1, 4, 99]), 2 * (problem.expert_index % 2))
    problem = dataclasses.replace(problem, expert_index=expert_index, weight=jnp.where(absent, jnp.nan, problem.weight))
    dy = cotangent(problem.x)
    y, gradients = output_and_gradients(
        with_implementation(problem, "block_sparse").moe_mlp, problem.differentiable, dy
    )
    expected_y, expected = output_and_gradients(problem.moe_mlp, problem.differentiable, dy)
    assert relative_error(y, expected_y) < 2e-6
    for name in expected:
        assert relative_error(gradients[name], expected[name]) < 1e-5, name
    assert not np.any(gradients["w_up"][1])
    assert not np.any(gradients["weight"][absent])


def test_bfloat16_with_float32_parameters_is_as_exact_as_the_grouped_path(make_problem, relative_error):
    problem = make_problem(200, 4, 2, hidden=128, features=64)
    exact = problem.numpy_moe()
    arrays = problem.differentiable | {"x": problem.x.astype(jnp.bfloat16)}
    _, exact_gradients = output_and_gradients(problem.dense_moe, problem.differentiable, jnp.ones_like(problem.x))
    for name in ("block_sparse", "xla"):
        moe_mlp = with_implementation(problem, name).moe_mlp
        y, gradients = output_and_gradients(moe_mlp, arrays, jnp.ones_like(arrays["x"]))
        assert y.dtype == jnp.bfloat16
        assert relative_error(y, exact) < 1e-2
        for key, gradient in gradients.items():
            assert gradient.dtype == arrays[key].dtype
            assert relative_error(gradient, exact_gradients[key]) < 1.5e-2, (name, key)


def side_by_side(parameters, axis):
    return jnp.concatenate(parameters, axis)


@pytest.mark.sample(3)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_experts_of_different_widths_match_the_formulas(activation, bias, relative_error):
    rng = np.random.default_rng(0)
    tokens, features, sizes, top_k = 60, 16, (64, 192, 128, 64), 2
    parts = 2 if activation == "swiglu" else 1

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape) / math.sqrt(shape[0]), jnp.float32)

    experts = {
        "w_up": [normal(features, parts * size) for size in sizes],
        "w_down": [normal(size, features) for size in sizes],
    }
    if bias:
        experts |= {"b_up": [normal(parts * size) for size in sizes], "b_down": [normal(features) for _ in sizes]}
    x = normal(tokens, features)
    expert_index = jnp.asarray(np.argsort(rng.random((tokens, 3)), axis=1)[:, :top_k])  # none for the last expert
    weight = jnp.asarray(rng.random((tokens, top_k)), jnp.float32)

    def formula(x, weight, experts):
        y = 0
        for e in range(len(sizes)):
            h = x @ experts["w_up"][e] + (experts["b_up"][e] if bias else 0)
            gate, *up = jnp.split(h, parts, axis=1)
            a = jax.nn.silu(gate) * up[0] if up else jax.nn.relu(gate)
            v = a @ experts["w_down"][e] + (experts["b_down"][e] if bias else 0)
            y += jnp.sum(jnp.where(expert_index == e, weight, 0), axis=1)[:, None] * v
        return y

    def product(x, weight, experts):
        arrays: dict[str, Any] = {
            name: side_by_side(values, axis=-1 if name.endswith("up") else 0) for name, values in experts.items()
        }
        if bias:
            arrays["b_down"] = jnp.stack(experts["b_down"])
        routing = jmoe.Routing(expert_index, weight)
        options: dict[str, Any] = {"activation": activation, "hidden_sizes": sizes}
        return jmoe.moe_mlp(x, routing=routing, **arrays, **options)

    dy = cotangent(x)
    arrays = {"x": x, "weight": weight, "experts": experts}
    y, gradients = output_and_gradients(product, arrays, dy)
    expected_y, expected = output_and_gradients(formula, arrays, dy)
    assert relative_error(y, expected_y) < 2e-6
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), gradients, expected)


def test_a_flat_list_of_assignments_is_computed_too(make_problem, relative_error):
    problem = make_problem(40, 4, 2, hidden=64)
    token = jnp.repeat(jnp.arange(40), 2)
    shuffle = np.random.default_rng(0).permutation(80)
    routing = jmoe.Assignments(token[shuffle], problem.expert_index.ravel()[shuffle], problem.weight.ravel()[shuffle])

    @jax.jit
    def run(x, w_up, w_down):
        return jmoe.moe_mlp(x, w_up, w_down, routing, implementation="block_sparse")

    y = run(problem.x, problem.w_up, problem.w_down)
    assert relative_error(y, problem.numpy_moe()) < 2e-6


@pytest.mark.parametrize(("activation", "parts"), [("swiglu", 2), ("gelu", 1)])
def test_only_x_and_the_pre_activations_are_kept(activation, parts):
    experts, tokens, features, hidden = 2, 256, 64, 128
    arrays = (
        jnp.ones((tokens, features), jnp.bfloat16),
        jnp.ones((experts, features, parts * hidden)),
        jnp.ones((experts, hidden, features)),
        jnp.ones((tokens, 1)),
    )
    index = jnp.zeros((tokens, 1), jnp.int32)

    def mlp(x, w_up, w_down, weight):
        routing = jmoe.Routing(index, weight)
        return jmoe.moe_mlp(x, w_up, w_down, routing, activation=activation, implementation="block_sparse")

    kept = jax.tree.leaves(jax.eval_shape(lambda *arrays: jax.vjp(mlp, *arrays)[1], *arrays))
    of_arrays = sum(array.nbytes for array in arrays)
    slots = parts * (hidden // 128) * (experts + (tokens - 1) // 128)
    integers = 32 * tokens
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in kept) <= of_arrays + slots * 128 * 128 * 2 + integers


def test_the_compiler_keeps_no_copies_of_weights_between_forward_and_backward():
    layers, features, hidden, experts = 4, 64, 128, 16
    w_up, w_down = jnp.ones((experts, features, hidden)), jnp.ones((experts, hidden, features))
    routing = jmoe.Routing(jnp.zeros((8, 1), jnp.int32), jnp.ones((8, 1)))

    def loss(x, weights):
        for w_up, w_down in weights:
            x = x + jmoe.moe_mlp(x, w_up, w_down, routing, activation="relu", implementation="block_sparse")
        return jnp.sum(x**2, dtype=jnp.float32)

    x = jnp.ones((8, features), jnp.bfloat16)
    # As for grouped matmuls, in test_moe_mlp.py.
    in_order = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, [(w_up, w_down)] * layers)
    memory: Any = gradients.compile(compiler_options=in_order).memory_analysis()
    # A layer at work has nine matrices' worth of bfloat16; copies that are kept would add one for each layer.
    assert memory.temp_size_in_bytes < 10.5 * 2 * w_up.size


def test_the_layer_takes_the_implementation(relative_error):
    x = jax.random.normal(jax.random.key(0), (3, 20, 32))
    outs = []
    for implementation in ("block_sparse", "xla"):
        moe = jmoe.MoE(32, 64, 4, 2, implementation=implementation, rngs=nnx.Rngs(0))
        outs.append(nnx.jit(lambda moe, x: moe(x)[0])(moe, x))
    assert relative_error(*outs) < 2e-6


@pytest.mark.parametrize("use_bias", [False, True])
def test_a_layer_of_equal_widths_side_by_side_is_the_layer_of_one_width(use_bias, relative_error):
    x = jax.random.normal(jax.random.key(0), (3, 20, 32))
    options: dict[str, Any] = {"use_bias": use_bias, "bias_init": nnx.initializers.normal()}
    moe = jmoe.MoE(32, 64, 4, 2, **options, rngs=nnx.Rngs(0))
    flat = jmoe.MoE(32, [64] * 4, 4, 2, **options, implementation="xla", rngs=nnx.Rngs(1))
    assert flat.w_up.shape == (32, 4 * 128)
    assert flat.w_down.shape == (4 * 64, 32)
    flat.router.kernel[...] = moe.router.kernel[...]
    flat.w_up[...] = moe.w_up[...].swapaxes(0, 1).reshape(32, -1)
    flat.w_down[...] = moe.w_down[...].reshape(-1, 32)
    if flat.b_up is not None and flat.b_down is not None and moe.b_up is not None and moe.b_down is not None:
        flat.b_up[...], flat.b_down[...] = moe.b_up[...].ravel(), moe.b_down[...]
    (y, aux), (expected, expected_aux) = (nnx.jit(lambda moe, x: moe(x))(layer, x) for layer in (flat, moe))
    assert relative_error(y, expected) < 2e-6
    np.testing.assert_array_equal(aux.expert_load, expected_aux.expert_load)


def test_a_layer_of_experts_of_different_widths_trains_on_a_mesh_of_data():
    moe = jmoe.MoE(32, [64, 128, 192], 3, 2, rngs=nnx.Rngs(0))
    scale = [float(jnp.std(part)) for part in jnp.split(moe.w_down[...], [64, 192])]
    np.testing.assert_allclose(scale, [64**-0.5, 128**-0.5, 192**-0.5], rtol=0.1)  # fans of each expert's own
    x = jax.random.normal(jax.random.key(0), (4, 16, 32))

    @nnx.jit
    def gradients(moe, x):
        return nnx.grad(lambda moe: jnp.mean((moe(x)[0] - x) ** 2))(moe)

    expected = gradients(moe, x)
    with jax.set_mesh(jax.make_mesh((4,), ("data",))):
        actual = gradients(moe, jax.device_put(x, jax.P("data")))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), actual, expected)
    with (
        jax.set_mesh(jax.make_mesh((2, 2), ("data", "tensor"))),
        pytest.raises(ValueError, match="hidden_features differ from expert to expert"),
    ):
        moe(x)
    split = jmoe.MoE(32, 128, 4, 2, implementation="block_sparse", rngs=nnx.Rngs(0))
    with (
        jax.set_mesh(jax.make_mesh((4,), ("tensor",))),
        pytest.raises(ValueError, match=r"hidden_features .* 128 .* multiples of 256 .* mesh splits them into 4"),
    ):
        split(x)


def test_on_a_hopper_gpu_a_named_implementation_runs_all_products_and_sums_of_columns_or_raises(lower_for_cuda):
    def lower(*hidden_sizes, features=192):
        def gradients(x, w_up, b_up, w_down, expert_index):
            def loss(x, w_up, b_up, w_down):
                routing = jmoe.Routing(expert_index, jnp.ones(expert_index.shape))
                options: dict[str, Any] = {"activation": "relu", "implementation": "mosaic_gpu"}
                return jmoe.moe_mlp(x, w_up, w_down, routing, b_up=b_up, hidden_sizes=hidden_sizes, **options).sum()

            return jax.grad(loss, (0, 1, 2, 3))(x, w_up, b_up, w_down)

        columns = sum(hidden_sizes)
        shapes = (200, features), (features, columns), (columns,), (columns, features)
        return lower_for_cuda(gradients, *((shape, jnp.bfloat16) for shape in shapes), ((200, 2), jnp.int32))

    # One for the pre-activations and one for each gradient: of them, x, w_up, b_up and w_down.
    assert lower(128, 256).count("custom_call @mosaic_gpu") == 6
    assert lower(64, 256).count("custom_call @mosaic_gpu") == 6
    with pytest.raises(ValueError, match="a width of 96 is not a multiple of 64"):
        lower(64, 256, features=96)


def test_no_assignments_give_zeros(make_problem):
    problem = make_problem(5, 4, 0, hidden=64, implementation="block_sparse")
    assert not np.any(problem.moe_mlp())


def test_what_does_not_fit_is_said(make_problem, without_annotation_checks):
    problem = make_problem(5, 2, 1, hidden=96, implementation="block_sparse")
    with pytest.raises(ValueError, match=r"w_down has an expert of 96 hidden features; .* multiples of 64"):
        problem.moe_mlp()
    x, routing = problem.x, jmoe.Routing(problem.expert_index, problem.weight)
    w_up, w_down = jnp.ones((12, 384)), jnp.ones((192, 12))
    with pytest.raises(ValueError, match=r"w_up is .* must be floating-point \[D=12, sum of 2F=512\]"):
        jmoe.moe_mlp(x, w_up, jnp.ones((256, 12)), routing, hidden_sizes=(64, 192))
    with pytest.raises(ValueError, match=r"w_down is .* must be floating-point \[sum of F=192, D=12\]"):
        jmoe.moe_mlp(x, w_up, w_down.T, routing, hidden_sizes=(64, 128))
    with pytest.raises(ValueError, match="needs a Hopper GPU"):
        jmoe.moe_mlp(x, w_up, w_down, routing, hidden_sizes=(64, 128), implementation="mosaic_gpu")
    no_sizes: Any = (64, (64.0, 128.0))
    for sizes in no_sizes:
        with pytest.raises(ValueError, match=r"hidden_sizes is .*64.*; it must be a sequence of static integers"):
            jmoe.moe_mlp(x, w_up, w_down, routing, hidden_sizes=sizes)
    with pytest.raises(ValueError, match="hidden_features has 2 widths; it must have one for each of the 3"):
        jmoe.MoE(12, [64, 128], 3, 1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="hidden_sizes is empty"):
        jmoe.moe_mlp(x, w_up, w_down, routing, hidden_sizes=())
