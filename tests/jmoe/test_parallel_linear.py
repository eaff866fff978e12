"""`jmoe.parallel_linear` and `jmoe.ParallelLinear` against the formulas, an expert at a time in NumPy."""

import dataclasses
import itertools
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jmoe
from jmoe.dispatch import dispatch_unsorted

# Where x and y have their rows: a row for each token (y: their weighted sum), assignment or row of the dispatch.
PATHS = list(itertools.product(["tokens", "assignments", "rows"], repeat=2))
make_dispatch = jax.jit(jmoe.make_dispatch, static_argnums=1)
LENGTHS, WIDTHS, TOP_KS = (1, 256, 512), (100, 128, 256, 512, 600), (2, 3, 4)


@dataclasses.dataclass
class Problem:
    """One call: x of order `source` to y of order `target`, the routing, and the cotangent of y."""

    source: str
    target: str
    arrays: dict
    expert_index: np.ndarray
    dy: jax.Array
    flat: bool = False

    @property
    def routing(self):
        tokens, top_k = self.expert_index.shape
        index = jnp.asarray(self.expert_index)
        if not self.flat:
            return jmoe.Routing(index, jnp.ones((tokens, top_k)))
        return jmoe.Assignments(jnp.repeat(jnp.arange(tokens), top_k), index.ravel(), jnp.ones(tokens * top_k))

    def run(self, **options):
        """Computes the product's y and gradients."""

        @jax.jit
        def output_and_gradients(arrays, dy, dispatch):
            def apply(x, kernel, **others):
                ordered = {"grouped_in": self.source == "rows", "grouped_out": self.target == "rows"}
                return jmoe.parallel_linear(x, kernel, dispatch, **ordered, **others, **options)

            y, pull_back = jax.vjp(lambda arrays: apply(**arrays), arrays)
            return y, pull_back(dy)[0]

        dispatch = make_dispatch(self.routing, self.arrays["kernel"].shape[0])
        return output_and_gradients(self.arrays, self.dy, dispatch)

    def expected(self):
        """Computes the same in float64, an expert at a time."""
        arrays = {name: np.asarray(array, np.float64) for name, array in self.arrays.items()}
        dy = np.asarray(self.dy, np.float64)
        x, kernel, weights = arrays["x"], arrays["kernel"], arrays.get("weights")
        bias = arrays.get("bias", np.zeros(kernel[:, 0].shape))
        y, gradients = np.zeros(dy.shape), {name: np.zeros(array.shape) for name, array in arrays.items()}
        num_experts, top_k = len(kernel), self.expert_index.shape[1]
        present = [
            (expert, token, slot)
            for token, experts in enumerate(self.expert_index)
            for slot, expert in enumerate(experts)
            if 0 <= expert < num_experts
        ]
        present = sorted(present)  # as the rows of a dispatch
        for e in range(num_experts):
            rows = [row for row, (expert, _, _) in enumerate(present) if expert == e]
            token, slot = (np.array([present[row][i] for row in rows], int) for i in (1, 2))
            slot = token * top_k + slot if self.flat else (token, slot)
            place = {"tokens": token, "assignments": slot, "rows": rows}
            x_rows, dy_rows = x[place[self.source]], dy[place[self.target]]
            weight = np.ones(len(rows)) if weights is None else weights[slot]
            v, dv = x_rows @ kernel[e] + bias[e], weight[:, None] * dy_rows
            np.add.at(y, place[self.target], weight[:, None] * v)
            np.add.at(gradients["x"], place[self.source], dv @ kernel[e].T)
            gradients["kernel"][e] = x_rows.T @ dv
            if "bias" in arrays:
                gradients["bias"][e] = dv.sum(axis=0)
            if weights is not None:
                gradients["weights"][slot] = np.sum(dy_rows * v, axis=1)
        return y, gradients


@pytest.fixture
def make_problem():
    def make(source, target, *, tokens=7, experts=4, top_k=2, features=5, out_features=6, bias=True, dtype=jnp.float32):
        rng = np.random.default_rng([tokens, experts, top_k, features])

        def normal(*shape, scale=1.0):
            return jnp.asarray(rng.standard_normal(shape) * scale, dtype)

        leading = {"tokens": (tokens,), "assignments": (tokens, top_k), "rows": (tokens * top_k,)}
        arrays = {
            "x": normal(*leading[source], features),
            "kernel": normal(experts, features, out_features, scale=features**-0.5),
        }
        if bias:
            arrays["bias"] = normal(experts, out_features)
        if target == "tokens":
            arrays["weights"] = jnp.asarray(rng.random((tokens, top_k)), jnp.promote_types(dtype, jnp.float32))
        expert_index = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k].astype(np.int32)
        return Problem(source, target, arrays, expert_index, normal(*leading[target], out_features))

    return make


