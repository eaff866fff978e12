"""Block-sparse products on a Hopper GPU, against the reference in float32."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from pallas_kernels.block_sparse import BlockSparseMatrix, dds, dsd, expert_topology, sdd

pytestmark = pytest.mark.gpu

SHAPES = [  # STK's: rows, columns, width, share of zero blocks
    (128, 128, 128, 0.0),
    (256, 256, 256, 0.5),
    (2048, 512, 1024, 0.8),
    (512, 128, 128, 0.0),
    (128, 512, 128, 0.0),
    *((1024, 512, 512, sparsity) for sparsity in (0.0, 0.5, 0.75)),
    *((512, 1024, 512, sparsity) for sparsity in (0.0, 0.5, 0.75)),
    *((1024, 1024, 1024, sparsity) for sparsity in (0.0, 0.5, 0.75)),
    (640, 896, 320, 0.6),
]
# The relative error of rounding the result; in float32, of sums in another order.
TOLERANCE = {jnp.bfloat16: 4e-3, jnp.float16: 5e-4, jnp.float32: 1e-5}
FLAGS = list(itertools.product([False, True], repeat=2))


def normal(seed, *shape, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def transposed(array, flag):
    return array.T if flag else array


def topology_values(topology):
    return topology.max_num_blocks, topology.block, topology.block


def with_nan_in_padding(values, topology):
    return jnp.where(topology.is_block[:, None, None], values, jnp.nan)


@functools.cache
def random_topology(rows, columns, sparsity, block=128):
    draw = functools.partial(BlockSparseMatrix.random, shape=(rows, columns), sparsity=sparsity, block=block)
    return jax.jit(lambda key: draw(key).topology)(jax.random.key(7))


@functools.cache
def topology_of_experts(block=128):
    make = jax.jit(lambda sizes: expert_topology(sizes, [384, 128, 256, 1024], num_rows=1000, block=block))
    return make(jnp.array([130, 0, 511, 300]))


def cases():
    """Each shape with one choice of transposes and dtype; the last two with all transposes."""
    dtypes = itertools.cycle([jnp.bfloat16, jnp.float16])
    for i, (shape, dtype) in enumerate(zip(SHAPES, dtypes, strict=False)):
        rows, columns, width, sparsity = shape
        make = functools.partial(random_topology, rows, columns, sparsity)
        for flags in FLAGS if shape == SHAPES[-1] else [FLAGS[i // 2 % 4]]:
            yield pytest.param(make, width, flags, dtype, id=f"{shape}-{flags}-{jnp.dtype(dtype).name}")
    for block, flags in itertools.product((128, 64), FLAGS):
        make = functools.partial(topology_of_experts, block)
        yield pytest.param(make, 576, flags, jnp.bfloat16, id=f"experts-{flags}-{block}")
    for flags, width in zip(FLAGS, (320, 384, 64, 1024), strict=True):
        make = functools.partial(random_topology, 640, 832, 0.6, 64)
        yield pytest.param(make, width, flags, jnp.float16, id=f"64-{width}-{flags}")


CASES = pytest.mark.parametrize(("make_topology", "width", "flags", "dtype"), list(cases()))


def run_both(function, *arrays):
    """Runs on the kernels, and on the reference in float32."""
    run = jax.jit(functools.partial(function, implementation="mosaic_gpu"))
    assert run.lower(*arrays).as_text().count("custom_call @mosaic_gpu") == 3
    wide = [array.astype(jnp.float32) for array in arrays]
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(functools.partial(function, implementation="reference"))(*wide)
    return zip(run(*arrays), expected, strict=True)


@CASES
def test_sparse_results_and_their_gradients_match_the_reference(make_topology, width, flags, dtype, relative_error):
    topology = make_topology()
    lhs = transposed(normal(0, topology.shape[0], width, dtype=dtype), flags[0])
    rhs = transposed(normal(1, width, topology.shape[1], dtype=dtype), flags[1])
    grad = normal(2, *topology_values(topology), dtype=dtype)

    def product_and_gradients(lhs, rhs, grad, implementation):
        def multiply(lhs, rhs):
            options = {"transpose_lhs": flags[0], "transpose_rhs": flags[1]}
            return sdd(lhs, rhs, topology, **options, implementation=implementation).values

        values, pull_back = jax.vjp(multiply, lhs, rhs)
        return values, *pull_back(with_nan_in_padding(grad, topology))

    for result, expected in run_both(product_and_gradients, lhs, rhs, grad):
        assert result.dtype == dtype
        assert relative_error(result, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("operation", [dsd, dds])
@CASES
def test_products_of_sparse_operands_and_their_gradients_match_the_reference(
    make_topology, width, flags, dtype, operation, relative_error
):
    topology = make_topology()
    transpose_sparse, transpose_dense = flags
    left, right = topology.shape[::-1] if transpose_sparse else topology.shape
    values = normal(0, *topology_values(topology), dtype=dtype)
    of_dense = (right, width) if operation is dsd else (width, left)
    dense = transposed(normal(1, *of_dense, dtype=dtype), transpose_dense)
    grad = normal(2, *((left, width) if operation is dsd else (width, right)), dtype=dtype)

    def product_and_gradients(values, dense, grad, implementation):
        def multiply(values, dense):
            sparse = BlockSparseMatrix(with_nan_in_padding(values, topology), topology, transpose_sparse)
            if operation is dsd:
                return dsd(sparse, dense, transpose_rhs=transpose_dense, implementation=implementation)
            return dds(dense, sparse, transpose_lhs=transpose_dense, implementation=implementation)

        out, pull_back = jax.vjp(multiply, values, dense)
        return out, *pull_back(grad)

    for result, expected in run_both(product_and_gradients, values, dense, grad):
        assert result.dtype == dtype
        assert relative_error(result, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("operation", ["sdd", "dsd", "dds"])
def test_float32_results_are_not_rounded(operation, relative_error):
    topology = topology_of_experts()
    x, w = normal(0, topology.shape[0], 320), normal(1, 320, topology.shape[1])
    values = with_nan_in_padding(normal(2, topology.max_num_blocks, 128, 128), topology)

    @functools.partial(jax.jit, static_argnums=3)
    def run(x, w, values, implementation):
        options = {"preferred_element_type": jnp.float32, "implementation": implementation}
        if operation == "sdd":
            return sdd(x, w, topology, **options).values
        sparse = BlockSparseMatrix(values, topology)
        return dsd(sparse, w.T, **options) if operation == "dsd" else dds(x.T, sparse, **options)

    out = run(x, w, values, "mosaic_gpu")
    assert out.dtype == jnp.float32
    with jax.default_matmul_precision("highest"):
        expected = run(*(array.astype(jnp.float32) for array in (x, w, values)), "reference")
    assert relative_error(out, expected) < TOLERANCE[jnp.float32]


def test_repeated_runs_give_the_same_bits():
    topology = expert_topology(jnp.array([3000, 1, 0, 9000]), [2048, 1024, 512, 2048], num_rows=12001)
    x, w = normal(0, topology.shape[0], 768), normal(1, 768, topology.shape[1])

    @jax.jit
    def run(x, w):
        product = sdd(x, w, topology, implementation="mosaic_gpu")
        return product.values, dsd(product, w, transpose_rhs=True), dds(x, product, transpose_lhs=True)

    first = [np.asarray(result).view(np.uint16) for result in run(x, w)]
    for _ in range(10):
        for result, expected in zip(run(x, w), first, strict=True):
            np.testing.assert_array_equal(np.asarray(result).view(np.uint16), expected)


@pytest.mark.parametrize(("activation", "last"), [("swiglu", 128), ("gelu", 128), ("swiglu", 64)])
def test_experts_of_different_widths_run_on_the_kernels(activation, last, relative_error):
    tokens, features, hidden_sizes = 999, 256, (384, 128, 256, last)
    parts = 2 if activation == "swiglu" else 1
    x = normal(0, tokens, features)
    w_up = normal(1, features, parts * sum(hidden_sizes)) * features**-0.5
    w_down = normal(2, sum(hidden_sizes), features) * 256**-0.5
    weight = jax.random.uniform(jax.random.key(3), (tokens, 2))
    logits = jax.random.normal(jax.random.key(4), (tokens, 4)).at[:, 3].set(-1e9)  # no token goes to the last expert
    routing = jmoe.route_top_k(logits, 2)

    @jax.jit
    def run(x, w_up, w_down, weight, dy):
        def mlp(x, w_up, w_down, weight):
            chosen = jmoe.Routing(routing.expert_index, weight)
            return jmoe.moe_mlp(x, w_up, w_down, chosen, activation=activation, hidden_sizes=hidden_sizes)

        y, pull_back = jax.vjp(mlp, x, w_up, w_down, weight)
        return y, *pull_back(dy)

    arrays = x, w_up, w_down, weight, normal(5, tokens, features)
    # Six products, and the combines of the outputs and of the gradient of x.
    assert run.lower(*arrays).as_text().count("custom_call @mosaic_gpu") == 8
    with jax.default_matmul_precision("highest"):
        expected = run(*(array.astype(jnp.float32) for array in arrays))
    for result, value in zip(run(*arrays), expected, strict=True):
        # The pre-activations, activations and their gradients are rounded to bfloat16 on the way.
        assert relative_error(result, value) < 1e-2
