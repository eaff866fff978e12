"""`jmoe.moe_mlp` against the formulas: forward, gradients, absent assignments, memory, transformations."""

import dataclasses
import re
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from pallas_kernels import tune
from pallas_kernels.grouped_matmul import mosaic_gpu, mosaic_gpu_weight_gradient

CASES = [
    # tokens, experts, top_k, options
    (1, 1, 1, {"activation": "relu"}),
    (1, 8, 2, {"activation": "geglu", "bias": True}),
    (7, 2, 2, {"activation": "reglu", "weight_on": "input"}),
    (7, 8, 8, {"activation": "gelu", "bias": True, "weight_on": "input"}),
    (128, 64, 1, {"activation": "silu", "bias": True}),
    (128, 64, 64, {"activation": "swiglu", "features": 4, "hidden": 4}),
    (1000, 8, 2, {"activation": "swiglu", "bias": True}),
    (1000, 64, 2, {"activation": "relu_squared"}),
]


def output_and_gradients(function, arrays, dy):
    """Runs `function(**arrays)` forward and backward under one jit."""

    @jax.jit
    def run(arrays, dy):
        y, vjp = jax.vjp(lambda arrays: function(**arrays), arrays)
        return y, vjp(dy)[0]

    return run(arrays, dy)


def cotangent(problem):
    return jnp.asarray(np.random.default_rng(1).standard_normal(problem.x.shape), problem.x.dtype)


@pytest.mark.parametrize(("tokens", "experts", "top_k", "options"), CASES)
def test_float32_matches_the_formulas_forward_and_backward(
    tokens, experts, top_k, options, make_problem, relative_error
):
    problem = make_problem(tokens, experts, top_k, **options)
    dy = cotangent(problem)
    y, gradients = output_and_gradients(problem.moe_mlp, problem.differentiable, dy)
    assert relative_error(y, problem.numpy_moe()) < 2e-6
    _, expected = output_and_gradients(problem.dense_moe, problem.differentiable, dy)
    for name in expected:
        assert relative_error(gradients[name], expected[name]) < 2e-6, name


@pytest.mark.sample(3)
@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize(
    "chosen", [[[3, 0, 2]], [[3, 3, 3]], [[-1, 2, 99]], [[-1, -1, -1]], [[3, 0, 2], [0, -1, 3], [1, 0, 0]]], ids=str
)
def test_few_tokens_outputs_are_the_same_with_and_without_a_backward(chosen, weight_on, make_problem):
    problem = make_problem(len(chosen), 4, 3, activation="swiglu", bias=True, weight_on=weight_on)
    expert_index = jnp.array(chosen)
    present = (expert_index >= 0) & (expert_index < 4)
    arrays = problem.differentiable | {"weight": jnp.where(present, 0.3, jnp.nan)}
    problem = dataclasses.replace(problem, expert_index=expert_index)
    alone = jax.jit(lambda arrays: problem.moe_mlp(**arrays))(arrays)
    with_backward, _ = output_and_gradients(problem.moe_mlp, arrays, jnp.ones_like(alone))
    np.testing.assert_allclose(alone, with_backward, rtol=1e-5, atol=1e-6)
    assert jnp.isfinite(alone).all()
    assert jnp.any(alone != 0) == present.any()


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_without_assignments_outputs_and_gradients_are_zeros(tokens, make_problem):
    problem = make_problem(tokens, 4, 0, activation="swiglu", bias=True)
    alone = jax.jit(lambda arrays: problem.moe_mlp(**arrays))(problem.differentiable)
    y, gradients = output_and_gradients(problem.moe_mlp, problem.differentiable, cotangent(problem))
    for array in (alone, y, *gradients.values()):
        assert not jnp.any(array)
    assert alone.shape == problem.x.shape


