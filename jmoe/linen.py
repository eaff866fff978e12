"""The MoE layer for Flax Linen: the NNX layer behind Flax's own bridge, with the same parameters and numbers.

`jmoe.linen.MoE` takes the arguments of `jmoe.MoE` but `rngs`, and a `name`; it returns a Linen module that is
called with `(x, *, mask=None, **router_inputs)`. Random keys for the router come from Linen:
`layer.apply(variables, x, rngs={"router": key})`. Parameters keep their names (`router/kernel`, `w_up`, ...) and
carry their logical axes as `nn.LogicallyPartitioned`, Linen's own box for them (`nn.unbox` takes it off).

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

from typing import Any

from flax import linen as nn
from flax import nnx
from jaxtyping import Array, Float

from jmoe import moe
from jmoe.routers import Route, Router


def MoE(*arguments: Any, router: Router | Route | None = None, name: str | None = None, **options: Any) -> nn.Module:
    """Makes the Linen module; the arguments are those of `jmoe.MoE` but `rngs`.

    A router that is a module is copied, so `init` gives the values that its variables have. Variables other than
    parameters lie in collections of their own, named after their class, such as "SelectionBias".
    """
    return nnx.bridge.to_linen(
        _create, *arguments, router=router, name=name, metadata_fn=_logically_partitioned, **options
    )


def _create(*arguments: Any, router: Router | Route | None, **options: Any) -> moe.MoE:
    # Flax creates the layer for each call, and puts the caller's variables into it.
    return _WithKeys(*arguments, router=nnx.clone(router) if isinstance(router, Router) else router, **options)


class _WithKeys(moe.MoE):
    """Calls the layer with the random keys that it is created with: Linen's, of this call."""

    def __init__(self, *arguments: Any, rngs: nnx.Rngs, **options: Any):
        super().__init__(*arguments, rngs=rngs, **options)
        self.keys = rngs if "router" in rngs else None

    def __call__(self, x: Float[Array, "*batch D"], **inputs: Any) -> tuple[Float[Array, "*batch D"], moe.MoEAux]:
        return super().__call__(x, rngs=self.keys, **inputs)


def _logically_partitioned(variable: nnx.Variable) -> Any:
    axes = variable.get_metadata().get("out_sharding")
    return variable[...] if axes is None else nn.LogicallyPartitioned(variable[...], axes)
