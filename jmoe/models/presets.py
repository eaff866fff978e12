"""Published and ready-made transformer configurations."""

from collections.abc import Mapping
from types import MappingProxyType

from jmoe.models.config import TransformerConfig

# Bytes, and room for an end-of-document and a padding token. Sized to train in minutes on two CPU cores.
_TINY = TransformerConfig(
    vocab_size=258,
    num_layers=4,
    embed_dim=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    num_experts=8,
    top_k=2,
    expert_hidden_dim=128,
    qk_norm="head",
    tie_embeddings=True,
    max_sequence_length=1024,
    dtype="float32",
)

# For experiments on one GPU: 0.5 billion parameters, 0.1 billion of them active.
_SMALL = TransformerConfig(
    vocab_size=32_768,
    num_layers=12,
    embed_dim=768,
    num_heads=12,
    num_kv_heads=4,
    head_dim=64,
    num_experts=32,
    top_k=4,
    expert_hidden_dim=512,
    qk_norm="head",
    tie_embeddings=True,
    max_sequence_length=2048,
)

# OLMoE-1B-7B (arXiv 2409.02060, appendix B). The paper's load-balancing loss has the scale of this library's.
_OLMOE_1B_7B = TransformerConfig(
    vocab_size=50_304,
    num_layers=16,
    embed_dim=2048,
    num_heads=16,
    num_kv_heads=16,
    head_dim=128,
    num_experts=64,
    top_k=8,
    expert_hidden_dim=1024,
    qk_norm="full",
    rope_theta=10_000.0,
    norm_eps=1e-5,
    max_sequence_length=4096,
    router_normalize=False,
    load_balancing_coef=0.01,
    router_z_coef=0.001,
)

# Mixtral 8x7B (arXiv 2401.04088): softmax over the top two logits equals softmax, top two, normalize.
# Hugging Face's `router_aux_loss_coef` of 0.02 weights a loss that is K times this library's.
_MIXTRAL_8X7B = TransformerConfig(
    vocab_size=32_000,
    num_layers=32,
    embed_dim=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    num_experts=8,
    top_k=2,
    expert_hidden_dim=14_336,
    qk_norm="none",
    rope_theta=1_000_000.0,
    norm_eps=1e-5,
    max_sequence_length=32_768,
    load_balancing_coef=0.04,
    router_z_coef=0.0,
)

# Qwen3-30B-A3B (arXiv 2505.09388). As for Mixtral, Hugging Face's coefficient of 0.001 times K.
_QWEN3_30B_A3B = TransformerConfig(
    vocab_size=151_936,
    num_layers=48,
    embed_dim=2048,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    num_experts=128,
    top_k=8,
    expert_hidden_dim=768,
    qk_norm="head",
    rope_theta=1_000_000.0,
    norm_eps=1e-6,
    max_sequence_length=40_960,
    load_balancing_coef=0.008,
    router_z_coef=0.0,
)

PRESETS: Mapping[str, TransformerConfig] = MappingProxyType(
    {
        "tiny": _TINY,
        "small": _SMALL,
        "olmoe_1b_7b": _OLMOE_1B_7B,
        "mixtral_8x7b": _MIXTRAL_8X7B,
        "qwen3_30b_a3b": _QWEN3_30B_A3B,
    }
)
"""Configurations by name; vary one with `dataclasses.replace`."""