@pytest.fixture
def assert_matches(relative_error):
    def check(problem, tolerance=2e-6, **options):
        y, gradients = problem.run(**options)
        expected_y, expected = problem.expected()
        assert relative_error(y, expected_y) < tolerance
        for name in expected:
            assert gradients[name].dtype == problem.arrays[name].dtype
            assert relative_error(gradients[name], expected[name]) < tolerance, name

    return check


@pytest.mark.sample(2)
@pytest.mark.parametrize(("source", "target"), PATHS)
def test_every_path_and_its_gradients_match_the_formulas(source, target, make_problem, assert_matches):
    assert_matches(make_problem(source, target))


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("length", "features", "top_k", "bias"),
    [
        # Every pair of a width, a length and a K; the biases in turn.
        (LENGTHS[(i + j) % 3], features, TOP_KS[(i + 2 * j) % 3], (i + j) % 2 == 0)
        for i, features in enumerate(WIDTHS)
        for j in range(3)
    ],
)
def test_the_two_maps_of_an_mlp_match_at_the_reference_sizes_of_scattermoe(
    length, features, top_k, bias, make_problem, assert_matches
):
    hidden = 4 * features // top_k
    sizes = {"tokens": length, "experts": 8, "top_k": top_k, "bias": bias}
    assert_matches(make_problem("tokens", "rows", features=features, out_features=hidden, **sizes))
    assert_matches(make_problem("rows", "tokens", features=hidden, out_features=features, **sizes))


@pytest.mark.parametrize(("source", "target"), [("tokens", "tokens"), ("rows", "tokens"), ("assignments", "rows")])
def test_gradients_match_in_float64(source, target, make_problem, assert_matches):
    with jax.enable_x64(True):
        assert_matches(make_problem(source, target, dtype=jnp.float64), tolerance=1e-14)


@pytest.mark.parametrize(("source", "target"), [("tokens", "rows"), ("rows", "tokens"), ("tokens", "tokens")])
def test_bfloat16_matches_within_its_rounding(source, target, make_problem, assert_matches):
    assert_matches(make_problem(source, target, tokens=200, features=64, dtype=jnp.bfloat16), tolerance=1e-2)


def test_a_float32_kernel_is_cast_to_the_dtype_of_x_and_its_gradient_is_not(make_problem, relative_error):
    problem = make_problem("tokens", "tokens", tokens=200, features=64)
    problem.arrays["x"] = problem.arrays["x"].astype(jnp.bfloat16)
    problem.dy = problem.dy.astype(jnp.bfloat16)
    y, gradients = problem.run()
    _, expected = problem.expected()
    assert y.dtype == jnp.bfloat16
    assert gradients["kernel"].dtype == gradients["bias"].dtype == jnp.float32
    assert relative_error(gradients["kernel"], expected["kernel"]) < 1e-2


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_named_implementations_agree(implementation, make_problem, assert_matches):
    assert_matches(make_problem("tokens", "tokens"), implementation=implementation)


@pytest.mark.sample(2)
@pytest.mark.parametrize(("source", "target"), PATHS)
def test_absent_assignments_leak_nothing_even_where_memory_holds_nan(source, target, make_problem, assert_matches):
    problem = make_problem(source, target, tokens=9, top_k=3)
    absent = np.random.default_rng(0).random((9, 3)) < 0.4
    absent[0] = True
    problem.expert_index[absent] = -1
    num_present = int((~absent).sum())
    gone = {"tokens": 0, "assignments": absent, "rows": slice(num_present, None)}
    problem.arrays["x"] = problem.arrays["x"].at[gone[source]].set(jnp.nan)
    problem.dy = problem.dy.at[gone[target]].set(jnp.nan)
    if target == "tokens":
        problem.arrays["weights"] = jnp.where(absent, jnp.nan, problem.arrays["weights"])
    assert_matches(problem)
    y, gradients = problem.run()
    assert np.all(y[gone[target]] == 0)
    assert np.all(gradients["x"][gone[source]] == 0)


