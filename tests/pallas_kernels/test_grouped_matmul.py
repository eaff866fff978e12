"""The values of the grouped matmul and of the weight gradient, on any platform."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul, grouped_weight_gradient

IMPLEMENTATIONS = ["reference", "xla"]
TOLERANCE = {jnp.bfloat16: 4e-3, jnp.float16: 5e-4, jnp.float32: 1e-6, jnp.float64: 1e-14}
M, K, N, G = 90, 12, 20, 5
SIZES = [
    [20, 10, 25, 15, 20],  # uniform, sum M
    [33, 0, 57, 0, 0],  # empty groups, odd sizes, several blocks
    [0, 90, 0, 0, 0],  # all rows in one group
    [0, 0, 0, 0, 90],
    [1, 1, 1, 1, 1],  # a row each
    [0, 0, 1, 0, 0],
    [0, 0, 0, 0, 0],  # no row at all
    [31, 3, 0, 32, 1],  # sum below M
    [-7, 40, -1, 33, 2],  # negative sizes count as 0
    [60, 60, 60, 60, 60],  # sum above M
    [89, 2**31 - 1, 2**31 - 1, 5, 5],
]


def forward_and_backward(implementation, transpose_rhs, dtype=None):
    """A compiled function of (lhs, rhs, group_sizes, out_grad): the product, and the operands' gradients."""

    @jax.jit
    def run(lhs, rhs, group_sizes, out_grad):
        multiply = functools.partial(
            grouped_matmul,
            group_sizes=group_sizes,
            preferred_element_type=dtype,
            transpose_rhs=transpose_rhs,
            implementation=implementation,
        )
        out, pull_back = jax.vjp(multiply, lhs, rhs)
        return out, *pull_back(out_grad)

    return run


def operands(normal, m, k, n, g, dtype, transpose_rhs):
    lhs, out_grad = normal(m, k, dtype=dtype), normal(m, n, dtype=dtype, seed=2)
    return lhs, normal(g, *((n, k) if transpose_rhs else (k, n)), dtype=dtype, seed=1), out_grad


def with_nan_past(array, sizes):
    """Fills the rows past the last group with NaN."""
    rows = np.maximum(np.array(sizes, np.int64), 0).sum()
    return jnp.where(jnp.arange(array.shape[0])[:, None] < rows, array, jnp.nan)


