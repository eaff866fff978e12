import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jmoe import named_sharding
from jmoe.models import Transformer, language_model_loss
from jmoe.models.attention import rope_rotation


@pytest.fixture(scope="module")
def batch(config):
    """Two sequences of 12 tokens, packed: what counts are the targets within a document."""
    ids = jax.random.randint(jax.random.key(7), (2, 13), 0, config.vocab_size)
    return {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "mask": jnp.stack([jnp.arange(12) % 5 != 4, jnp.arange(12) < 8]),
        "segment_ids": jnp.array([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3]),
    }


def unrolled_loss(model, tokens, targets, mask, segment_ids):
    """The objective layer by layer and with all logits at once: no scan, no chunks, no recomputation."""
    config = model.config
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    rotation = rope_rotation(positions, config.head_dim, config.rope_theta)
    x = model.embedding.embedding[...][tokens]
    auxes = []
    for group, stacked in zip(config.layer_groups, model.groups, strict=True):
        for repeat in range(group.repeats):
            for layer in jax.tree.map(lambda p, repeat=repeat: p[repeat], stacked).layers:
                x, aux, _ = layer(x, positions, rotation, segment_ids, None)
                auxes += [] if aux is None else [aux]
    output = model.embedding if config.tie_embeddings else model.output_embedding
    logits = model.final_norm(x) @ output.embedding[...].T
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    cross_entropy = jnp.sum(cross_entropy * mask) / jnp.sum(mask)
    load_balancing_loss = sum(aux.load_balancing_loss for aux in auxes) / max(len(auxes), 1)
    router_z_loss = sum(aux.router_z_loss for aux in auxes) / max(len(auxes), 1)
    return cross_entropy + config.load_balancing_coef * load_balancing_loss + config.router_z_coef * router_z_loss


@pytest.fixture(scope="module")
def compiled_loss(config, new_model):
    """Loss and gradient of two MoE layers, with chunks that do not divide the sequence."""
    config = dataclasses.replace(
        config,
        num_layers=2,
        first_dense_layers=0,
        moe_every=1,
        shared_hidden_dim=0,
        loss_chunk_size=10,
        load_balancing_coef=0.3,
        router_z_coef=0.2,
    )
    return jax.jit(jax.value_and_grad(language_model_loss, has_aux=True)), new_model(config)


def with_config(model, **changes):
    """The same parameters in a model of another configuration."""
    config = dataclasses.replace(model.config, **changes)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, nnx.state(model))


def unstacked(model):
    """The same parameters in a model that does not scan its layers."""
    state = nnx.to_pure_dict(nnx.state(model))
    slices = [
        jax.tree.map(lambda p, repeat=repeat: p[repeat : repeat + 1], stacked)
        for group, stacked in zip(model.config.layer_groups, state["groups"].values(), strict=True)
        for repeat in range(group.repeats)
    ]
    config = dataclasses.replace(model.config, scan_layers=False)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, state | {"groups": dict(enumerate(slices))})


def assert_same(actual, expected, tolerance):
    def check(a, b):
        assert jnp.linalg.norm(a - b) <= tolerance * jnp.linalg.norm(b)

    jax.tree.map(check, actual, expected)


def test_scan_chunks_and_remat_change_neither_the_loss_nor_its_gradient(compiled_loss, batch):
    step, model = compiled_loss
    expected, expected_grads = jax.jit(jax.value_and_grad(unrolled_loss))(model, **batch)
    for remat in ("none", "full"):
        (loss, aux), grads = step(with_config(model, remat=remat), **batch)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        assert_same(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), 2e-5)
        parts = aux.cross_entropy + 0.3 * aux.load_balancing_loss + 0.2 * aux.router_z_loss
        np.testing.assert_allclose(loss, parts, rtol=1e-6)
        assert aux.num_targets == batch["mask"].sum()
        assert aux.expert_load.shape == (2, model.config.num_experts)
        assert aux.dropped_fraction == 0