@pytest.mark.parametrize(
    ("source", "target"), [("tokens", "tokens"), ("tokens", "assignments"), ("rows", "tokens"), ("rows", "assignments")]
)
def test_a_flat_list_of_assignments_keeps_their_order(source, target, make_problem, assert_matches):
    problem = make_problem(source, target, tokens=6)
    problem.expert_index[1, 0] = -1
    problem.flat = True
    if target == "tokens":
        problem.arrays["weights"] = problem.arrays["weights"].ravel()
    else:
        problem.dy = problem.dy.reshape(-1, problem.dy.shape[-1])
    assert_matches(problem, num_tokens=6 if source == "rows" else None)


@pytest.mark.parametrize("expert", [0, 3])
def test_all_tokens_on_one_expert_give_the_others_no_gradient(expert, make_problem, assert_matches):
    problem = make_problem("tokens", "tokens", top_k=1)
    problem.expert_index[:] = expert
    assert_matches(problem)
    _, gradients = problem.run()
    assert np.all(np.delete(gradients["kernel"], expert, axis=0) == 0)
    assert np.all(np.delete(gradients["bias"], expert, axis=0) == 0)


@pytest.mark.parametrize(("source", "target"), [("tokens", "tokens"), ("assignments", "rows"), ("rows", "assignments")])
def test_no_tokens_give_an_empty_result(source, target, make_problem, assert_matches):
    assert_matches(make_problem(source, target, tokens=0))


@pytest.mark.parametrize(("source", "target"), PATHS)
def test_only_the_arguments_and_integers_are_kept_for_the_backward(source, target, make_problem):
    problem = make_problem(source, target, dtype=jnp.bfloat16)
    ordered = {"grouped_in": source == "rows", "grouped_out": target == "rows"}

    def apply(arrays):
        dispatch = make_dispatch(problem.routing, 4)
        return jmoe.parallel_linear(**arrays, dispatch=dispatch, **ordered)

    kept = jax.tree.leaves(jax.eval_shape(lambda arrays: jax.vjp(apply, arrays)[1], problem.arrays))
    floats = sorted(a.shape for a in kept if jnp.issubdtype(a.dtype, jnp.floating))
    assert floats == sorted(a.shape for a in problem.arrays.values())


def test_vmap_checkpoint_and_scan_give_the_same(make_problem, relative_error):
    problem = make_problem("tokens", "tokens")
    kernel, weights = problem.arrays["kernel"], problem.arrays["weights"]
    dispatch = make_dispatch(problem.routing, 4)

    def loss(x):
        return jnp.sum(jmoe.parallel_linear(x, kernel, dispatch, weights=weights) ** 2)

    xs = jnp.stack([problem.arrays["x"], 2 * problem.arrays["x"]])
    expected = jnp.stack([jax.jit(jax.grad(loss))(x) for x in xs])
    assert relative_error(jax.jit(jax.vmap(jax.grad(loss)))(xs), expected) < 1e-6
    assert relative_error(jax.jit(lambda xs: jax.lax.map(jax.grad(jax.checkpoint(loss)), xs))(xs), expected) < 1e-6


