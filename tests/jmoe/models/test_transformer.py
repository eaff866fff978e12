import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import jmoe
from jmoe.models import Transformer


def reference_logits(model, tokens):
    """The whole model in float64 NumPy, token by token, from the formulas."""
    config = model.config
    parameters = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(model)))

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + config.norm_eps) * scale

    def mlp(x, up, down):
        gate, value = np.split(x @ up, 2)
        return (gate / (1 + np.exp(-gate)) * value) @ down

    def rope(x, position):
        half = config.head_dim // 2
        pairs = x[..., :half] + 1j * x[..., half:]
        pairs = pairs * np.exp(1j * position * config.rope_theta ** (-np.arange(half) / half))
        return np.concatenate([pairs.real, pairs.imag], -1)

    def attention(x, p):  # x [S, D]
        query, key, value = (x @ p[name]["kernel"] for name in ("query", "key", "value"))
        if config.qk_norm == "full":
            query, key = norm(query, p["query_norm"]["scale"]), norm(key, p["key_norm"]["scale"])
        query, key, value = (y.reshape(len(x), -1, config.head_dim) for y in (query, key, value))
        if config.qk_norm == "head":
            query, key = norm(query, p["query_norm"]["scale"]), norm(key, p["key_norm"]["scale"])
        y = np.zeros(query.shape)
        for s in range(len(x)):
            for head in range(config.num_heads):
                kv_head = head // (config.num_heads // config.num_kv_heads)
                keys = np.stack([rope(key[i, kv_head], i) for i in range(s + 1)])
                scores = np.exp(keys @ rope(query[s, head], s) / np.sqrt(config.head_dim))
                y[s, head] = scores / scores.sum() @ value[: s + 1, kv_head]
        return y.reshape(len(x), -1) @ p["out"]["kernel"]

    def moe(x, p):  # x [D]
        logits = x @ p["router"]["kernel"]
        scores = np.exp(logits) / np.exp(logits).sum()
        chosen = np.argsort(-scores)[: config.top_k]
        weights = scores[chosen] / (scores[chosen].sum() if config.router_normalize else 1)
        y = sum(w * mlp(x, p["w_up"][e], p["w_down"][e]) for w, e in zip(weights, chosen, strict=True))
        return y + mlp(x, p["shared"]["w_up"], p["shared"]["w_down"]) if "shared" in p else y

    def layers():
        for stacked, group in zip(parameters["groups"].values(), config.layer_groups, strict=True):
            for repeat in range(group.repeats):
                for layer, kind in zip(stacked["layers"].values(), group.unit, strict=True):
                    yield kind, jax.tree.map(lambda x, repeat=repeat: x[repeat], layer)

    def one_sequence(tokens):
        embedding = parameters["embedding"]["embedding"]
        x = embedding[tokens]
        for kind, p in layers():
            x = x + attention(norm(x, p["attention_norm"]["scale"]), p["attention"])
            normalized = norm(x, p["mlp_norm"]["scale"])
            dense = (lambda x, p: mlp(x, p["up"]["kernel"], p["down"]["kernel"])) if kind == "dense" else moe
            x = x + np.stack([dense(token, p["mlp"]) for token in normalized])
        output = embedding if config.tie_embeddings else parameters["output_embedding"]["embedding"]
        return norm(x, parameters["final_norm"]["scale"]) @ output.T

    return np.stack([one_sequence(np.asarray(sequence)) for sequence in tokens])


def assert_close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert np.linalg.norm(np.asarray(actual, np.float64) - expected) <= tolerance * np.linalg.norm(expected)


def test_the_experts_may_be_block_sparse_products(new_model, config, tokens):
    """What they compute is tested with the layer."""
    changes = {"num_layers": 5, "expert_hidden_dim": 64, "moe_implementation": "block_sparse"}
    model = new_model(dataclasses.replace(config, **changes))
    assert model.groups[1].layers[-1].mlp.implementation == "block_sparse"
    gradient = jax.eval_shape(jax.grad(lambda model: model.hidden(tokens)[0].sum()), model)  # a scan
    assert jax.tree.structure(gradient) == jax.tree.structure(model)


def test_the_model_computes_the_formulas(model, forward, tokens):
    logits, aux = forward(tokens)
    assert logits.dtype == jnp.float32
    assert_close(logits, reference_logits(model, tokens), 1e-5)
    assert aux.expert_load.shape == (1, model.config.num_experts)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "qk_norm": "full",
            "router_normalize": False,
            "num_layers": 2,
            "moe_every": 1,
            "first_dense_layers": 0,
        },
        {"qk_norm": "none", "tie_embeddings": True, "num_layers": 5, "shared_hidden_dim": 0},
        {"scan_layers": False, "num_layers": 5},
    ],
    ids=["olmoe", "alternating", "unscanned"],
)
def test_every_option_computes_the_formulas(config, new_model, tokens, changes):
    model = new_model(dataclasses.replace(config, **changes))
    logits, aux = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)
    assert_close(logits, reference_logits(model, tokens), 1e-5)
    assert aux.expert_load.shape == (2, config.num_experts)
    np.testing.assert_allclose(aux.expert_load.sum(axis=1), 1, rtol=1e-6)