@pytest.mark.parametrize("experts_of", [[[0, 2]], [[1, 1]], [[-1, 3]]], ids=str)
def test_a_single_token_is_batched_by_vmap(experts_of, make_problem):
    problem = make_problem(3, 4, 2, activation="swiglu")

    def layer(x, weight):
        routing = jmoe.Routing(jnp.array(experts_of), weight[None])
        return jmoe.moe_mlp(x[None], problem.w_up, problem.w_down, routing)[0]

    batched = jax.vmap(layer)(problem.x, problem.weight)
    for i in range(3):
        np.testing.assert_allclose(batched[i], layer(problem.x[i], problem.weight[i]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "options"),
    [
        (128, 8, 2, {"activation": "swiglu", "weight_on": "input", "bias": True}),
        (1000, 64, 1, {"activation": "gelu", "bias": True}),
    ],
)
def test_bfloat16_matches_the_formulas_within_its_rounding(
    tokens, experts, top_k, options, make_problem, relative_error
):
    problem = make_problem(tokens, experts, top_k, dtype=jnp.bfloat16, **options)
    dy = cotangent(problem)
    y, gradients = output_and_gradients(problem.moe_mlp, problem.differentiable, dy)
    assert y.dtype == jnp.bfloat16
    assert relative_error(y, problem.numpy_moe()) < 1e-2
    exact = {name: array.astype(jnp.float32) for name, array in problem.differentiable.items()}
    _, expected = output_and_gradients(problem.dense_moe, exact, dy.astype(jnp.float32))
    for name in expected:
        assert gradients[name].dtype == problem.differentiable[name].dtype, name
        assert relative_error(gradients[name], expected[name]) < 1e-2, name


@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_gradients_match_finite_differences_in_float64(weight_on, make_problem):
    with jax.enable_x64(True):
        problem = make_problem(5, 3, 2, features=3, hidden=4, bias=True, dtype=jnp.float64, weight_on=weight_on)
        dy = cotangent(problem)
        loss = jax.jit(lambda arrays: jnp.sum(problem.moe_mlp(**arrays) * dy))
        arrays = problem.differentiable
        gradients = jax.grad(loss)(arrays)
        rng = np.random.default_rng(2)
        for name, array in arrays.items():
            direction = rng.standard_normal(array.shape)
            step = 1e-5
            up, down = (loss({**arrays, name: array + sign * step * direction}) for sign in (1, -1))
            slope = np.sum(np.asarray(gradients[name]) * direction)
            np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=1e-7, err_msg=name)


def test_all_tokens_on_one_expert_leaves_the_others_gradients_exactly_zero(make_problem, relative_error):
    problem = make_problem(50, 4, 1, bias=True)
    problem = dataclasses.replace(problem, expert_index=jnp.full((50, 1), 2))
    y, gradients = output_and_gradients(problem.moe_mlp, problem.differentiable, cotangent(problem))
    assert relative_error(y, problem.numpy_moe()) < 2e-6
    for name in ("w_up", "w_down", "b_up", "b_down"):
        others = np.delete(np.asarray(gradients[name]), 2, axis=0)
        assert np.all(others == 0), name
        assert np.any(gradients[name][2] != 0), name


@pytest.mark.parametrize(("flat", "weight_on"), [(False, "output"), (False, "input"), (True, "output")])
def test_absent_assignments_leak_nothing_even_where_memory_holds_nan(flat, weight_on, make_problem, relative_error):
    problem = make_problem(40, 4, 3, bias=True, weight_on=weight_on)
    rng = np.random.default_rng(3)
    absent = rng.random((40, 3)) < 0.3
    absent[:5] = True  # tokens that no expert sees, whose x is NaN
    index = jnp.where(absent, rng.choice([-1, 4, 99, -7], (40, 3)), problem.expert_index)
    clean = dataclasses.replace(problem, expert_index=index, weight=jnp.where(absent, 0, problem.weight))
    dirty = dataclasses.replace(
        clean, weight=jnp.where(absent, jnp.nan, problem.weight), x=problem.x.at[:5].set(jnp.nan)
    )

    def moe_mlp(**arrays):
        p = dataclasses.replace(dirty, **arrays)
        if not flat:
            return p.moe_mlp()
        tokens = jnp.repeat(jnp.arange(40), 3)
        routing = jmoe.Assignments(tokens, p.expert_index.ravel(), p.weight.ravel())
        return jmoe.moe_mlp(p.x, p.w_up, p.w_down, routing, b_up=p.b_up, b_down=p.b_down, **p.options)

    dy = cotangent(problem)
    y, gradients = output_and_gradients(moe_mlp, dirty.differentiable, dy)
    expected_y, expected = output_and_gradients(clean.dense_moe, clean.differentiable, dy)
    assert np.all(y[:5] == 0)
    assert relative_error(y, expected_y) < 2e-6
    assert np.all(gradients["weight"][absent] == 0)
    assert np.all(gradients["x"][:5] == 0)
    expected["weight"] = jnp.where(absent, 0, expected["weight"])
    for name in expected:
        assert relative_error(gradients[name], expected[name]) < 2e-6, name


