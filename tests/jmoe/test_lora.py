"""`jmoe.LoRAExperts` against the formula in NumPy, its merged kernel, and its gradients."""

import dataclasses
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jmoe

T, K, E, D, N, RANK = 7, 2, 4, 5, 6, 3


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def make(kernel_kind, **options):
    kernel = normal(0, D, N) if kernel_kind == "dense" else normal(0, E, D, N)
    num_experts = E if kernel_kind == "dense" else None
    b_init = nnx.initializers.normal(1.0)
    return jmoe.LoRAExperts(kernel, RANK, num_experts=num_experts, b_init=b_init, rngs=nnx.Rngs(0), **options)


@pytest.fixture
def routing():
    index = np.argsort(np.random.default_rng(1).random((T, E)), axis=1)[:, :K].astype(np.int32)
    index[0] = -1
    index[1, 0] = -1
    weight = jnp.where(index < 0, jnp.nan, jnp.asarray(np.random.default_rng(2).random((T, K)), jnp.float32))
    return jmoe.Routing(jnp.asarray(index), weight)


def numpy_layer(layer, x, routing):
    """The values [T, K, N] of x [T, D]."""
    kernel, a, b = (np.asarray(p[...], np.float64) for p in (layer.kernel, layer.lora_a, layer.lora_b))
    v = np.zeros((T, K, N))
    for (t, k), e in np.ndenumerate(np.asarray(routing.expert_index)):
        if e >= 0:
            own = kernel if kernel.ndim == 2 else kernel[e]
            v[t, k] = x[t] @ own + layer.scale * (x[t] @ a[e]) @ b[e]
    return v


@pytest.mark.parametrize("kernel_kind", ["dense", "experts"])
def test_each_assignment_gets_the_frozen_kernel_and_its_experts_adapter(kernel_kind, routing, relative_error):
    layer, x = make(kernel_kind, alpha=6.0), normal(3, T, D).at[0].set(jnp.nan)
    assert layer.scale == 2.0
    v = numpy_layer(layer, np.asarray(x, np.float64), routing)
    dispatch = jmoe.make_dispatch(routing, E)
    values, y = nnx.jit(lambda m, x, w: (m(x, dispatch), m(x, dispatch, weights=w)))(layer, x, routing.weight)
    assert relative_error(values, v) < 2e-6
    assert relative_error(y, np.einsum("tkn,tk->tn", v, np.nan_to_num(routing.weight))) < 2e-6


@pytest.mark.sample(3)
@pytest.mark.parametrize("kernel_kind", ["dense", "experts"])
@pytest.mark.parametrize("flat", [False, True])
def test_the_merged_kernel_gives_the_same_from_and_to_every_order(kernel_kind, flat, routing, relative_error):
    layer = make(kernel_kind, alpha=2.0)
    weights = routing.weight
    if flat:
        tokens = jnp.repeat(jnp.arange(T), K)
        routing = jmoe.Assignments(tokens, routing.expert_index.ravel(), weights.ravel())
        weights = routing.weight
    dispatch = jmoe.make_dispatch(routing, E)
    sources = [normal(3, T, D), normal(4, T * K, D)] + ([] if flat else [normal(5, T, K, D)])
    targets = [{}, {"grouped_out": True}, {"weights": weights, "num_tokens": T}]

    @nnx.jit
    def both(layer, sources):
        kernel, pairs = layer.merged_kernel(), []
        for (i, x), target in itertools.product(enumerate(sources), targets):
            options = {"grouped_in": i == 1, **target}
            pairs.append((layer(x, dispatch, **options), jmoe.parallel_linear(x, kernel, dispatch, **options)))
        return pairs

    for actual, expected in both(layer, sources):
        assert relative_error(actual, expected) < 2e-6


@pytest.mark.parametrize("kernel_kind", ["dense", "experts"])
def test_adapters_and_x_get_the_gradients_of_the_merged_kernel_and_the_kernel_none(
    kernel_kind, routing, relative_error
):
    layer, x, dy = make(kernel_kind), normal(3, T, D), normal(6, T, N)
    routing = dataclasses.replace(routing, weight=jnp.nan_to_num(routing.weight))
    dispatch = jmoe.make_dispatch(routing, E)

    def gradients(apply):
        def loss(layer, x, weights):
            return jnp.vdot(apply(layer, x, weights), dy)

        return nnx.jit(nnx.grad(loss, argnums=(0, 1, 2)))(layer, x, routing.weight)

    actual = gradients(lambda layer, x, weights: layer(x, dispatch, weights=weights))
    expected = gradients(
        lambda layer, x, weights: jmoe.parallel_linear(x, layer.merged_kernel(), dispatch, weights=weights)
    )
    assert set(actual[0]) == {"lora_a", "lora_b"}  # the kernel is no parameter
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, e) < 5e-6
    of_kernel = jax.grad(lambda kernel: _with_kernel(layer, kernel)(x, dispatch, weights=routing.weight).sum())
    assert np.all(of_kernel(layer.kernel[...]) == 0)