def test_the_load_may_be_balanced_by_sequence_or_over_all_layers(compiled_loss, batch):
    step, model = compiled_loss
    num_experts, top_k = model.config.num_experts, model.config.top_k
    present = np.asarray(batch["segment_ids"] != 0)

    # Router logits of each layer, from what its MoE layer is called with.
    inputs, config = [], model.config
    positions = jnp.broadcast_to(jnp.arange(batch["tokens"].shape[1]), batch["tokens"].shape)
    rotation = rope_rotation(positions, config.head_dim, config.rope_theta)
    x = model.embedding.embedding[...][batch["tokens"]]
    for repeat in range(2):
        (layer,) = jax.tree.map(lambda p, repeat=repeat: p[repeat], model.groups[0]).layers
        attended, _ = layer.attention(layer.attention_norm(x), positions, rotation, segment_ids=batch["segment_ids"])
        inputs.append(np.asarray(layer.mlp_norm(x + attended) @ layer.mlp.router.kernel[...], np.float64))
        x, _, _ = layer(x, positions, rotation, batch["segment_ids"], None)

    def balance(logits):  # of tokens [T, E]
        scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        chosen = np.argsort(-logits, axis=1)[:, :top_k]
        share = np.bincount(chosen.ravel(), minlength=num_experts) / chosen.size
        return num_experts * np.sum(share * scores.mean(axis=0))

    expected = {
        "layer": np.mean([balance(z[present]) for z in inputs]),
        "sequence": np.mean([balance(s[p]) for z in inputs for s, p in zip(z, present, strict=True) if p.any()]),
        "model": balance(np.concatenate([z[present] for z in inputs])),
    }
    assert len({round(value, 4) for value in expected.values()}) == 3
    for name, value in expected.items():
        (_, aux), _ = step(with_config(model, load_balancing=name), **batch)
        np.testing.assert_allclose(aux.load_balancing_loss, value, rtol=1e-4, err_msg=name)


@pytest.mark.sample(2)
@pytest.mark.parametrize("remat", ["none", "full"])
def test_layers_that_are_not_scanned_give_the_same(compiled_loss, batch, remat):
    step, model = compiled_loss
    model = with_config(model, remat=remat)
    (loss, aux), grads = step(model, **batch)
    (unscanned_loss, unscanned_aux), unscanned_grads = step(unstacked(model), **batch)
    np.testing.assert_allclose(unscanned_loss, loss, rtol=1e-6)
    assert_same(unscanned_aux, aux, 1e-6)
    assert_same(jax.tree.leaves(unscanned_grads), jax.tree.leaves(unstacked(grads)), 2e-5)


def test_the_backward_pass_recomputes_also_where_layers_are_not_scanned(compiled_loss, batch):
    """XLA must not take what the forward pass has computed for what the backward pass is to recompute."""

    def flops(remat):
        model = with_config(unstacked(compiled_loss[1]), remat=remat)
        gradient = jax.jit(jax.grad(lambda model: language_model_loss(model, **batch)[0]))
        analysis = gradient.lower(model).compile().cost_analysis()
        assert analysis
        return analysis["flops"]

    assert flops("full") > 1.1 * flops("none")


def test_gradient_descent_reduces_the_loss(compiled_loss, batch):
    step, model = compiled_loss
    losses = []
    for _ in range(4):
        (loss, _), grads = step(model, **batch)
        losses.append(loss)
        model = jax.tree.map(lambda p, g: p - 0.1 * g, model, grads)
    assert (np.diff(losses) < -1e-2).all(), losses


def test_logits_of_all_tokens_never_exist_together(compiled_loss, batch):
    step, model = compiled_loss
    V, rows = model.config.vocab_size, set()
    for shape in re.findall(r"\w+\[([\d,]+)\]", str(jax.make_jaxpr(step)(model, **batch))):
        *leading, last = (int(size) for size in shape.split(","))
        if last == V:
            rows.add(int(np.prod(leading)))
    assert max(rows) == model.config.loss_chunk_size < batch["tokens"].size


