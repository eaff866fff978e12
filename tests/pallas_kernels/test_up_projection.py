"""The up-projection: its values on any platform, its Hopper kernel interpreted and lowered on a CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import up_projection
from pallas_kernels.grouped_matmul.mosaic_gpu import Config
from pallas_kernels.up_projection import mosaic_gpu

ACTIVATIONS = {  # the function, and whether it is gated
    "swiglu": (lambda gate, up: jax.nn.silu(gate) * up, True),
    "geglu": (lambda gate, up: jax.nn.gelu(gate) * up, True),
    "reglu": (lambda gate, up: jax.nn.relu(gate) * up, True),
    "gelu": (jax.nn.gelu, False),
    "relu_squared": (lambda x: jnp.square(jax.nn.relu(x)), False),
}


def activate(name, h):
    """The activation of pre-activations, in float32."""
    function, gated = ACTIVATIONS[name]
    return function(*jnp.split(jnp.asarray(h, jnp.float32), 2 if gated else 1, axis=1))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_pre_activations_are_the_grouped_matmul_and_activations_are_theirs(
    name, implementation, normal, loop_matmul, relative_error
):
    function, gated = ACTIVATIONS[name]
    lhs, rhs, sizes = normal(40, 16), normal(3, 16, 12), jnp.array([17, 0, 20], jnp.int32)
    lhs = lhs.at[37:].set(jnp.nan)
    h, a = jax.jit(functools.partial(up_projection, gated=gated, activation=function, implementation=implementation))(
        lhs, rhs, sizes
    )
    assert relative_error(h, loop_matmul(lhs.at[37:].set(0), rhs, sizes)) < 1e-6
    assert relative_error(a, activate(name, h)) < 1e-6


@pytest.mark.parametrize(
    ("name", "m", "k", "hidden", "sizes", "block_n", "detect_races"),
    [
        ("swiglu", 250, 64, 128, [101, 0, 77, 50], 256, False),
        ("geglu", 250, 128, 192, [101, 0, 77, 50], 128, True),  # half of the last tile's columns are beyond the edge
        ("swiglu", 77, 64, 192, [9, 68], 256, False),
        ("gelu", 130, 64, 192, [101, 0, 20], 128, True),
        ("relu_squared", 5, 64, 64, [1, 0, 3], 128, False),
    ],
)
def test_the_kernel_matches_a_loop_and_clears_the_rows_past_the_groups(
    name, m, k, hidden, sizes, block_n, detect_races, interpret, normal, loop_matmul, relative_error
):
    function, gated = ACTIVATIONS[name]
    lhs = normal(m, k, dtype=jnp.bfloat16).at[sum(sizes) :].set(jnp.nan)
    rhs = normal(len(sizes), k, (1 + gated) * hidden, dtype=jnp.bfloat16)
    kernel = functools.partial(
        mosaic_gpu.up_projection,
        lhs,
        rhs,
        jnp.array(sizes, jnp.int32),
        function,
        num_parts=1 + gated,
        config=Config(block_n=block_n, num_stages=2),
    )
    h, a = interpret(kernel, detect_races=detect_races)
    assert (h.dtype, a.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert relative_error(h, loop_matmul(lhs, rhs, sizes)) < 4e-3
    assert relative_error(a, activate(name, h)) < 4e-3
    assert np.all(h[sum(sizes) :] == 0)
    assert np.all(a[sum(sizes) :] == 0)


@pytest.mark.parametrize(
    ("name", "m", "k", "hidden", "groups", "dtype"),
    [(name, 1000, 320, 192, 3, jnp.bfloat16) for name in ACTIVATIONS]
    + [
        ("swiglu", 262144, 2048, 1024, 64, jnp.bfloat16),
        ("swiglu", 196608, 1536, 256, 128, jnp.float16),
        ("swiglu", 16384, 4096, 14336, 8, jnp.bfloat16),
        ("gelu", 65536, 512, 2048, 64, jnp.float16),
        ("swiglu", 1, 64, 64, 3, jnp.bfloat16),
    ],
)
def test_the_kernel_is_chosen_on_hopper_and_lowers(name, m, k, hidden, groups, dtype, lower_for_cuda):
    function, gated = ACTIVATIONS[name]
    project = functools.partial(up_projection, activation=function, gated=gated)
    arrays = ((m, k), dtype), ((groups, k, (1 + gated) * hidden), dtype), ((groups,), jnp.int32)
    assert lower_for_cuda(project, *arrays).count("custom_call @mosaic_gpu") == 1


def test_a_batch_lowers_to_a_loop_over_one_kernel(lower_for_cuda):
    project = jax.vmap(functools.partial(up_projection, activation=jax.nn.gelu, gated=False))
    arrays = ((5, 1000, 128), jnp.bfloat16), ((5, 4, 128, 256), jnp.bfloat16), ((5, 4), jnp.int32)
    assert lower_for_cuda(project, *arrays).count("custom_call @mosaic_gpu") == 1


def test_half_a_gate_that_does_not_fit_runs_without_the_kernel(lower_for_cuda):
    project = functools.partial(up_projection, activation=ACTIVATIONS["swiglu"][0], gated=True)
    arrays = ((100, 64), jnp.bfloat16), ((2, 64, 192), jnp.bfloat16), ((2,), jnp.int32)
    assert "mosaic_gpu" not in lower_for_cuda(project, *arrays)


@pytest.mark.parametrize(
    ("rhs", "dtype", "gated"),
    [((2, 8, 7), jnp.float32, True), ((8, 8), jnp.float32, False), ((2, 8, 8), jnp.float16, False)],
)
@pytest.mark.usefixtures("without_annotation_checks")
def test_operands_that_do_not_fit_are_named(rhs, dtype, gated):
    with pytest.raises(ValueError, match=r"lhs is float32.*they must be"):
        up_projection(jnp.ones((3, 8)), jnp.ones(rhs, dtype), jnp.array([1, 2]), jax.nn.relu, gated=gated)
    with pytest.raises(ValueError, match="needs a Hopper GPU"):
        up_projection(
            jnp.ones((3, 8)),
            jnp.ones((2, 8, 8)),
            jnp.array([1, 2]),
            jax.nn.relu,
            gated=False,
            implementation="mosaic_gpu",
        )
