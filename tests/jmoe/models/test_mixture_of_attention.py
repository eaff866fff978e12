"""`MixtureOfAttention` against attention written out in NumPy, a token, a head and an expert at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jmoe.models import MixtureOfAttention

D, HEAD, EXPERTS, THETA = 12, 6, 5, 100.0


def make(top_k=2, num_heads=4, num_kv_heads=2, *, features=D, **options):
    return MixtureOfAttention(
        features,
        HEAD,
        EXPERTS,
        top_k,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        rope_theta=THETA,
        bias_init=nnx.initializers.normal(1.0),
        rngs=nnx.Rngs(0),
        **options,
    )


def inputs(*batch, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).standard_normal((*batch, D)), dtype)


def turned(head, position):
    half = HEAD // 2
    angle = position * THETA ** (-2 * np.arange(half) / HEAD)
    pairs = (head[:half] + 1j * head[half:]) * np.exp(1j * angle)
    return np.concatenate([pairs.real, pairs.imag])


def numpy_layer(layer, x, segment_ids=None):
    def parameter(module):
        return np.asarray(module.kernel[...], np.float64)

    router, query, key, value, out = map(parameter, (layer.router, layer.query, layer.key, layer.value, layer.out))
    x = np.asarray(x, np.float64)
    segment_ids = np.ones(x.shape[:2]) if segment_ids is None else np.asarray(segment_ids)
    y = np.zeros(x.shape)
    for b, t in np.ndindex(*x.shape[:2]):
        if segment_ids[b, t] == 0:
            continue
        seen = [s for s in range(t + 1) if segment_ids[b, s] == segment_ids[b, t]]
        logits = x[b, t] @ router
        experts = np.argsort(-logits)[: layer.top_k]
        weights = np.exp(logits[experts] - logits.max())
        for e, weight in zip(experts, weights / weights.sum(), strict=True):
            heads = []
            for i, head in enumerate((x[b, t] @ query[e]).reshape(-1, HEAD)):
                j = i * layer.num_kv_heads // layer.num_heads
                columns = slice(j * HEAD, (j + 1) * HEAD)
                scores = [turned(head, t) @ turned(x[b, s] @ key[:, columns], s) for s in seen]
                p = np.exp(np.array(scores) / np.sqrt(HEAD))
                heads.append((p / p.sum()) @ np.stack([x[b, s] @ value[:, columns] for s in seen]))
            y[b, t] += weight * np.concatenate(heads) @ out[e]
        if layer.bias is not None:
            y[b, t] += np.asarray(layer.bias[...])
    return y


def dense_layer(layer, x):
    """All experts for all tokens, the others with weight 0, for JAX to differentiate; one key head to a query head."""
    router, query, key, value, out = (
        m.kernel[...] for m in (layer.router, layer.query, layer.key, layer.value, layer.out)
    )
    B, S, _ = x.shape
    probability = jax.nn.softmax(x @ router)
    kept = probability >= jnp.sort(probability)[..., -layer.top_k, None]
    weight = jnp.where(kept, probability, 0)
    weight /= weight.sum(-1, keepdims=True)
    angle = jnp.arange(S)[:, None, None] * THETA ** (-2 * jnp.arange(HEAD // 2) / HEAD)

    def turn(heads):  # [B, S, ..., j, h]
        a, b = jnp.split(heads, 2, axis=-1)
        shaped = angle.reshape(S, *[1] * (heads.ndim - 3), -1)
        return jnp.concatenate(
            [a * jnp.cos(shaped) - b * jnp.sin(shaped), a * jnp.sin(shaped) + b * jnp.cos(shaped)], -1
        )

    q = turn(jnp.einsum("bsd,edn->bsen", x, query).reshape(B, S, EXPERTS, -1, HEAD))
    k, v = ((x @ kernel).reshape(B, S, -1, HEAD) for kernel in (key, value))
    scores = jnp.einsum("bsejh,btjh->bejst", q, turn(k)) / np.sqrt(HEAD)
    scores = jnp.where(jnp.tril(jnp.ones((S, S), bool)), scores, -jnp.inf)
    heads = jnp.einsum("bejst,btjh->bsejh", jax.nn.softmax(scores), v).reshape(B, S, EXPERTS, -1)
    return jnp.einsum("bse,bsen,end->bsd", weight, heads, out)


@nnx.jit
def apply(layer, x, segment_ids=None):
    return layer(x, segment_ids=segment_ids)[:2]


@pytest.mark.parametrize(
    ("top_k", "num_heads", "num_kv_heads", "options"),
    [(2, 4, 2, {"use_bias": True}), (1, 3, 1, {}), (EXPERTS, 2, 2, {})],
    ids=["grouped queries and bias", "one expert a token", "all experts"],
)
def test_the_layer_matches_the_formulas(top_k, num_heads, num_kv_heads, options, relative_error):
    layer = make(top_k, num_heads, num_kv_heads, **options)
    x = inputs(2, 5)
    y, aux = apply(layer, x)
    assert relative_error(y, numpy_layer(layer, x)) < 2e-6
    np.testing.assert_allclose(aux.expert_load.sum(), 1, rtol=1e-6)


def test_the_gradients_match_those_of_a_dense_formulation(relative_error):
    layer, x = make(2, 3, 3), inputs(2, 5)
    dy = jax.random.normal(jax.random.key(1), x.shape)

    def gradients(function):
        return nnx.jit(nnx.grad(lambda layer, x: jnp.vdot(function(layer, x), dy), argnums=(0, 1)))(layer, x)

    actual, expected = gradients(lambda layer, x: layer(x)[0]), gradients(dense_layer)
    for (path, a), e in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, e) < 5e-6, jax.tree_util.keystr(path)


def test_segments_do_not_see_each_other_and_padding_may_hold_nan(relative_error):
    layer = make(use_bias=True)
    segment_ids = jnp.array([[1, 1, 2, 2, 2, 0], [3, 3, 3, 3, 0, 0]])
    x = jnp.where(segment_ids[..., None] == 0, jnp.nan, inputs(2, 6))
    y, aux = apply(layer, x, segment_ids)
    # RoPE sees distances only, so a segment may start anywhere.
    assert relative_error(y, numpy_layer(layer, x, segment_ids)) < 2e-6
    assert np.all(y[segment_ids == 0] == 0)
    np.testing.assert_allclose(aux.expert_load.sum(), 1, rtol=1e-6)


def test_a_cache_gives_one_token_at_a_time_what_the_whole_sequence_gives(relative_error):
    layer, x = make(), inputs(2, 6)
    expected, _ = apply(layer, x)
    step = nnx.jit(lambda layer, *arrays, cache: layer(*arrays, cache=cache))
    first = jnp.broadcast_to(jnp.arange(3), (2, 3))
    y, _, cache = step(layer, x[:, :3], first, cache=layer.empty_cache(2, 8))
    parts = [y]
    for t in range(3, 6):
        y, _, cache = step(layer, x[:, t : t + 1], jnp.full((2, 1), t), cache=cache)
        parts.append(y)
    assert relative_error(jnp.concatenate(parts, axis=1), expected) < 2e-6


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_a_mesh_gives_the_output_and_gradients_of_one_device(kind, relative_error):
    layer, x = make(use_bias=True), inputs(8, 5)

    @nnx.jit
    def run(layer, x):
        def loss(layer, x):
            y, aux, _ = layer(x)
            return jnp.sum(jnp.sin(y)) + aux.load_balancing_loss, (y, aux)

        return nnx.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)

    expected = jax.tree.leaves(run(layer, x))
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        sharded = make(use_bias=True)
        actual = jax.tree.leaves(run(sharded, jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))))
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < 5e-6


def test_it_computes_in_its_dtype_and_routes_in_float32():
    layer = make(dtype=jnp.bfloat16, use_bias=True)
    positions, cache = jnp.zeros((1, 1), int), layer.empty_cache(1, 2)
    y, aux, cache = nnx.eval_shape(lambda m, x: m(x, positions, cache=cache), layer, inputs(1, 1))
    assert y.dtype == cache.key.dtype == jnp.bfloat16
    assert aux.router_z_loss.dtype == layer.out.kernel.dtype == jnp.float32
    assert make(param_dtype=jnp.bfloat16).empty_cache(1, 2).key.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "num_heads is 3; it must be a multiple of num_kv_heads, 2"),
        ({"top_k": 6}, "top_k is 6; it must be between 1 and num_experts, 5"),
        ({"features": 0}, "features is 0; it must be at least 1"),
        ({"attention_implementation": "flash"}, "attention_implementation is 'flash'; it must be one of 'auto', "),
    ],
)
def test_bad_options_are_named(arguments, message, without_annotation_checks):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_inputs_of_other_shapes_and_dtypes_are_named(without_annotation_checks):
    layer, x, index = make(), inputs(2, 5), jnp.arange(5)
    with pytest.raises(ValueError, match=r"x is float32\[5, 12\]; it must be floating-point \[B, S, D=12\]"):
        layer(inputs(5))
    with pytest.raises(ValueError, match=r"positions is int\d+\[5\]; it must be integer \[B=2, S=5\]"):
        layer(x, index)
    with pytest.raises(ValueError, match=r"segment_ids is int\d+\[5\]; it must be integer \[B=2, S=5\]"):
        layer(x, segment_ids=index)
    for cache in (layer.empty_cache(3, 8), make(dtype=jnp.bfloat16).empty_cache(2, 8)):
        with pytest.raises(ValueError, match=r"cache.key is .*; it must be float32\[B=2, C, 2, 6\], as of empty_cache"):
            layer(x, cache=cache)


def test_a_token_with_a_cache_needs_its_position():
    layer = make()
    with pytest.raises(ValueError, match="positions is None, with a cache and one token"):
        layer(inputs(2, 1), cache=layer.empty_cache(2, 8))