@pytest.fixture(scope="module")
def dense_model(config, new_model):
    changes = {"num_experts": 0, "num_layers": 1, "first_dense_layers": 0, "loss_chunk_size": 7}
    return new_model(dataclasses.replace(config, **changes))


def test_only_counted_targets_enter_the_cross_entropy(dense_model, batch):
    loss = jax.jit(language_model_loss)
    batch = batch | {"mask": None}
    padded = batch["segment_ids"] == 0
    unmasked, aux = loss(dense_model, **batch)
    assert aux.num_targets == 21
    # The same by an explicit mask, whatever the targets it excludes.
    batch |= {"mask": ~padded, "targets": jnp.where(padded, -100, batch["targets"])}
    np.testing.assert_array_equal(loss(dense_model, **batch)[0], unmasked)

    logits, _ = jax.jit(lambda model, tokens, ids: model(tokens, segment_ids=ids))(
        dense_model, batch["tokens"], batch["segment_ids"]
    )
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])[~padded].mean()
    np.testing.assert_allclose(unmasked, expected, rtol=1e-6)

    nothing, aux = loss(dense_model, **batch | {"mask": jnp.zeros((2, 12), bool)})
    assert nothing == aux.num_targets == 0


def test_bfloat16_computes_close_to_float32_and_keeps_float32_gradients(compiled_loss, batch):
    step, model = compiled_loss
    (expected, _), _ = step(model, **batch)
    model = with_config(model, dtype="bfloat16")
    loss, aux = jax.jit(language_model_loss)(model, **batch)
    assert loss != expected
    np.testing.assert_allclose(loss, expected, rtol=2e-2)
    gradients = jax.eval_shape(step, model, **batch)[1]
    assert {x.dtype for x in jax.tree.leaves((loss, gradients, aux.cross_entropy))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unscanned"])
def test_a_mesh_changes_neither_the_loss_nor_its_gradient(compiled_loss, batch, scan_layers):
    """Explicit axes, which become Auto ones inside: this covers both."""
    step, model = compiled_loss
    model = model if scan_layers else unstacked(model)
    expected = step(model, **batch)
    axis_types = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "expert"), axis_types=axis_types)
    with jax.set_mesh(mesh):
        model = jax.device_put(model, named_sharding(model, mesh))
        batch = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data")))
        actual = step(model, **batch)
    assert_same(jax.tree.leaves(jax.device_get(actual)), jax.tree.leaves(expected), 2e-5)


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unscanned"])
def test_no_copy_of_a_parameter_in_the_compute_dtype_lives_until_the_backward_pass(compiled_loss, batch, scan_layers):
    model = with_config(compiled_loss[1], dtype="bfloat16")
    model = model if scan_layers else unstacked(model)
    batch = jax.tree.map(lambda x: x[:, :11], batch)  # 22 tokens: no activation has the shape of a matrix
    shapes = [x.shape for x in jax.tree.leaves(model)]
    matrices = {shape for shape in shapes + [shape[1:] for shape in shapes] if len(shape) > 1}

    def kept(model):
        return jax.vjp(lambda model: language_model_loss(model, **batch)[0], model)[1]

    residuals = jax.tree.leaves(jax.eval_shape(kept, model))
    assert not [x for x in residuals if x.dtype == jnp.bfloat16 and x.shape in matrices]
    assert len(residuals) > len(jax.tree.leaves(model))


def test_a_tied_embedding_gets_the_gradients_of_both_its_uses(dense_model, new_model, batch):
    model = new_model(dataclasses.replace(dense_model.config, tie_embeddings=True))
    expected = jax.jit(jax.value_and_grad(unrolled_loss))(model, **batch)
    actual = jax.jit(jax.value_and_grad(lambda model, batch: language_model_loss(model, **batch)[0]))(model, batch)
    assert_same(jax.tree.leaves(actual), jax.tree.leaves(expected), 2e-5)