def test_an_activation_that_is_nan_at_zero_does_not_leak_from_absent_rows(make_problem):
    problem = make_problem(6, 2, 2, activation="relu")
    problem.options["activation"] = lambda h: h * jnp.log(h**2)
    problem = dataclasses.replace(problem, expert_index=problem.expert_index.at[0].set(-1))
    y, gradients = output_and_gradients(problem.moe_mlp, problem.differentiable, cotangent(problem))
    assert np.isfinite(y).all()
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


def test_flat_assignments_give_what_the_same_routing_gives_in_any_order(make_problem, relative_error):
    problem = make_problem(30, 5, 3, bias=True)
    order = np.random.default_rng(4).permutation(90)

    def flat(x, w_up, w_down, b_up, b_down, weight):
        tokens = jnp.repeat(jnp.arange(30), 3)
        routing = jmoe.Assignments(tokens[order], problem.expert_index.ravel()[order], weight.ravel()[order])
        return jmoe.moe_mlp(x, w_up, w_down, routing, b_up=b_up, b_down=b_down)

    dy = cotangent(problem)
    y, gradients = output_and_gradients(flat, problem.differentiable, dy)
    expected_y, expected = output_and_gradients(problem.dense_moe, problem.differentiable, dy)
    assert relative_error(y, expected_y) < 2e-6
    for name in expected:
        assert relative_error(gradients[name], expected[name]) < 2e-6, name


def test_flat_assignments_allow_any_number_of_experts_for_a_token(relative_error):
    rng = np.random.default_rng(5)
    x, w_up, w_down = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((4, 3), (2, 3, 8), (2, 4, 3)))
    # Token 0 has three assignments, two of them to one expert; token 1 none; token 9 does not exist.
    tokens, experts = jnp.array([3, 0, 0, 9, 0, 2, -1]), jnp.array([1, 0, 1, 0, 0, 1, 1])
    weight = jnp.asarray(rng.random(7), jnp.float32)
    y = jax.jit(jmoe.moe_mlp)(x, w_up, w_down, jmoe.Assignments(tokens, experts, weight))

    def expert(t, e):
        h = x[t] @ w_up[e]
        return (jax.nn.silu(h[:4]) * h[4:]) @ w_down[e]

    expected = jnp.stack(
        [
            weight[1] * expert(0, 0) + weight[2] * expert(0, 1) + weight[4] * expert(0, 0),
            jnp.zeros(3),
            weight[5] * expert(2, 1),
            weight[0] * expert(3, 1),
        ]
    )
    assert relative_error(y, expected) < 2e-6


