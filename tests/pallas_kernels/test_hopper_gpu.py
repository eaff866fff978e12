"""The Hopper kernels on a Hopper GPU, against the reference in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe.activations import value_and_derivative
from pallas_kernels import activation_gradient, grouped_matmul, grouped_weight_gradient

pytestmark = pytest.mark.gpu

PROBLEMS = [  # M, K, N, sizes
    (1000, 256, 512, [100, 0, 277, 1, 500, 64]),
    (77, 128, 192, [77]),
    (5, 64, 64, [1, 0, 3]),
    (4096, 512, 768, [0, 4096, 0]),
    (3000, 320, 1088, [999, 1, 7, 1500, 130]),
    (2048, 192, 256, [7, 9] * 128),
    (640, 64, 128, [0, 0, 0]),
    (512, 128, 128, [300, -5, 300, 10]),  # more than there are rows
    (20000, 1024, 512, [2500] * 8),  # several tiles for each multiprocessor
]
# The relative error of rounding the result; in float32, of sums in another order.
TOLERANCE = {jnp.bfloat16: 4e-3, jnp.float16: 5e-4, jnp.float32: 1e-5}
CASES = [(*problem, jnp.bfloat16, jnp.bfloat16) for problem in PROBLEMS] + [
    (*PROBLEMS[0], *dtypes) for dtypes in ((jnp.bfloat16, jnp.float32), (jnp.float16, jnp.float16))
]
mosaic_matmul = functools.partial(grouped_matmul, implementation="mosaic_gpu")
mosaic_weight_gradient = functools.partial(grouped_weight_gradient, implementation="mosaic_gpu")


def exactly(function):
    """The reference implementation of a function of 16-bit arrays, in float32."""

    @jax.jit
    def run(*arrays):
        wide = [a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in arrays]
        return function(*wide, precision="highest", implementation="reference")

    return run


def random_normal(seed, *shape, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def matmul_operands(m, k, n, sizes, dtype, transpose_rhs=False, *, batch=()):
    rhs = random_normal(1, *batch, len(sizes), *((n, k) if transpose_rhs else (k, n)), dtype=dtype)
    return random_normal(0, *batch, m, k, dtype=dtype), rhs, jnp.array(sizes, jnp.int32)


def nan_past(array, sizes):
    rows = min(sum(max(size, 0) for size in sizes), array.shape[0])
    return array.at[rows:].set(jnp.nan), rows


@pytest.mark.parametrize("transpose_rhs", [False, True])
@pytest.mark.parametrize(("m", "k", "n", "sizes", "dtype", "out_dtype"), CASES)
def test_the_product_matches_the_reference_with_nan_past_the_groups(
    m, k, n, sizes, transpose_rhs, dtype, out_dtype, relative_error
):
    lhs, rhs, group_sizes = matmul_operands(m, k, n, sizes, dtype, transpose_rhs)
    lhs, rows = nan_past(lhs, sizes)
    multiply = functools.partial(grouped_matmul, transpose_rhs=transpose_rhs)
    run = jax.jit(functools.partial(multiply, preferred_element_type=out_dtype, implementation="mosaic_gpu"))
    out = run(lhs, rhs, group_sizes)
    assert out.dtype == out_dtype
    assert relative_error(out, exactly(multiply)(lhs, rhs, group_sizes)) < TOLERANCE[out_dtype]
    assert not jnp.any(out[rows:])


@pytest.mark.parametrize(("m", "k", "n", "sizes", "dtype", "out_dtype"), CASES)
def test_the_weight_gradient_matches_the_reference_with_nan_past_the_groups(
    m, k, n, sizes, dtype, out_dtype, relative_error
):
    lhs, _ = nan_past(random_normal(0, m, k, dtype=dtype), sizes)
    out_grad, _ = nan_past(random_normal(1, m, n, dtype=dtype), sizes)
    group_sizes = jnp.array(sizes, jnp.int32)
    run = jax.jit(functools.partial(mosaic_weight_gradient, preferred_element_type=out_dtype))
    gradient = run(lhs, out_grad, group_sizes)
    assert gradient.dtype == out_dtype
    expected = exactly(grouped_weight_gradient)(lhs, out_grad, group_sizes)
    assert relative_error(gradient, expected) < TOLERANCE[out_dtype]
    assert not jnp.any(gradient[group_sizes <= 0])


@pytest.mark.parametrize("transpose_rhs", [False, True])
def test_gradients_run_on_the_kernels_and_match_the_reference(transpose_rhs, relative_error):
    m, k, n, sizes = PROBLEMS[0]
    lhs, rhs, group_sizes = matmul_operands(m, k, n, sizes, jnp.bfloat16, transpose_rhs)
    lhs, rows = nan_past(lhs, sizes)
    out_grad, _ = nan_past(random_normal(2, m, n), sizes)

    def gradients(lhs, rhs, out_grad, **options):
        multiply = functools.partial(grouped_matmul, group_sizes=group_sizes, transpose_rhs=transpose_rhs, **options)
        return jax.vjp(multiply, lhs, rhs)[1](out_grad)

    run = jax.jit(gradients)
    assert run.lower(lhs, rhs, out_grad).as_text().count("custom_call @mosaic_gpu") >= 2
    lhs_grad, rhs_grad = run(lhs, rhs, out_grad)
    expected_lhs_grad, expected_rhs_grad = exactly(gradients)(lhs, rhs, out_grad)
    assert relative_error(lhs_grad, expected_lhs_grad) < TOLERANCE[jnp.bfloat16]
    assert relative_error(rhs_grad, expected_rhs_grad) < TOLERANCE[jnp.bfloat16]
    assert not jnp.any(lhs_grad[rows:])


def test_repeated_runs_give_the_same_bits():
    m, k, n, sizes = 30000, 512, 768, [1000, 2999, 1, 8000, 5, 0, 17000]
    lhs, rhs, group_sizes = matmul_operands(m, k, n, sizes, jnp.bfloat16)
    out_grad = random_normal(2, m, n)

    @jax.jit
    def run(lhs, rhs, out_grad):
        multiply = functools.partial(mosaic_matmul, group_sizes=group_sizes)
        out, pull_back = jax.vjp(multiply, lhs, rhs)
        return out, *pull_back(out_grad)

    first = [np.asarray(result) for result in run(lhs, rhs, out_grad)]
    for _ in range(10):
        for result, expected in zip(run(lhs, rhs, out_grad), first, strict=True):
            np.testing.assert_array_equal(np.asarray(result).view(np.uint16), expected.view(np.uint16))


def test_vmap_runs_the_kernel_for_every_element(relative_error):
    lhs, rhs, _ = matmul_operands(300, 128, 256, [0] * 4, jnp.bfloat16, batch=(3,))
    sizes = jnp.array([[300, 0, 0, 0], [1, 2, 3, 4], [75, 75, 75, 75]])
    products = jax.jit(jax.vmap(mosaic_matmul))(lhs, rhs, sizes)
    for i in range(3):
        expected = exactly(grouped_matmul)(lhs[i], rhs[i], sizes[i])
        assert relative_error(products[i], expected) < TOLERANCE[jnp.bfloat16]


@pytest.mark.parametrize(("m", "k", "n", "sizes", "dtype", "out_dtype"), CASES)
def test_gathered_rows_give_the_bits_of_rows_gathered_before(m, k, n, sizes, dtype, out_dtype):
    num_sources = max(m // 3, 1)
    index = jax.random.randint(jax.random.key(5), (m,), 0, num_sources)
    # A row that only those past the groups name.
    index = jnp.where(jnp.arange(m) < sum(max(size, 0) for size in sizes), index, num_sources)
    group_sizes = jnp.array(sizes, jnp.int32)

    def sources(columns):
        return random_normal(0, num_sources + 1, columns, dtype=dtype).at[num_sources].set(jnp.nan)

    def assert_same(function, fused, before):
        run = jax.jit(functools.partial(function, preferred_element_type=out_dtype))
        actual, expected = np.asarray(run(**fused)), np.asarray(run(**before))
        np.testing.assert_array_equal(actual.view(np.uint8), expected.view(np.uint8))

    x, (other, _), sizes_ = (
        sources(k),
        nan_past(random_normal(1, m, n, dtype=dtype), sizes),
        {"group_sizes": group_sizes},
    )
    for transpose_rhs in (False, True):
        _, rhs, _ = matmul_operands(m, k, n, sizes, dtype, transpose_rhs)
        multiply = functools.partial(mosaic_matmul, transpose_rhs=transpose_rhs)
        operands = {"rhs": rhs} | sizes_
        assert_same(multiply, {"lhs": x, "lhs_index": index} | operands, {"lhs": x[index]} | operands)
    operands = {"out_grad": other} | sizes_
    assert_same(mosaic_weight_gradient, {"lhs": x, "lhs_index": index} | operands, {"lhs": x[index]} | operands)
    rows, _ = nan_past(random_normal(2, m, k, dtype=dtype), sizes)
    operands, dy = {"lhs": rows} | sizes_, sources(n)
    fused = {"out_grad": dy, "out_grad_index": index}
    assert_same(mosaic_weight_gradient, fused | operands, {"out_grad": dy[index]} | operands)


def test_numbers_of_rows_and_matrices_are_clipped():
    lhs, rhs, _ = matmul_operands(50, 128, 192, [0] * 3, jnp.bfloat16)
    sizes, matrix = jnp.array([100, 20, 7, 1]), jnp.array([2, -1, 99, 1])
    index = jax.random.randint(jax.random.key(1), (130,), -60, 110)
    out = jax.jit(mosaic_matmul)(lhs, rhs, sizes, lhs_index=index, rhs_index=matrix)
    expected = jax.jit(mosaic_matmul)(lhs[jnp.clip(index, 0, 49)], rhs[jnp.array([2, 0, 2, 1])], sizes)
    np.testing.assert_array_equal(np.asarray(out).view(np.uint16), np.asarray(expected).view(np.uint16))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(8, 64), (1001, 320), (5000, 1024)])
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "reglu", "gelu", "relu", "relu_squared", "silu"])
def test_the_activation_gradient_matches_the_reference(activation, rows, width, weighted, relative_error):
    parts = 2 if activation.endswith("glu") else 1
    h, da = random_normal(0, rows, parts * width), random_normal(1, rows, width)
    weight = random_normal(2, rows, dtype=jnp.float32) if weighted else None
    formula = value_and_derivative(activation)

    def run(implementation, *arrays):
        go_back = functools.partial(activation_gradient, value_and_derivative=formula, implementation=implementation)
        return jax.jit(go_back)(*arrays)

    expected = run("reference", h.astype(jnp.float32), da.astype(jnp.float32), weight)
    for result, value in zip(run("mosaic_gpu", h, da, weight), expected, strict=True):
        assert (result is None) == (value is None)
        assert result is None or relative_error(result, value) < TOLERANCE[result.dtype.type]


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_expert_mlps_run_on_the_kernels_forward_and_backward(activation, relative_error):
    tokens, features, hidden, experts, top_k = 999, 256, 192, 8, 2
    width = 2 * hidden if activation == "swiglu" else hidden
    x = random_normal(0, tokens, features)
    w_up = random_normal(1, experts, features, width) * features**-0.5
    w_down = random_normal(2, experts, hidden, features) * hidden**-0.5
    logits = random_normal(3, tokens, experts, dtype=jnp.float32).at[:, 3].set(-1e9)  # no token goes to expert 3
    arrays = (x, w_up, w_down, logits)
    dy = random_normal(4, tokens, features)
    # Each token goes to the same experts in both computations.
    index = jax.lax.top_k(logits, top_k)[1]

    @functools.partial(jax.jit, static_argnames="implementation")
    def run(arrays, dy, implementation):
        def mlp(x, w_up, w_down, logits):
            weight = jax.nn.softmax(jnp.take_along_axis(logits, index, axis=1))
            routing = jmoe.Routing(index.astype(jnp.int32), weight)
            return jmoe.moe_mlp(x, w_up, w_down, routing, activation=activation, implementation=implementation)

        y, pull_back = jax.vjp(mlp, *arrays)
        return y, *pull_back(dy)

    assert "mosaic_gpu" in run.lower(arrays, dy, "mosaic_gpu").as_text()
    results = run(arrays, dy, "mosaic_gpu")
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), arrays)
    with jax.default_matmul_precision("highest"):
        expected = run(wide, dy.astype(jnp.float32), "reference")
    for result, value, name in zip(results, expected, ("y", "x", "w_up", "w_down", "logits"), strict=True):
        # The pre-activations, activations and their gradients are rounded to bfloat16 on the way.
        assert relative_error(result, value) < 1e-2, name
    assert not jnp.any(results[2][3])
    assert not jnp.any(results[3][3])


def test_the_kernel_is_chosen_where_no_implementation_is_named():
    lhs, rhs, sizes = matmul_operands(256, 64, 64, [100, 156], jnp.bfloat16)
    assert "mosaic_gpu" in jax.jit(grouped_matmul).lower(lhs, rhs, sizes).as_text()