def _with_kernel(layer, kernel):
    layer = nnx.clone(layer)
    layer.kernel[...] = kernel
    return layer


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("kernel_kind", ["dense", "experts"])
def test_only_x_the_narrow_rows_and_what_was_passed_are_kept_for_the_backward(kernel_kind, weighted, routing):
    layer, x = make(kernel_kind, dtype=jnp.bfloat16), normal(3, T, D, dtype=jnp.bfloat16)
    dispatch = jmoe.make_dispatch(routing, E)
    graphdef, state = nnx.split(layer)

    def apply(state, x, weights):
        return nnx.merge(graphdef, state)(x, dispatch, weights=weights if weighted else None)

    kept = jax.tree.leaves(jax.eval_shape(lambda *arrays: jax.vjp(apply, *arrays)[1], state, x, routing.weight))
    kept = {(a.shape, a.dtype.name) for a in kept if jnp.issubdtype(a.dtype, jnp.floating)}
    as_passed = {(a.shape, "float32") for a in jax.tree.leaves(state)} | {((1, D, N), "float32")}
    assert kept - as_passed <= {
        ((T, D), "bfloat16"),
        ((T * K, RANK), "bfloat16"),
        ((T, K), "float32"),
        ((), "bfloat16"),
    }


@pytest.mark.parametrize("kernel_kind", ["dense", "experts"])
def test_the_only_gradients_of_matrices_that_are_computed_are_the_adapters(kernel_kind, routing):
    layer, x, dispatch = make(kernel_kind, implementation="reference"), normal(3, T, D), jmoe.make_dispatch(routing, E)

    def gradients(adapters, x, weights):
        def loss(adapters, x, weights):
            changed = nnx.clone(layer)
            changed.lora_a[...], changed.lora_b[...] = adapters
            return changed(x, dispatch, weights=weights).sum()

        return jax.grad(loss, argnums=(0, 1, 2))(adapters, x, weights)

    program = jax.jit(gradients).lower((layer.lora_a[...], layer.lora_b[...]), x, routing.weight).compile()
    products = set(re.findall(r"= f32\[([\d,]+)\]\S* dot\(", program.as_text() or ""))
    of_matrices = {shape for shape in products if shape.count(",") == 2 or shape == f"{D},{N}"}
    assert of_matrices == {f"{E},{D},{RANK}", f"{E},{RANK},{N}"}


def test_on_a_hopper_gpu_adapters_of_any_rank_run_on_the_kernels(lower_for_cuda):
    def run(kernel, x, expert_index):
        layer = jmoe.LoRAExperts(kernel, 8, param_dtype=jnp.bfloat16, implementation="mosaic_gpu", rngs=nnx.Rngs(0))
        dispatch = jmoe.make_dispatch(jmoe.Routing(expert_index, jnp.ones(expert_index.shape)), E)
        return layer(x, dispatch)

    arrays = ((E, 128, 256), jnp.bfloat16), ((512, 128), jnp.bfloat16), ((512, K), jnp.int32)
    assert lower_for_cuda(run, *arrays).count("custom_call @mosaic_gpu") == 3


def test_new_adapters_change_nothing_and_compute_in_the_dtype_asked_for(routing):
    layer = jmoe.LoRAExperts(normal(0, D, N), RANK, num_experts=E, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer.merged_kernel(), jnp.broadcast_to(layer.kernel[...], (E, D, N)))
    assert layer(normal(3, T, D), jmoe.make_dispatch(routing, E)).dtype == jnp.bfloat16


def test_updates_that_the_dtype_of_the_kernel_would_round_away_are_merged_in_a_wider_one(relative_error):
    kernel, b_init = normal(0, D, N).astype(jnp.bfloat16), nnx.initializers.normal(1e-3)
    layer = jmoe.LoRAExperts(kernel, RANK, num_experts=E, b_init=b_init, rngs=nnx.Rngs(0))
    assert layer.merged_kernel().dtype == jnp.bfloat16
    update = layer.merged_kernel(jnp.float32) - kernel.astype(jnp.float32)
    assert relative_error(update, np.asarray(layer.lora_a[...]) @ np.asarray(layer.lora_b[...])) < 1e-2


@pytest.mark.parametrize(("kernel_kind", "leading"), [("dense", ()), ("experts", ("expert",))])
def test_the_frozen_kernel_is_sharded_like_the_adapters(kernel_kind, leading):
    mesh = jax.make_mesh((2, 2), ("expert", "tensor"))
    axes = (None, "heads")
    shardings: Any = jmoe.named_sharding(nnx.state(make(kernel_kind, axes=axes)), mesh)
    with jax.set_mesh(mesh):
        placed: Any = make(kernel_kind, axes=axes)
    for kernel, lora_b in (
        (shardings["kernel"].get_value(), shardings["lora_b"].get_value()),
        (placed.kernel[...].sharding, placed.lora_b[...].sharding),
    ):
        assert tuple(kernel.spec) == (*leading, None, "tensor")
        assert tuple(lora_b.spec) == ("expert", None, "tensor")


def test_a_dispatch_of_other_experts_and_what_is_none_are_named(routing, without_annotation_checks):
    layer, x = make("dense"), normal(3, T, D)
    with pytest.raises(ValueError, match=r"dispatch is of 5 experts; it must be of 4, the layer's num_experts"):
        layer(x, jmoe.make_dispatch(routing, E + 1))
    with pytest.raises(ValueError, match=r"dispatch is a Routing; it must be a jmoe.Dispatch"):
        layer(x, routing)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel": normal(0, D)}, r"kernel is float32\[5\]; it must be floating-point \[D, N\] or \[E, D, N\]"),
        ({"kernel": normal(0, D, N)}, "num_experts is None; with a dense kernel it must be given"),
        (
            {"kernel": normal(0, E, D, N), "num_experts": 3},
            "num_experts is 3 and kernel has E=4; leave num_experts out",
        ),
        ({"kernel": normal(0, E, D, N), "rank": 0}, "rank is 0; it must be at least 1"),
    ],
)
def test_bad_arguments_are_named(arguments, message, without_annotation_checks):
    with pytest.raises(ValueError, match=message):
        jmoe.LoRAExperts(**{"rank": RANK, "rngs": nnx.Rngs(0), **arguments})
