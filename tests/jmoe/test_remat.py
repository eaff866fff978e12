"""`remat` of `jmoe.moe_mlp`: pre-activations recomputed in the backward instead of kept."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def test_the_compiler_keeps_no_pre_activations(make_problem):
    layers, h_bytes = 6, 4 * 128 * 8 * 256  # one float32 [R, 2F]

    def planned_bytes(remat):
        problem = make_problem(128, 8, 8, features=8, hidden=128, remat=remat)

        def loss(x, weights):
            for w_up, w_down in weights:
                x = x + problem.moe_mlp(x=x, w_up=w_up, w_down=w_down)
            return jnp.sum(x**2)

        weights = [(problem.w_up + i, problem.w_down) for i in range(layers)]
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(problem.x, weights)
        # The usual order on CPUs runs as much as possible at once, whatever memory that takes.
        in_order = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
        memory: Any = gradient.compile(compiler_options=in_order).memory_analysis()
        return memory.temp_size_in_bytes

    # All but the last layer's, which is at work when the backward starts.
    assert planned_bytes(remat=False) - planned_bytes(remat=True) > (layers - 1.5) * h_bytes


@pytest.mark.parametrize(
    "options",
    [{"bias": True}, {"bias": True, "weight_on": "input"}, {"activation": "relu_squared"}],
    ids=["output", "input", "plain"],
)
def test_outputs_and_gradients_are_the_same(options, make_problem, relative_error):
    def results(remat):
        problem = make_problem(40, 6, 2, remat=remat, **options)
        absent = problem.expert_index.at[:5, 0].set(-1)
        dy = jnp.asarray(np.random.default_rng(1).standard_normal(problem.x.shape), jnp.float32)

        @jax.jit
        def run(arrays):
            y, pull_back = jax.vjp(lambda arrays: problem.moe_mlp(expert_index=absent, **arrays), arrays)
            return y, pull_back(dy)

        return run(problem.differentiable)

    for actual, expected in zip(jax.tree.leaves(results(True)), jax.tree.leaves(results(False)), strict=True):
        assert relative_error(actual, expected) < 1e-6
