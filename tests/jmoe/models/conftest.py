"""A model small enough to compile in seconds that has every kind of layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jmoe.models import Transformer, TransformerConfig


@pytest.fixture(scope="session")
def config():
    """Dense, dense, MoE: a dense first layer, then one MoE layer in two."""
    return TransformerConfig(
        vocab_size=31,
        num_layers=3,
        embed_dim=16,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        num_experts=4,
        top_k=2,
        expert_hidden_dim=8,
        shared_hidden_dim=6,
        hidden_dim=12,
        first_dense_layers=1,
        moe_every=2,
        qk_norm="head",
        max_sequence_length=16,
        dtype="float32",
    )


@pytest.fixture(scope="session")
def new_model():
    """Creates a model whose every parameter, norm scales included, is random, without compiling anything."""

    def create(config):
        rng = np.random.default_rng(0)
        abstract = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))

        def draw(path, x):
            mean, deviation = (1.0, 0.1) if "scale" in jax.tree_util.keystr(path) else (0.0, x.shape[-1] ** -0.5)
            return jnp.asarray(mean + deviation * rng.standard_normal(x.shape), x.dtype)

        return jax.tree_util.tree_map_with_path(draw, abstract)

    return create


@pytest.fixture(scope="session")
def model(new_model, config):
    return new_model(config)


@pytest.fixture(scope="session")
def forward(model):
    """Computes logits and aux of [2, 12] tokens: one program for every test that only looks at outputs."""
    compiled = nnx.jit(
        lambda model, tokens, positions, segment_ids: model(tokens, positions=positions, segment_ids=segment_ids)
    )

    def run(tokens, positions=None, segment_ids=None):
        assert tokens.shape == (2, 12)
        positions = jnp.broadcast_to(jnp.arange(12), (2, 12)) if positions is None else positions
        segment_ids = jnp.ones((2, 12), jnp.int32) if segment_ids is None else segment_ids
        return compiled(model, tokens, positions, segment_ids)

    return run


@pytest.fixture
def tokens(config):
    return jax.random.randint(jax.random.key(42), (2, 12), 0, config.vocab_size)
