"""Which exchange is taken, and what names there are."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType

import jmoe
from jmoe.exchanges import AllToAll, Gather, Ring, choose_exchange, make_exchange
from jmoe.local_mlp import mlp_options
from jmoe.models import TransformerConfig

OPTIONS = mlp_options((8,) * 4, "swiglu", "output", False, None)


@pytest.mark.parametrize(
    ("num_shards", "top_k", "shard_bytes", "expected"),
    [
        (64, 8, 2**30, "all_to_all"),
        (9, 8, 1, "all_to_all"),
        (2, 1, 1, "all_to_all"),
        (8, 8, 2**20, "gather"),
        (2, 8, 2**30, "ring"),
    ],
)
def test_few_experts_per_token_are_sent_to_and_many_shared(num_shards, top_k, shard_bytes, expected):
    assert choose_exchange(num_shards, top_k, shard_bytes) == expected


@pytest.mark.parametrize(
    ("name", "expected"), [("gather", Gather), ("ring", Ring), ("all_to_all", AllToAll), ("auto", AllToAll)]
)
def test_a_name_is_taken_at_its_word(name, expected):
    exchange = make_exchange(name, ("expert",), OPTIONS, 16, num_shards=4, top_k=2, shard_bytes=2**20)
    assert type(exchange) is expected


@pytest.mark.parametrize("name", ["auto", "ring", "all_to_all"])
def test_with_one_shard_nothing_is_exchanged(name):
    exchange = make_exchange(name, (), OPTIONS, 16, num_shards=1, top_k=2, shard_bytes=2**20)
    assert exchange == Gather((), OPTIONS, 16)


@pytest.mark.usefixtures("without_annotation_checks")
def test_an_unknown_name_is_a_value_error_when_the_layer_is_made():
    message = "exchange is 'ragged_all_to_all'; it must be one of 'auto', 'ring', 'all_to_all', 'gather'"
    name: Any = "ragged_all_to_all"
    with pytest.raises(ValueError, match=message):
        jmoe.MoE(8, 8, 4, 2, exchange=name, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        jmoe.linen.MoE(8, 8, 4, 2, exchange=name).init(jax.random.key(0), jnp.ones((2, 8)))
    routing = jmoe.Routing(jnp.zeros((2, 1), int), jnp.ones((2, 1)))
    with pytest.raises(ValueError, match=message):
        jmoe.moe_mlp(jnp.ones((2, 8)), jnp.ones((4, 8, 8)), jnp.ones((4, 4, 8)), routing, exchange=name)
    with pytest.raises(ValueError, match="moe_exchange must be one of auto, ring, all_to_all, gather, got 'ragged"):
        TransformerConfig(
            vocab_size=8,
            num_layers=1,
            embed_dim=8,
            num_heads=1,
            num_kv_heads=1,
            head_dim=8,
            num_experts=2,
            top_k=1,
            expert_hidden_dim=8,
            moe_exchange=name,
        )


def test_without_an_expert_axis_the_name_means_nothing():
    apply = nnx.jit(lambda moe, x: moe(x)[0])
    x, moe = jnp.ones((2, 8)), jmoe.MoE(8, 8, 4, 2, exchange="ring", rngs=nnx.Rngs(0))
    with jax.set_mesh(jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])):
        y = apply(moe, x)
    assert jnp.allclose(y, apply(moe, x), atol=1e-6)
