"""JetMoE's attention in Hugging Face transformers: random weights, an input and the output, for test_jetmoe.py.

`python tests/jmoe/models/jetmoe_attention.py` writes them beside it. It takes torch, transformers (5.23 it was) and
nothing of this project.
"""

from pathlib import Path
from typing import Any

import numpy as np

ARRAYS = Path(__file__).with_suffix(".npz")
D, HEAD, EXPERTS, K, HEADS, THETA = 24, 8, 5, 2, 3, 500.0


def run_transformers() -> dict[str, np.ndarray]:
    """Applies the layer to x [B, S, D]; returns x, y and the weights by their names, in float32."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]
    from transformers.models.jetmoe import modeling_jetmoe as jetmoe  # pyright: ignore[reportMissingImports]

    config = transformers.JetMoeConfig(
        hidden_size=D,
        kv_channels=HEAD,
        num_key_value_heads=HEADS,
        num_local_experts=EXPERTS,
        num_experts_per_tok=K,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        attn_implementation="eager",
    )
    rng = np.random.default_rng(0)

    def normal(*shape: int, scale: float) -> Any:
        return torch.tensor(scale * rng.standard_normal(shape), dtype=torch.float32)

    attention = jetmoe.JetMoeAttention(config, layer_idx=0)
    weights = {name: normal(*parameter.shape, scale=0.3) for name, parameter in attention.named_parameters()}
    attention.load_state_dict(weights)
    x = normal(2, 7, D, scale=1.0)
    positions = torch.arange(7).expand(2, -1)
    rotation = jetmoe.JetMoeRotaryEmbedding(config)(x, positions)
    mask = torch.full((7, 7), float("-inf")).triu(1).expand(2, 1, -1, -1)
    with torch.no_grad():
        y, *_ = attention(x, position_embeddings=rotation, attention_mask=mask)
    return {name: array.numpy() for name, array in {"x": x, "y": y, **weights}.items()}


if __name__ == "__main__":
    np.savez_compressed(ARRAYS, allow_pickle=False, **run_transformers())