def test_future_tokens_do_not_change_the_past(forward, tokens, config):
    changed = tokens.at[:, 7:].set((tokens[:, 7:] + 1) % config.vocab_size)
    before, after = forward(tokens)[0], forward(changed)[0]
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any(axis=-1).all()


def test_packed_documents_give_what_separate_ones_give(forward, tokens):
    """Two documents, of 5 and 7 tokens, in one sequence beside padding; then each in its own sequence."""
    first, second = tokens[0, :5], tokens[0, 5:]
    packed = jnp.stack([tokens[0], tokens[1]])
    packed_logits, packed_aux = forward(
        packed,
        positions=jnp.stack([jnp.concatenate([jnp.arange(5), jnp.arange(7)]), jnp.arange(12)]),
        segment_ids=jnp.array([[1] * 5 + [2] * 7, [0] * 12]),
    )
    garbage = tokens[1]
    separate = jnp.stack([jnp.concatenate([first, garbage[:7]]), jnp.concatenate([second, garbage[7:]])])
    separate_logits, separate_aux = forward(separate, segment_ids=jnp.array([[1] * 5 + [0] * 7, [1] * 7 + [0] * 5]))
    assert_close(packed_logits[0, :5], separate_logits[0, :5], 1e-6)
    assert_close(packed_logits[0, 5:], separate_logits[1, :7], 1e-6)
    # The routers saw the same twelve tokens, and no padding.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), packed_aux, separate_aux)
    counts = packed_aux.expert_load[0] * 12 * 2
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-4)


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unscanned"])
def test_layers_draw_their_parameters_independently(config, scan_layers):
    config = dataclasses.replace(config, num_layers=2, first_dense_layers=0, moe_every=1, scan_layers=scan_layers)
    create = jax.jit(lambda key: Transformer(config, rngs=nnx.Rngs(key)))
    model = create(jax.random.key(0))
    layers = jax.tree.map(lambda *groups: jnp.concatenate(groups), *model.groups)
    for path, stacked in nnx.to_flat_state(nnx.state(layers)):
        assert len(stacked[...]) == 2
        if path[-1] != "scale":
            assert (stacked[0] != stacked[1]).all(), path
    kernel = model.groups[0].layers[0].attention.query.kernel[...]
    np.testing.assert_allclose(kernel.std(), config.embed_dim**-0.5, rtol=0.1)


def test_a_model_without_moe_layers_has_empty_statistics(config, tokens):
    config = dataclasses.replace(config, num_experts=0)
    abstract = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    logits, aux = nnx.eval_shape(lambda model: model(tokens), abstract)
    assert logits.shape == (2, 12, config.vocab_size)
    assert aux.load_balancing_loss.shape == (0,)


def test_a_sequence_that_is_too_long_raises(model):
    with pytest.raises(ValueError, match="at most max_sequence_length = 16 columns, got 17"):
        model(jnp.zeros((1, 17), jnp.int32))


def test_biases_are_not_updated_where_there_are_none_or_by_other_loads(config):
    loads = jnp.zeros((1, config.num_experts + 1))
    for rate, message in ((0.0, "no selection biases; set router_bias_update_rate"), (0.1, "expert_load must be")):
        changed = dataclasses.replace(config, router_bias_update_rate=rate, router_score_order="before_top_k")
        model = nnx.eval_shape(lambda changed=changed: Transformer(changed, rngs=nnx.Rngs(0)))
        with pytest.raises(ValueError, match=message):
            model.update_biases(loads)


@pytest.mark.exhaustive
@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_experts_of_each_layer_may_be_placed_by_their_own_load(config, new_model, scan_layers):
    """Those of layers that are scanned all in one way."""
    config = dataclasses.replace(config, num_layers=5, scan_layers=scan_layers)
    model = new_model(config)
    tokens = jnp.arange(24).reshape(2, 12)
    apply = nnx.jit(lambda model, tokens: model(tokens))
    expected, aux = apply(model, tokens)

    layers = [layer.mlp for unit in model.groups for layer in unit.layers if isinstance(layer.mlp, jmoe.MoE)]
    loads = np.asarray(aux.expert_load) if len(layers) == 2 else [np.asarray(aux.expert_load).mean(axis=0)]
    for layer, load in zip(layers, loads, strict=True):
        layer.expert_placement = jmoe.plan_placement(load, 2, replicas=1)
        nnx.update(layer, jmoe.reorder_experts(nnx.state(layer), layer.expert_placement))
    mesh = jax.make_mesh((2,), ("expert",), (AxisType.Auto,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        logits, aux_on_mesh = apply(model, tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_allclose(aux_on_mesh.expert_load, aux.expert_load, atol=1e-6)
