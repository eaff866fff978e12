"""The MoE layer for Flax Linen: the NNX layer behind Flax's own bridge, with the same parameters and numbers.

`jmoe.linen.MoE` takes the arguments of `jmoe.MoE` but `rngs`, and a `name`; it returns a Linen module that is
called with `(x, *, mask=None)`. Parameters keep their names (`router/kernel`, `w_up`, ...) and carry their
logical axes as `nn.LogicallyPartitioned`, Linen's own box for them (`nn.unbox` takes it off).

Example:
    >>> import jax, jax.numpy as jnp
    >>> import jmoe
    >>> layer = jmoe.linen.MoE(16, 32, num_experts=4, top_k=2)
    >>> x = jnp.ones((3, 16))
    >>> variables = jax.jit(layer.init)(jax.random.key(0), x)
    >>> y, aux = jax.jit(layer.apply)(variables, x)
    >>> y.shape, sorted(variables["params"])
    ((3, 16), ['router', 'w_down', 'w_up'])
"""

import functools

from flax import linen as nn
from flax import nnx

from jmoe import moe


def _logically_partitioned(parameter: nnx.Variable) -> nn.LogicallyPartitioned:
    return nn.LogicallyPartitioned(parameter[...], parameter.get_metadata("out_sharding"))


MoE = functools.partial(nnx.bridge.to_linen, moe.MoE, metadata_fn=_logically_partitioned)