@pytest.mark.parametrize(("dtype", "experts"), [(jnp.int8, 200), (jnp.uint8, 256), (jnp.uint32, 8)])
def test_indices_of_any_integer_dtype_name_the_same_experts_and_tokens(dtype, experts, make_problem):
    for tokens in (5, 200):  # few are not sorted
        problem = make_problem(tokens, experts, 2, features=4, hidden=4)
        index = jnp.minimum(problem.expert_index, min(jnp.iinfo(dtype).max, experts - 1))
        mask = jnp.arange(tokens) % 7 != 0
        token = jnp.repeat(jnp.arange(tokens), 2)
        y, load = [], []
        for narrow in (jnp.int32, dtype):
            routing = jmoe.Routing(index.astype(narrow), problem.weight).masked(mask)
            y.append(dataclasses.replace(problem, expert_index=index.astype(narrow)).moe_mlp())
            y.append(jmoe.moe_mlp(problem.x, problem.w_up, problem.w_down, routing))
            load.append(jmoe.expert_load(routing, experts))
            narrow_token = jnp.minimum(token, 127).astype(narrow)
            flat = jmoe.Assignments(narrow_token, index.ravel().astype(narrow), problem.weight.ravel())
            y.append(jmoe.moe_mlp(problem.x, problem.w_up, problem.w_down, flat))
        for narrow_y, wide_y in zip(y[len(y) // 2 :], y[: len(y) // 2], strict=True):
            np.testing.assert_array_equal(narrow_y, wide_y)
            assert np.any(wide_y)
        np.testing.assert_array_equal(*load)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize(("activation", "width"), [("swiglu", 2), ("gelu", 1)])
def test_only_x_and_the_pre_activations_are_kept_for_the_backward(activation, width, remat, make_problem):
    problem = make_problem(64, 8, 4, activation=activation, bias=True, features=32, hidden=16)
    x = problem.x.astype(jnp.bfloat16)

    def layer(x, w_up, w_down, b_up, b_down, weight):
        routing = jmoe.Routing(problem.expert_index, weight)
        options: Any = {"activation": activation, "remat": remat}
        return jmoe.moe_mlp(x, w_up, w_down, routing, b_up=b_up, b_down=b_down, **options)

    arguments = {**problem.differentiable, "x": x}
    kept = jax.tree.leaves(jax.eval_shape(lambda *arrays: jax.vjp(layer, *arrays)[1], *arguments.values()))
    parameters = {(a.shape, a.dtype) for name, a in arguments.items() if name != "x"}
    floats = [a for a in kept if jnp.issubdtype(a.dtype, jnp.floating) and (a.shape, a.dtype) not in parameters]
    rows = problem.weight.size
    # 2*T*D + 4*R*F bytes for a gated MLP, 2*T*D + 2*R*F for a plain one; with remat 2*T*D.
    assert sum(a.size * a.dtype.itemsize for a in floats) == 2 * 64 * 32 + (0 if remat else 2 * width * rows * 16)
    integers = [a for a in kept if jnp.issubdtype(a.dtype, jnp.integer)]
    assert sum(a.size for a in integers) <= 4 * rows + 8


def test_the_router_adds_its_weights_to_what_is_kept_and_no_scores_of_all_experts(make_problem):
    problem = make_problem(64, 8, 4, features=32, hidden=16)
    tokens, experts, rows = 64, 8, problem.weight.size

    def layer(x, w_up, w_down, logits):
        return jmoe.moe_mlp(x, w_up, w_down, jmoe.route_top_k(logits, 4))

    operands = problem.x, problem.w_up, problem.w_down, jnp.zeros((tokens, experts))
    kept = jax.make_jaxpr(lambda *operands: jax.tree.leaves(jax.vjp(layer, *operands)[1]))(*operands).jaxpr
    # An array that is kept twice is there once.
    variables = {v for v in kept.outvars if isinstance(v, jax.extend.core.Var)} - set(kept.invars)
    arrays: list[Any] = [v.aval for v in variables]
    floats = [a for a in arrays if jnp.issubdtype(a.dtype, jnp.floating)]
    assert sorted(a.shape for a in floats) == [(tokens, 4), (rows, 32)]
    others = [a for a in arrays if not jnp.issubdtype(a.dtype, jnp.floating)]
    assert sum(a.size for a in others) == 4 * rows + experts


def test_the_compiler_keeps_no_gathered_rows_between_forward_and_backward(make_problem):
    layers, rows_bytes = 4, 4 * 128 * 8 * 256  # one float32 [R, D]
    problem = make_problem(128, 8, 8, features=256, hidden=2)

    def loss(x, weights):
        for w_up, w_down in weights:
            x = x + problem.moe_mlp(x=x, w_up=w_up, w_down=w_down)
        return jnp.sum(x**2)

    weights = [(problem.w_up + i, problem.w_down) for i in range(layers)]
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(problem.x, weights)
    # The usual order on CPUs runs as much as possible at once, whatever memory that takes.
    in_order = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    memory: Any = gradient.compile(compiler_options=in_order).memory_analysis()
    # A layer at work has its x rows, its dy rows and their product; kept rows would add one for each layer.
    assert memory.temp_size_in_bytes < 4.5 * rows_bytes


def test_gradients_of_float32_master_weights_are_not_rounded_to_the_compute_dtype(make_problem):
    problem = make_problem(64, 4, 2, bias=True)
    x = problem.x.astype(jnp.bfloat16)
    gradients = jax.jit(jax.grad(lambda w_up: jnp.sum(problem.moe_mlp(x=x, w_up=w_up))))(problem.w_up)
    assert gradients.dtype == jnp.float32
    assert np.any(gradients != gradients.astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_every_implementation_gives_the_same(implementation, make_problem, relative_error):
    problem = make_problem(33, 4, 2, implementation=implementation)
    assert relative_error(jax.jit(problem.moe_mlp)(), problem.numpy_moe()) < 2e-6


def test_the_same_inputs_give_the_same_bits(make_problem):
    problem = make_problem(200, 8, 4, bias=True)

    @jax.jit
    def run(arrays, dy):
        y, vjp = jax.vjp(lambda arrays: problem.moe_mlp(**arrays), arrays)
        return y, vjp(dy)[0]

    first, second = (run(problem.differentiable, cotangent(problem)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_vmap_over_tokens_and_routing_gives_each_element_its_own_result(make_problem, relative_error):
    problems = [make_problem(9, 3, 2, seed=seed) for seed in range(3)]
    names = ("x", "weight", "expert_index")
    stacked = {name: jnp.stack([getattr(p, name) for p in problems]) for name in names}

    def gradient(function):
        def loss(w_up, arrays):
            y = function(w_up=w_up, **arrays)
            return jnp.sum(y**2), y

        return jax.jit(jax.vmap(jax.grad(loss, has_aux=True), in_axes=(None, 0)))

    gradients, y = gradient(problems[0].moe_mlp)(problems[0].w_up, stacked)
    expected_gradients, expected_y = gradient(problems[0].dense_moe)(problems[0].w_up, stacked)
    assert relative_error(y, expected_y) < 2e-6
    assert relative_error(gradients, expected_gradients) < 2e-6


def test_scan_over_rematerialised_layers_equals_a_loop(make_problem, relative_error):
    problem = make_problem(9, 3, 2)
    layers = [make_problem(9, 3, 2, seed=seed) for seed in range(3)]
    w_up, w_down = jnp.stack([p.w_up for p in layers]), jnp.stack([p.w_down for p in layers])

    def layer(x, weights):
        w_up, w_down = weights
        return x + problem.moe_mlp(x=x, w_up=w_up, w_down=w_down), None

    def scanned(w_up, w_down):
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), problem.x, (w_up, w_down))[0] ** 2)

    def looped(w_up, w_down):
        x = problem.x
        for i in range(3):
            x += problem.dense_moe(x=x, w_up=w_up[i], w_down=w_down[i])
        return jnp.sum(x**2)

    gradients = jax.jit(jax.grad(scanned, argnums=(0, 1)))(w_up, w_down)
    expected = jax.jit(jax.grad(looped, argnums=(0, 1)))(w_up, w_down)
    for actual, wanted in zip(gradients, expected, strict=True):
        assert relative_error(actual, wanted) < 5e-6


def test_no_tokens_give_no_rows(make_problem):
    problem = make_problem(0, 2, 1, bias=True)
    y, gradients = output_and_gradients(problem.moe_mlp, problem.differentiable, cotangent(problem))
    assert y.shape == problem.x.shape
    assert np.all(gradients["w_up"] == 0)


def test_forward_mode_raises_jaxs_own_error(make_problem):
    problem = make_problem(4, 2, 1)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: problem.moe_mlp(x=x), (problem.x,), (problem.x,))


@pytest.mark.usefixtures("without_annotation_checks")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((2, 4, 12))}, r"x is float32\[2, 4, 12\]; it must be floating-point \[T, D\]"),
        ({"x": jnp.ones((4, 12), jnp.int32)}, "x is int32"),
        ({"w_up": jnp.ones((2, 12, 20))}, r"w_up is .*E=2, D=12, 2F=40\] \(swiglu is gated"),
        ({"w_up": jnp.ones((3, 12, 40))}, r"w_up is .*E=2"),
        ({"w_down": jnp.ones((2, 20, 13))}, r"w_down is .*\[E, F, D=12\]"),
        ({"b_up": jnp.ones((2, 20))}, r"b_up is .*\[E=2, 2F=40\]"),
        ({"b_down": jnp.ones((2, 20))}, r"b_down is .*\[E=2, D=12\]"),
        ({"expert_index": jnp.zeros((5, 1), jnp.int32), "weight": jnp.ones((5, 1))}, "5 tokens and x has 4"),
        ({"weight": jnp.ones((4, 2))}, r"routing.weight is float32\[4, 2\]"),
        ({"expert_index": jnp.zeros((4, 1))}, "routing.expert_index is float32"),
        ({"options": {"activation": "swish"}}, "activation is 'swish'; it must be one of 'swiglu', 'geglu'"),
        ({"options": {"weight_on": "both"}}, "weight_on is 'both'; it must be 'output' or 'input'"),
        ({"options": {"implementation": "triton"}}, "implementation is 'triton'"),
        ({"options": {"implementation": "mosaic_gpu"}}, "needs a Hopper GPU"),
    ],
)
def test_a_bad_argument_is_a_value_error_that_names_it(change, message, make_problem):
    problem = make_problem(4, 2, 1)
    with pytest.raises(ValueError, match=message):
        problem.moe_mlp(**change)


