"""The Hopper kernels in Pallas's interpreter of Mosaic GPU: barriers, copies and warpgroups as on a GPU."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper
from pallas_kernels.grouped_matmul import mosaic_gpu, mosaic_gpu_weight_gradient

# The relative error of rounding the result; the products are exact and the sums short.
TOLERANCE = {jnp.bfloat16: 4e-3, jnp.float16: 5e-4, jnp.float32: 1e-6}


@dataclasses.dataclass(frozen=True)
class Case:
    """A small problem. The rows past the last group hold NaN."""

    m: int
    k: int
    n: int
    sizes: list[int]
    transpose_rhs: bool = False
    dtype: Any = jnp.bfloat16
    out_dtype: Any = None
    config: dict[str, int] = dataclasses.field(default_factory=dict)
    num_sms: int = 2
    detect_races: bool = False

    def run(self, interpret, kernel, config, *arrays, **options):
        """Runs a kernel in the interpreter."""
        nan_past_groups = [a.at[sum(self.sizes) :].set(jnp.nan) if a.shape[0] == self.m else a for a in arrays]
        call = functools.partial(
            kernel,
            *nan_past_groups,
            jnp.array(self.sizes, jnp.int32),
            *(None, None),  # no index
            precision=None,
            accumulator_dtype=jnp.dtype(jnp.float32),
            out_dtype=jnp.dtype(self.out_dtype or self.dtype),
            config=config(**{"block_n": 128, "num_stages": 3} | self.config),
            **options,
        )
        return interpret(call, num_sms=self.num_sms, detect_races=self.detect_races)

    @property
    def tolerance(self):
        return TOLERANCE[self.out_dtype or self.dtype]


SIZES = [101, 0, 77, 50]  # of 250 rows, in 128-row blocks that start at multiples of 8


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "case",
    [
        Case(256, 128, 128, [100, 0, 100, 56]),
        Case(250, 128, 192, SIZES, transpose_rhs=True, detect_races=True),
        Case(256, 64, 256, [0, 250, 0], config={"block_n": 256}, detect_races=True),
        Case(5, 64, 64, [1, 0, 3]),
        Case(77, 192, 64, [9, 68], transpose_rhs=True, dtype=jnp.float16),
        Case(140, 64, 128, [3, 130], out_dtype=jnp.float32),
        Case(40, 64, 64, [0, 0]),
        Case(560, 64, 256, [301, 0, 9, 250], config={"band_rows": 2}, num_sms=3),
    ],
    ids=str,
)
def test_the_grouped_matmul_matches_a_loop(case, interpret, normal, loop_matmul, relative_error):
    shape = (case.n, case.k) if case.transpose_rhs else (case.k, case.n)
    lhs, rhs = normal(case.m, case.k, dtype=case.dtype), normal(len(case.sizes), *shape, dtype=case.dtype)
    kernel, config = mosaic_gpu.grouped_matmul, mosaic_gpu.Config
    out = case.run(interpret, kernel, config, lhs, rhs, transpose_rhs=case.transpose_rhs)
    assert out.dtype == (case.out_dtype or case.dtype)
    expected = loop_matmul(lhs, rhs, case.sizes, transpose_rhs=case.transpose_rhs)
    assert relative_error(out, expected) < case.tolerance
    assert np.all(out[sum(case.sizes) :] == 0)


def test_the_interpreter_sees_a_ring_that_is_filled_before_it_is_read(interpret, normal, monkeypatch):
    monkeypatch.setattr(hopper.Ring, "wait_for_room", lambda ring, step: None)
    monkeypatch.setattr(hopper.Ring, "drain", lambda ring, num_steps: None)
    monkeypatch.setattr(hopper.Ring, "release", lambda ring, step: None)
    case = Case(128, 256, 64, [128], detect_races=True)
    arrays = normal(128, 256, dtype=jnp.bfloat16), normal(1, 256, 64, dtype=jnp.bfloat16)
    # What it sees first is a matter of time: a slot that is overwritten, or a barrier that has run ahead.
    with pytest.raises((AssertionError, RuntimeError)):
        case.run(interpret, mosaic_gpu.grouped_matmul, mosaic_gpu.Config, *arrays, transpose_rhs=False)


def zero_rows(tile, first, last):
    """Stands in for the weight gradient's device code, which cannot be interpreted."""
    row = jax.lax.broadcasted_iota(jnp.int32, tile.shape, 0)
    tile[...] = jnp.where((row >= first) & (row < last), tile[...], 0)


@pytest.mark.parametrize(
    "case",
    [
        Case(256, 128, 128, [100, 0, 100, 56]),
        Case(250, 192, 192, SIZES, detect_races=True),
        Case(256, 128, 256, [0, 250, 0], config={"block_n": 256}),
        Case(5, 64, 64, [1, 0, 3], detect_races=True),
        Case(77, 192, 64, [9, 68], dtype=jnp.float16),
        Case(140, 64, 128, [3, 130], out_dtype=jnp.float32),
        Case(130, 320, 256, [64, 5, 61], config={"band_rows": 2}, num_sms=3),
    ],
    ids=str,
)
def test_the_weight_gradient_matches_a_loop(case, interpret, normal, loop_weight_gradient, relative_error):
    lhs, out_grad = normal(case.m, case.k, dtype=case.dtype), normal(case.m, case.n, dtype=case.dtype, seed=1)
    kernel, config = mosaic_gpu_weight_gradient.grouped_weight_gradient, mosaic_gpu_weight_gradient.Config
    gradient = case.run(interpret, kernel, config, lhs, out_grad, zero_rows=zero_rows)
    assert gradient.dtype == (case.out_dtype or case.dtype)
    assert relative_error(gradient, loop_weight_gradient(lhs, out_grad, case.sizes)) < case.tolerance
    assert np.all(gradient[np.array(case.sizes) == 0] == 0)