@pytest.mark.parametrize("transpose_rhs", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_product_and_gradients_match_a_loop_for_any_group_sizes_with_nan_past_the_groups(
    implementation, dtype, transpose_rhs, normal, loop_matmul, loop_weight_gradient, relative_error
):
    with jax.enable_x64(dtype == jnp.float64):
        lhs, rhs, out_grad = operands(normal, M, K, N, G, dtype, transpose_rhs)
        run = forward_and_backward(implementation, transpose_rhs)
        for sizes in SIZES:
            lhs_nan, out_grad_nan = with_nan_past(lhs, sizes), with_nan_past(out_grad, sizes)
            results = run(lhs_nan, rhs, jnp.array(sizes, jnp.int32), out_grad_nan)
            rhs_grad = loop_weight_gradient(lhs, out_grad, sizes)
            expected = (
                loop_matmul(lhs, rhs, sizes, transpose_rhs=transpose_rhs),
                loop_matmul(out_grad, rhs, sizes, transpose_rhs=not transpose_rhs),
                rhs_grad.swapaxes(1, 2) if transpose_rhs else rhs_grad,
            )
            for result, value, name in zip(results, expected, ("out", "lhs_grad", "rhs_grad"), strict=True):
                assert result.dtype == dtype
                assert relative_error(result, value) < TOLERANCE[dtype], (name, sizes)
                # Rows past the groups, and matrices of empty groups, are zero and not only nearly so.
                assert np.all(np.asarray(result)[value == 0] == 0), (name, sizes)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_group_sizes_may_be_unsigned(implementation, normal):
    lhs, rhs, out_grad = operands(normal, M, K, N, G, jnp.float32, False)
    run = forward_and_backward(implementation, False)
    signed, unsigned = jnp.array([31, 0, 20, 39, 0]), jnp.array([31, 0, 20, 2**32 - 1, 5], jnp.uint32)
    expected = run(lhs, rhs, signed, out_grad)
    for result, value in zip(run(lhs, rhs, unsigned, out_grad), expected, strict=True):
        np.testing.assert_array_equal(result, value)


@pytest.mark.parametrize("transpose_rhs", [False, True])
@pytest.mark.parametrize(
    ("m", "k", "n", "sizes"),
    [
        (1, 1, 1, [1]),
        (3, 5, 2, [0, 3]),
        (1000, 3, 5, [513, 487]),
        (1000, 7, 3, [0, 999]),
        (300, 2, 3, [1] * 64 + [0] * 64 + [2] * 64),  # blocks shorter than the shortest
        (2500, 2, 2, [2500]),
    ],
)
def test_xla_matches_a_loop_for_any_height_of_its_blocks(
    m, k, n, sizes, transpose_rhs, normal, loop_matmul, loop_weight_gradient, relative_error
):
    lhs, rhs, out_grad = operands(normal, m, k, n, len(sizes), jnp.float32, transpose_rhs)
    out, lhs_grad, rhs_grad = forward_and_backward("xla", transpose_rhs)(lhs, rhs, jnp.array(sizes), out_grad)
    assert relative_error(out, loop_matmul(lhs, rhs, sizes, transpose_rhs=transpose_rhs)) < 1e-6
    assert relative_error(lhs_grad, loop_matmul(out_grad, rhs, sizes, transpose_rhs=not transpose_rhs)) < 1e-6
    expected = loop_weight_gradient(lhs, out_grad, sizes)
    assert relative_error(rhs_grad.swapaxes(1, 2) if transpose_rhs else rhs_grad, expected) < 1e-6


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, None])
@pytest.mark.parametrize(("m", "k", "n"), [(0, 3, 2), (4, 0, 2), (4, 3, 0), (0, 0, 0)])
def test_an_empty_operand_gives_zeros_of_the_right_shape_and_dtype(m, k, n, implementation):
    lhs, rhs, sizes = jnp.ones((m, k), jnp.bfloat16), jnp.ones((2, k, n), jnp.bfloat16), jnp.array([1, 3])
    run = forward_and_backward(implementation, False, jnp.float32)
    out, lhs_grad, rhs_grad = run(lhs, rhs, sizes, jnp.ones((m, n)))
    assert (out.shape, out.dtype) == ((m, n), jnp.float32)
    assert (lhs_grad.shape, lhs_grad.dtype) == ((m, k), jnp.bfloat16)
    assert (rhs_grad.shape, rhs_grad.dtype) == ((2, k, n), jnp.bfloat16)
    assert not jnp.any(out)
    assert not jnp.any(lhs_grad)
    assert not jnp.any(rhs_grad)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_of_one_group_stays_there(implementation, normal):
    lhs, rhs, out_grad = operands(normal, 50, 4, 3, 3, jnp.float32, False)
    sizes = jnp.array([17, 16, 17])
    run = forward_and_backward(implementation, False)
    out, lhs_grad, rhs_grad = run(lhs.at[20].set(jnp.nan), rhs, sizes, out_grad)
    np.testing.assert_array_equal(np.isnan(out).any(axis=1), np.arange(50) == 20)
    np.testing.assert_array_equal(np.isnan(rhs_grad).any(axis=(1, 2)), [False, True, False])
    assert not np.isnan(lhs_grad).any()

    out, lhs_grad, rhs_grad = run(lhs, rhs.at[1].set(jnp.nan), sizes, out_grad)
    in_group = (np.arange(50) >= 17) & (np.arange(50) < 33)
    np.testing.assert_array_equal(np.isnan(out).any(axis=1), in_group)
    np.testing.assert_array_equal(np.isnan(lhs_grad).any(axis=1), in_group)
    assert not np.isnan(rhs_grad).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_matrix_of_an_empty_group_is_not_looked_at(implementation, normal):
    lhs, rhs, out_grad = operands(normal, 50, 4, 3, 3, jnp.float32, False)
    rhs = rhs.at[1].set(jnp.inf)
    results = forward_and_backward(implementation, False)(lhs, rhs, jnp.array([20, 0, 20]), out_grad)
    assert all(np.isfinite(result).all() for result in results)
    assert np.all(results[2][1] == 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_result_has_the_preferred_element_type_and_its_precision(
    implementation, normal, loop_matmul, loop_weight_gradient, relative_error
):
    lhs, rhs, out_grad = operands(normal, M, K, N, 2, jnp.bfloat16, False)
    sizes = jnp.array([50, 40])
    keywords = {"preferred_element_type": jnp.float32, "implementation": implementation}
    out = grouped_matmul(lhs, rhs, sizes, **keywords)
    assert out.dtype == jnp.float32
    assert relative_error(out, loop_matmul(lhs, rhs, sizes)) < 1e-6
    gradient = grouped_weight_gradient(lhs, out_grad, sizes, **keywords)
    assert gradient.dtype == jnp.float32
    assert relative_error(gradient, loop_weight_gradient(lhs, out_grad, sizes)) < 1e-6
    keywords["preferred_element_type"] = jnp.bfloat16
    wide = grouped_matmul(lhs.astype(jnp.float32), rhs.astype(jnp.float32), sizes, **keywords)
    assert wide.dtype == jnp.bfloat16


def test_operands_of_different_dtypes_are_promoted_and_each_gets_a_gradient_of_its_own_dtype(
    normal, loop_matmul, relative_error
):
    lhs, rhs = normal(M, K, dtype=jnp.bfloat16), normal(2, K, N)
    sizes = jnp.array([50, 40])
    out, lhs_grad, rhs_grad = forward_and_backward(None, False)(lhs, rhs, sizes, normal(M, N))
    assert (out.dtype, lhs_grad.dtype, rhs_grad.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert relative_error(out, loop_matmul(lhs, rhs, sizes)) < 1e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_half_precision_is_summed_in_float32(implementation):
    # In bfloat16 a sum of ones stops at 256, in float16 at 2048.
    lhs, rhs = jnp.ones((4, 5000), jnp.float16), jnp.ones((1, 5000, 1), jnp.float16)
    np.testing.assert_array_equal(grouped_matmul(lhs, rhs, jnp.array([4]), implementation=implementation), 5000)
    column = jnp.ones((5000, 1), jnp.bfloat16)
    gradient = grouped_weight_gradient(column, column, jnp.array([4992]), implementation=implementation)
    np.testing.assert_array_equal(gradient, 4992)


def test_it_is_a_drop_in_for_ragged_dot(normal, relative_error):
    ours, theirs = (list(inspect.signature(f).parameters.values()) for f in (grouped_matmul, jax.lax.ragged_dot))
    positional = [p for p in ours if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in theirs[: len(positional)]]
    lhs, rhs = normal(M, K, dtype=jnp.bfloat16), normal(3, K, N, dtype=jnp.bfloat16)
    sizes = jnp.array([30, 0, 47])
    arguments: list[tuple[Any, ...]] = [
        (),
        (jax.lax.Precision.HIGHEST,),
        ("highest", jnp.float32),
        (None, jnp.float32, None),
    ]
    for rest in arguments:
        expected = jax.lax.ragged_dot(lhs, rhs, sizes, *rest)
        out = grouped_matmul(lhs, rhs, sizes, *rest)
        assert out.dtype == expected.dtype
        assert relative_error(out, expected) < 4e-3


def test_precision_reaches_every_product(normal):
    lhs, rhs, out_grad = operands(normal, M, K, N, 2, jnp.float32, False)
    for implementation in IMPLEMENTATIONS:

        def run(lhs, rhs, out_grad, implementation=implementation):
            keywords = {"precision": "highest", "implementation": implementation}
            multiply = functools.partial(grouped_matmul, group_sizes=jnp.array([50, 40]), **keywords)
            return jax.vjp(multiply, lhs, rhs)[1](out_grad)

        program = jax.jit(run).lower(lhs, rhs, out_grad).as_text()
        products = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
        assert len(products) >= 2
        assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def arrays_in(jaxpr):
    """The shapes of all arrays that a program makes, those of its loops and calls included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from arrays_in(inner)


@pytest.mark.parametrize("transpose_rhs", [False, True])
def test_xla_makes_no_array_larger_than_operands_and_result(transpose_rhs, normal):
    m, k, n, g = 512, 64, 48, 32
    lhs, rhs, out_grad = operands(normal, m, k, n, g, jnp.bfloat16, transpose_rhs)

    def largest(implementation):
        run = forward_and_backward(implementation, transpose_rhs)
        jaxpr = jax.make_jaxpr(run)(lhs, rhs, jnp.full(g, m // g), out_grad).jaxpr
        return max(int(np.prod(shape)) for shape in arrays_in(jaxpr))

    # 47 blocks: [G, M, K], [M, K, N] and [blocks, K, N] would all be larger.
    assert largest("xla") == max(m * k, g * k * n, m * n)
    assert largest("reference") == g * m * max(k, n)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_weight_gradient_may_be_called_on_its_own(implementation, normal, loop_weight_gradient, relative_error):
    lhs, out_grad = normal(M, K), normal(M, N, seed=1)
    run = jax.jit(functools.partial(grouped_weight_gradient, implementation=implementation))
    for sizes in SIZES:
        gradient = run(with_nan_past(lhs, sizes), with_nan_past(out_grad, sizes), jnp.array(sizes, jnp.int32))
        expected = loop_weight_gradient(lhs, out_grad, sizes)
        assert relative_error(gradient, expected) < 1e-6, sizes
        assert np.all(np.asarray(gradient)[expected == 0] == 0), sizes


def test_the_same_inputs_give_the_same_bits(normal):
    run = forward_and_backward(None, False)
    arguments = operands(normal, M, K, N, G, jnp.bfloat16, False)
    first, second = (run(*arguments[:2], jnp.array(SIZES[1]), arguments[2]) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