def test_bad_arguments_are_named(make_problem, without_annotation_checks):
    problem = make_problem("tokens", "tokens")
    x, kernel = problem.arrays["x"], problem.arrays["kernel"]
    dispatch = make_dispatch(problem.routing, 4)
    flat = make_dispatch(dataclasses.replace(problem, flat=True).routing, 4)
    first = jmoe.Routing(problem.routing.expert_index[:1], jnp.ones((1, 2)))
    weights = jnp.ones((7, 2))
    for call, message in (
        (lambda: jmoe.parallel_linear(x[:, :3], kernel, dispatch), r"x is .*\[7, 3\]; it must be .*\[T=7, D=5\]"),
        (lambda: jmoe.parallel_linear(x[:3], kernel, dispatch), r"x is .*\[3, 5\]; it must be .*\[T=7, D=5\]"),
        (
            lambda: jmoe.parallel_linear(jnp.ones((14, 5)), kernel, dispatch),
            r"x is .*\[14, 5\]; .* or \[T, K, D\], a row for each assignment",
        ),
        (lambda: jmoe.parallel_linear(x, kernel, problem.routing), "dispatch is a Routing; it must be a jmoe.Dispatch"),
        (lambda: jmoe.parallel_linear(x, kernel[:3], dispatch), r"kernel is .*; it must be .*\[E=4, D, N\]"),
        (lambda: jmoe.parallel_linear(x, kernel, dispatch, grouped_in=True), r"x is .*; .*\[R=14, D=5\].*grouped_in"),
        (lambda: jmoe.parallel_linear(x, kernel, dispatch, bias=kernel[:, 0, :2]), r"bias is .*\[E=4, N=6\]"),
        (lambda: jmoe.parallel_linear(x, kernel, dispatch, weights=weights[:, :1]), r"weights is .*\[T=7, K=2\]"),
        (
            lambda: jmoe.parallel_linear(x, kernel, dispatch, weights=weights, grouped_out=True),
            "weights .* grouped_out",
        ),
        (lambda: jmoe.parallel_linear(x, kernel, dispatch, num_tokens=3), "num_tokens is 3 .* leave num_tokens out"),
        (lambda: jmoe.parallel_linear(x[:, None], kernel, flat), r"x is \[T, K, D\] and dispatch is of Assignments"),
        (
            lambda: jmoe.parallel_linear(jnp.ones((14, 5)), kernel, flat, grouped_in=True, weights=jnp.ones(14)),
            "pass num_tokens",
        ),
        (
            lambda: jmoe.parallel_linear(x[:1], kernel, dispatch_unsorted(first, 4)),
            "dispatch has expert_of_group.* jmoe.make_dispatch",
        ),
        (lambda: jmoe.ParallelLinear(0, 3, 4, rngs=nnx.Rngs(0)), "in_features is 0; it must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_module_applies_its_kernel_and_bias(make_problem, relative_error):
    problem = make_problem("tokens", "tokens")
    linear = jmoe.ParallelLinear(5, 6, 4, use_bias=True, bias_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(0))
    problem.arrays |= {name: parameter[...] for name, parameter in nnx.to_pure_dict(nnx.state(linear)).items()}
    dispatch = make_dispatch(problem.routing, 4)
    run = nnx.jit(lambda linear, x, weights: linear(x, dispatch, weights=weights))
    y = run(linear, problem.arrays["x"], problem.arrays["weights"])
    assert relative_error(y, problem.expected()[0]) < 2e-6


def test_the_module_computes_in_its_dtype_and_initializes_each_expert_by_its_own_fan_in():
    linear = jmoe.ParallelLinear(64, 32, 100, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    dispatch = jmoe.make_dispatch(jmoe.Routing(jnp.array([[0], [99]]), jnp.ones((2, 1))), 100)
    assert linear(jnp.ones((2, 64)), dispatch).dtype == jnp.bfloat16
    assert linear.kernel.dtype == jnp.float32
    np.testing.assert_allclose(linear.kernel[...].std(), 64**-0.5, rtol=0.02)


@pytest.mark.parametrize(
    ("source", "target", "gradients", "calls"),
    [
        ("tokens", "rows", True, 4),
        ("rows", "assignments", True, 3),
        ("assignments", "tokens", False, 2),
    ],  # 1 to combine
)
def test_on_a_hopper_gpu_scattered_rows_are_read_inside_the_kernels(
    source, target, gradients, calls, make_problem, lower_for_cuda
):
    problem = make_problem(
        source, target, tokens=512, experts=8, features=256, out_features=128, bias=False, dtype=jnp.bfloat16
    )

    def run(expert_index, dy, *arrays):
        def apply(*arrays):
            dispatch = jmoe.make_dispatch(jmoe.Routing(expert_index, jnp.ones(expert_index.shape)), 8)
            named = dict(zip(problem.arrays, arrays, strict=True))
            ordered = {"grouped_in": source == "rows", "grouped_out": target == "rows"}
            return jmoe.parallel_linear(**named, dispatch=dispatch, **ordered)

        if not gradients:
            return apply(*arrays)
        y, pull_back = jax.vjp(apply, *arrays)
        return y, pull_back(dy)

    arrays = problem.expert_index, problem.dy, *problem.arrays.values()
    program = lower_for_cuda(run, *((array.shape, array.dtype) for array in arrays))
    assert program.count("custom_call @mosaic_gpu") == calls
    scattered = 128 if source == "rows" else 256  # the width of the side that is: of dy, or of x
    assert not re.search(rf"gather.*-> tensor<1024x{scattered}xbf16>", program)
