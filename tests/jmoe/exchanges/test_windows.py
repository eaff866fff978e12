"""MLPs whose rows go through buffers of a fixed size give what they give in one piece."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe.exchanges.windows import windowed_gradients, windowed_outputs
from jmoe.grouped_mlp import ExpertParameters
from jmoe.local_mlp import mlp_options

EXPERTS, HIDDEN = 4, 64


@pytest.mark.parametrize(
    ("implementation", "flat", "remat", "max_rows"),
    [
        pytest.param("xla", False, False, 24, id="grouped", marks=pytest.mark.exhaustive),
        pytest.param("block_sparse", False, False, 16, id="block-sparse"),
        pytest.param("xla", True, True, 8, id="assignments-remat", marks=pytest.mark.exhaustive),
    ],
)
def test_any_number_of_windows_gives_the_same(implementation, flat, remat, max_rows, make_problem, relative_error):
    problem = make_problem(30, EXPERTS, 2, bias=True, hidden=HIDDEN)
    index = jnp.where(problem.expert_index == 2, -1, problem.expert_index)
    weight = problem.weight
    token_index = jnp.arange(index.size)[::-1] // 2
    if flat:  # the last assignments first
        index, weight = index.ravel()[::-1], weight.ravel()[::-1]
    parameters = ExpertParameters(problem.w_up, problem.w_down, problem.b_up, problem.b_down)
    dy = jnp.asarray(np.random.default_rng(1).standard_normal(problem.x.shape), jnp.float32)
    options = mlp_options((HIDDEN,) * EXPERTS, "swiglu", "output", remat, implementation)

    def routing(weight):
        return jmoe.Assignments(token_index, index, weight) if flat else jmoe.Routing(index, weight)

    @jax.jit
    def in_one_piece(x, parameters, weight):
        def apply(x, parameters, weight):
            return jmoe.moe_mlp(x, routing=routing(weight), **parameters._asdict())

        y, pull_back = jax.vjp(apply, x, parameters, weight)
        return y, *pull_back(dy)

    @jax.jit
    def in_windows(x, parameters, weight):
        y, kept = windowed_outputs(options, x, routing(weight), parameters, max_rows)
        assert (kept.h is None) == remat
        return y, *windowed_gradients(options, x, parameters, kept, dy, max_rows)

    arguments = problem.x, parameters, weight
    expected = jax.tree.leaves(in_one_piece(*arguments))
    for actual, wanted in zip(jax.tree.leaves(in_windows(*arguments)), expected, strict=True):
        assert relative_error(actual, wanted) < 1e-5
