"""Grouped matmuls as loops over groups in NumPy, random operands, and the interpreter of GPU kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu


def _rows_of_groups(group_sizes, num_rows):
    start = 0
    for size in np.asarray(group_sizes).tolist():
        end = min(start + max(size, 0), num_rows)
        yield slice(start, end)
        start = end


@pytest.fixture
def loop_matmul():
    """`grouped_matmul(lhs, rhs, group_sizes, transpose_rhs=...)` as a loop over the groups, in float64."""

    def matmul(lhs, rhs, group_sizes, *, transpose_rhs=False):
        lhs, rhs = np.asarray(lhs, np.float64), np.asarray(rhs, np.float64)
        if transpose_rhs:
            rhs = rhs.swapaxes(1, 2)
        out = np.zeros((lhs.shape[0], rhs.shape[2]))
        for g, rows in enumerate(_rows_of_groups(group_sizes, lhs.shape[0])):
            out[rows] = lhs[rows] @ rhs[g]
        return out

    return matmul


@pytest.fixture
def loop_weight_gradient():
    """`grouped_weight_gradient` as a loop over the groups, in float64."""

    def weight_gradient(lhs, out_grad, group_sizes):
        lhs, out_grad = np.asarray(lhs, np.float64), np.asarray(out_grad, np.float64)
        return np.stack([lhs[rows].T @ out_grad[rows] for rows in _rows_of_groups(group_sizes, lhs.shape[0])])

    return weight_gradient


@pytest.fixture
def normal():
    """Standard normal arrays: `normal(*shape, dtype=..., seed=...)`."""

    def draw(*shape, dtype=jnp.float32, seed=0):
        return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)

    return draw


@pytest.fixture
def interpret(h100):
    """Runs `function()` on an imagined H100, where memory that nothing has written holds NaN."""

    def run(function, *, num_sms=2, detect_races=False):
        try:
            params = plgpu.InterpretGPUParams(detect_races=detect_races)
            with h100(num_sms), plgpu.force_gpu_interpret_mode(params):
                out = jax.tree.map(np.asarray, function())
            # JAX 0.11 only prints the races that it finds.
            assert not (detect_races and gpu_callbacks.get_races().races_found)
            return out
        except Exception:
            gpu_callbacks.reset_gpu_interpret_mode_state()
            raise

    return run
