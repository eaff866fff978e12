import dataclasses

import jax
import pytest
from flax import nnx

from jmoe.models import PRESETS, Transformer
from jmoe.models.config import LayerGroup

PUBLISHED_PARAMETERS = {
    "olmoe_1b_7b": 6_919_161_856,
    "mixtral_8x7b": 46_702_792_704,
    "qwen3_30b_a3b": 30_532_122_624,
}


def parameters_of(config):
    abstract = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    return sum(x.size for x in jax.tree.leaves(nnx.state(abstract, nnx.Param)))


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_presets_have_the_published_number_of_parameters(name):
    assert PRESETS[name].num_parameters == PUBLISHED_PARAMETERS[name]
    assert parameters_of(PRESETS[name]) == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_layers": 7, "moe_every": 3},
        {"num_experts": 0},
        {"qk_norm": "full", "tie_embeddings": True},
        {"qk_norm": "none", "shared_hidden_dim": 0},
        {"activation": "relu_squared"},
        {"scan_layers": False, "num_layers": 5},
    ],
    ids=str,
)
def test_the_closed_form_counts_the_parameters_of_the_model(config, changes):
    config = dataclasses.replace(config, **changes)
    assert config.num_parameters == parameters_of(config)


def test_active_parameters_count_only_the_experts_of_one_token(config):
    one_expert = 3 * config.embed_dim * config.expert_hidden_dim
    inactive = (config.num_experts - config.top_k) * one_expert
    assert config.num_parameters - config.num_active_parameters == inactive
    # "OLMoE-1B-7B uses 1B of its 7B parameters"; "8x7B uses 13B"; "30B-A3B".
    active = [round(PRESETS[name].num_active_parameters / 1e9, 1) for name in PUBLISHED_PARAMETERS]
    assert active == [1.3, 12.9, 3.4]


def test_flops_are_six_for_each_weight_and_half_of_the_attention_scores(config):
    config = dataclasses.replace(config, num_experts=0, num_layers=1, first_dense_layers=0, vocab_size=10)
    query_and_output, key_and_value = 2 * 16 * 24, 2 * 16 * 12
    weights = query_and_output + key_and_value + 3 * 16 * 12 + 10 * 16
    scores_and_values = 2 * 2 * (100 / 2) * 4 * 6
    assert config.flops_per_token(100) == 3 * (2 * weights + scores_and_values)


def test_the_pattern_says_which_layers_are_dense():
    def kinds(**changes):
        changes = {"hidden_dim": 8, **changes}
        return [kind[0] for kind in dataclasses.replace(PRESETS["tiny"], **changes).layer_kinds]

    assert kinds(num_layers=3) == ["m", "m", "m"]
    assert kinds(num_layers=4, moe_every=2) == ["d", "m", "d", "m"]
    assert kinds(num_layers=7, first_dense_layers=1, moe_every=3) == ["d", "d", "d", "m", "d", "d", "m"]
    assert kinds(num_layers=2, num_experts=0) == ["d", "d"]


def test_layers_that_are_not_scanned_are_groups_of_their_own(config):
    config = dataclasses.replace(config, num_layers=6, first_dense_layers=2, scan_layers=False)
    dense, alternating = LayerGroup(("dense",), 1), LayerGroup(("dense", "moe"), 1)
    assert config.layer_groups == (dense, dense, alternating, alternating)
    assert config.layer_kinds == dataclasses.replace(config, scan_layers=True).layer_kinds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "num_heads must be a multiple of num_kv_heads, got 5 and 2"),
        ({"top_k": 5}, "top_k must be from 1 to num_experts = 4, got 5"),
        ({"top_k": 0}, "top_k must be from 1 to num_experts = 4, got 0"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"num_layers": 4}, "multiple of moe_every, got 4 - 1 and 2"),
        ({"first_dense_layers": 3}, "first_dense_layers must be less than num_layers = 3, got 3"),
        ({"hidden_dim": 0}, "hidden_dim must be at least 1 in a model with dense layers, got 0"),
        ({"expert_hidden_dim": 0}, "expert_hidden_dim must be at least 1 in a model with moe layers, got 0"),
        ({"moe_every": 0}, "moe_every must be at least 1, got 0"),
        ({"num_experts": -1}, "num_experts must not be negative, got -1"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"remat": "some"}, "remat must be one of none, dots, full, got 'some'"),
        ({"moe_implementation": "triton"}, "moe_implementation must be one of auto, mosaic_gpu"),
        ({"moe_implementation": "block_sparse"}, "expert_hidden_dim has an expert of 8 hidden features; .* of 64"),
    ],
    ids=str,
)
def test_fields_that_do_not_fit_raise_an_error_that_names_them(config, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)
