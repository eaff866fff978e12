"""The Hopper kernels lowered for CUDA on a CPU: layouts, TMA boxes and shared memory are checked, nothing runs."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import grouped_matmul, grouped_weight_gradient
from pallas_kernels.grouped_matmul import mosaic_gpu, mosaic_gpu_weight_gradient

SHAPES = {  # M, K, N, G
    "olmoe up": (262144, 2048, 2048, 64),
    "qwen3 up": (262144, 2048, 1536, 128),
    "mixtral down": (16384, 14336, 4096, 8),
    "7B_n256 up": (196608, 1536, 512, 128),
    "narrow": (1000, 64, 64, 3),
    "a row": (1, 128, 192, 1),
    "odd multiples of 64": (777, 320, 1088, 7),
    "more groups than rows": (5, 64, 128, 300),
}
OPERATIONS = ("forward", "transposed", "weight_gradient")


def call(operation, m, k, n, g, dtype=jnp.bfloat16):
    """Returns the public function of an operation, and the shapes and dtypes of its arguments."""
    lhs, sizes = ((m, k), dtype), ((g,), jnp.int32)
    if operation == "weight_gradient":
        return grouped_weight_gradient, lhs, ((m, n), dtype), sizes
    transposed = operation == "transposed"
    matmul = functools.partial(grouped_matmul, transpose_rhs=transposed)
    return matmul, lhs, ((g, n, k) if transposed else (g, k, n), dtype), sizes


def with_config(operation, **fields):
    """Returns the kernel of an operation with other tiles than its default ones."""
    common = {"precision": None, "accumulator_dtype": jnp.dtype(jnp.float32), "out_dtype": jnp.dtype(jnp.bfloat16)}
    if operation == "weight_gradient":
        kernel, config = mosaic_gpu_weight_gradient.grouped_weight_gradient, mosaic_gpu_weight_gradient.Config
        common |= {"lhs_index": None, "out_grad_index": None}
    else:
        kernel, config = mosaic_gpu.grouped_matmul, mosaic_gpu.Config
        common |= {"transpose_rhs": operation == "transposed", "lhs_index": None, "rhs_index": None}
    return functools.partial(kernel, config=config(**fields), **common)


@pytest.mark.sample(3)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_kernel_is_chosen_and_lowers_for_every_shape(operation, shape, lower_for_cuda):
    assert "mosaic_gpu" in lower_for_cuda(*call(operation, *SHAPES[shape]))


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [(jnp.bfloat16, jnp.float32), (jnp.float16, jnp.float16), (jnp.float16, jnp.float32)],
)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_kernel_lowers_for_other_dtypes_of_operands_and_result(operation, dtype, out_dtype, lower_for_cuda):
    function, *arguments = call(operation, 512, 128, 192, 4, dtype)
    assert "mosaic_gpu" in lower_for_cuda(functools.partial(function, preferred_element_type=out_dtype), *arguments)


@pytest.mark.parametrize(
    "config",
    [
        {"block_n": 128, "num_stages": 6},
        {"block_n": 256, "num_stages": 3, "band_rows": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_kernel_lowers_with_other_tiles(operation, config, lower_for_cuda):
    _, *arguments = call(operation, 4096, 1024, 768, 8)
    assert "mosaic_gpu" in lower_for_cuda(with_config(operation, **config), *arguments)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_tiles_that_exceed_shared_memory_do_not_lower(operation, lower_for_cuda):
    _, *arguments = call(operation, 4096, 1024, 768, 8)
    with pytest.raises(ValueError, match=r"(?i)shared memory|smem"):
        lower_for_cuda(with_config(operation, block_n=256, num_stages=8), *arguments)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_ring_that_would_wait_for_itself_is_an_error(operation, lower_for_cuda):
    _, *arguments = call(operation, 4096, 1024, 768, 8)
    with pytest.raises(ValueError, match=r"num_stages is 2; a ring of fewer than 3 slots would wait for itself"):
        lower_for_cuda(with_config(operation, num_stages=2), *arguments)


@pytest.mark.parametrize("transpose_rhs", [False, True])
def test_a_training_step_lowers_to_three_kernels(transpose_rhs, lower_for_cuda):
    def gradients(lhs, rhs, sizes, out_grad):
        multiply = functools.partial(grouped_matmul, group_sizes=sizes, transpose_rhs=transpose_rhs)
        out, pull_back = jax.vjp(multiply, lhs, rhs)
        return out, pull_back(out_grad)

    rhs = (4, 256, 128) if transpose_rhs else (4, 128, 256)
    arrays = (((1000, 128), jnp.bfloat16), (rhs, jnp.bfloat16), ((4,), jnp.int32), ((1000, 256), jnp.bfloat16))
    assert lower_for_cuda(gradients, *arrays).count("custom_call @mosaic_gpu") == 3


def test_a_batch_lowers_to_a_loop_over_one_kernel(lower_for_cuda):
    arrays = ((5, 1000, 128), jnp.bfloat16), ((5, 4, 128, 256), jnp.bfloat16), ((5, 4), jnp.int32)
    program = lower_for_cuda(jax.vmap(grouped_matmul), *arrays)
    assert program.count("custom_call @mosaic_gpu") == 1
    assert "stablehlo.while" in program


@pytest.mark.parametrize(
    ("k", "n", "dtype"), [(100, 128, jnp.bfloat16), (128, 96, jnp.bfloat16), (128, 128, jnp.float32)]
)
def test_a_shape_that_does_not_fit_lowers_without_the_kernel(k, n, dtype, lower_for_cuda):
    for operation in OPERATIONS:
        assert "mosaic_gpu" not in lower_for_cuda(*call(operation, 512, k, n, 4, dtype))


def test_only_the_h100s_lowering_has_the_kernel():
    function, *arrays = call("forward", 512, 128, 192, 4)
    program = jax.jit(function).lower(*(jax.ShapeDtypeStruct(*array) for array in arrays)).as_text()
    assert "mosaic_gpu" not in program