@pytest.mark.usefixtures("without_annotation_checks")
def test_a_routing_of_another_type_is_a_value_error(make_problem):
    problem = make_problem(4, 2, 1)
    routing: Any = (problem.expert_index, problem.weight)
    with pytest.raises(ValueError, match=r"routing is a tuple; it must be a jmoe.Routing or jmoe.Assignments"):
        jmoe.moe_mlp(problem.x, problem.w_up, problem.w_down, routing)


@pytest.mark.parametrize("biased", [False, True])
def test_on_a_hopper_gpu_rows_are_gathered_inside_the_kernels(biased, lower_for_cuda):
    def run(x, w_up, w_down, b_down, weight, expert_index, dy):
        def layer(x, w_up, w_down, b_down, weight):
            bias = b_down if biased else None
            return jmoe.moe_mlp(x, w_up, w_down, jmoe.Routing(expert_index, weight), b_down=bias)

        y, pull_back = jax.vjp(layer, x, w_up, w_down, b_down, weight)
        return y, pull_back(dy)

    bf16 = jnp.bfloat16
    x, w_up, w_down = ((1000, 128), bf16), ((4, 128, 128), bf16), ((4, 64, 128), bf16)
    weight, expert_index = ((1000, 2), jnp.float32), ((1000, 2), jnp.int32)
    program = lower_for_cuda(run, x, w_up, w_down, ((4, 128), bf16), weight, expert_index, x)
    assert program.count("custom_call @mosaic_gpu") == 9  # six matmuls, two combines, the activation's gradient
    # Only the sums that go with the bias take rows of dy outside.
    assert bool(re.search(r"gather.*-> tensor<2000x128xbf16>", program)) == biased


def test_the_tuning_of_a_layer_is_of_the_matmuls_that_the_layer_runs(h100, lower_for_cuda, monkeypatch):
    looked_up = []
    for kernel in (mosaic_gpu, mosaic_gpu_weight_gradient):
        monkeypatch.setattr(kernel, "choose_config", lambda problem, rule: looked_up.append(problem) or rule)

    def run(x, w_up, w_down, weight, expert_index, dy):
        def layer(x, w_up, w_down, weight):
            return jmoe.moe_mlp(x, w_up, w_down, jmoe.Routing(expert_index, weight))

        return jax.vjp(layer, x, w_up, w_down, weight)[1](dy)

    bf16 = jnp.bfloat16
    t, d, f, e, k = 1500, 192, 128, 4, 2
    x, w_up, w_down = ((t, d), bf16), ((e, d, 2 * f), bf16), ((e, f, d), bf16)
    lower_for_cuda(run, x, w_up, w_down, ((t, k), jnp.float32), ((t, k), jnp.int32), x)
    with h100():
        assert set(looked_up) == {task.problem for task in tune.layer_tasks(t, d, f, e, k)}
