"""`MixtureOfAttention` against the attention of JetMoE in Hugging Face transformers, where that is installed."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jmoe.models import MixtureOfAttention

pytestmark = pytest.mark.filterwarnings("ignore")  # of the other frameworks
D, HEAD, EXPERTS, K, HEADS, THETA = 24, 8, 5, 2, 3, 500.0


@pytest.fixture
def peer():
    """Returns JetMoE's attention with random weights, and what it gives for x [B, S, D]."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    jetmoe = pytest.importorskip("transformers.models.jetmoe.modeling_jetmoe")
    config = transformers.JetMoeConfig(
        hidden_size=D,
        kv_channels=HEAD,
        num_key_value_heads=HEADS,
        num_local_experts=EXPERTS,
        num_experts_per_tok=K,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    attention = jetmoe.JetMoeAttention(config, layer_idx=0)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    rotary = jetmoe.JetMoeRotaryEmbedding(config)

    def apply(x):
        x = torch.tensor(x)
        batch, length, _ = x.shape
        positions = torch.arange(length).expand(batch, -1)
        mask = torch.full((length, length), float("-inf")).triu(1).expand(batch, 1, -1, -1)
        with torch.no_grad():
            y, *_ = attention(x, position_embeddings=rotary(x, positions), attention_mask=mask)
        return y.numpy()

    return {name: parameter.detach().numpy() for name, parameter in attention.named_parameters()}, apply


def test_the_layer_is_jetmoes_attention_to_float32_rounding(peer, relative_error):
    parameters, apply_jetmoe = peer
    layer = MixtureOfAttention(
        D, HEAD, EXPERTS, K, num_heads=HEADS, num_kv_heads=HEADS, rope_theta=THETA, use_bias=True, rngs=nnx.Rngs(0)
    )
    key, value = np.split(parameters["kv_proj.weight"].T, 2, axis=1)
    layer.router.kernel[...] = parameters["experts.router.layer.weight"].T
    layer.query.kernel[...] = parameters["experts.input_linear.weight"].swapaxes(1, 2)
    layer.out.kernel[...] = parameters["experts.output_linear.weight"].swapaxes(1, 2)
    layer.key.kernel[...], layer.value.kernel[...] = key, value
    assert layer.bias is not None
    layer.bias[...] = parameters["experts.bias"]

    x = np.random.default_rng(0).standard_normal((2, 7, D)).astype(np.float32)
    y, _, _ = nnx.jit(lambda layer, x: layer(x))(layer, jnp.asarray(x))
    assert relative_error(y, apply_jetmoe(x)) < 2e-6
