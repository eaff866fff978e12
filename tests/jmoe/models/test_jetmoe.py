"""`MixtureOfAttention` against the attention of JetMoE in Hugging Face transformers."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jmoe.models import MixtureOfAttention
from tests.jmoe.models.jetmoe_attention import ARRAYS, EXPERTS, HEAD, HEADS, THETA, D, K, run_transformers


@pytest.fixture(scope="module")
def arrays():
    """The weights, x and y of JetMoE's attention, as transformers has computed it once."""
    with np.load(ARRAYS) as file:
        return dict(file)


def test_the_layer_is_jetmoes_attention_to_float32_rounding(arrays, relative_error):
    layer = MixtureOfAttention(
        D, HEAD, EXPERTS, K, num_heads=HEADS, num_kv_heads=HEADS, rope_theta=THETA, use_bias=True, rngs=nnx.Rngs(0)
    )
    key, value = np.split(arrays["kv_proj.weight"].T, 2, axis=1)
    layer.router.kernel[...] = arrays["experts.router.layer.weight"].T
    layer.query.kernel[...] = arrays["experts.input_linear.weight"].swapaxes(1, 2)
    layer.out.kernel[...] = arrays["experts.output_linear.weight"].swapaxes(1, 2)
    layer.key.kernel[...], layer.value.kernel[...] = key, value
    assert layer.bias is not None
    layer.bias[...] = arrays["experts.bias"]

    y, _, _ = nnx.jit(lambda layer, x: layer(x))(layer, jnp.asarray(arrays["x"]))
    assert relative_error(y, arrays["y"]) < 2e-6


@pytest.mark.filterwarnings("ignore")  # of the other frameworks
def test_transformers_that_is_installed_computes_the_same(arrays, relative_error):
    pytest.importorskip("torch")
    pytest.importorskip("transformers.models.jetmoe")
    computed = run_transformers()
    assert computed.keys() == arrays.keys()
    for name, array in computed.items():
        assert relative_error(array, arrays[name]) < 2e-6, name
