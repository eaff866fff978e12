"""The parts of a transformer beside attention and MoE: projections, RMSNorm, dense MLP."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jmoe.activations import activate, is_gated
from jmoe.models.config import TransformerConfig
from jmoe.sharding import partitioned


class Projection(nnx.Linear):
    """A bias-free `nnx.Linear` that computes in the model's compute dtype.

    Between forward and backward it keeps its input and the parameter itself, not the kernel cast to the
    compute dtype: over a scan of layers those casts would add up to a second copy of the model.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axes: tuple[str, str],
        config: TransformerConfig,
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            in_features,
            out_features,
            use_bias=False,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            kernel_init=partitioned(nnx.initializers.lecun_normal(), axes),
            rngs=rngs,
        )

    def __call__(self, inputs: Float[Array, "... I"], out_sharding: Any = None) -> Float[Array, "... O"]:
        """Computes `inputs @ kernel`."""
        return recompute(functools.partial(super().__call__, out_sharding=out_sharding), inputs)


class RMSNorm(nnx.RMSNorm):
    """Computes `x / sqrt(mean(x**2) + eps) * scale` over the last axis, in float32.

    Between forward and backward it keeps x as it came, nothing in float32.
    """

    def __init__(self, features: int, config: TransformerConfig, *, rngs: nnx.Rngs):
        super().__init__(
            features,
            epsilon=config.norm_eps,
            dtype=jnp.float32,
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "... D"], mask: Array | None = None) -> Float[Array, "... D"]:
        """Normalizes x; the result has the dtype of x."""
        return recompute(functools.partial(super().__call__, mask=mask), x).astype(x.dtype)


class MLP(nnx.Module):
    """The dense MLP: `activation(x @ up) @ down`.

    A gated activation (arXiv 2002.05202) takes a `up` twice as wide, gate columns first, as in `jmoe.MoE`.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        D, F = config.embed_dim, config.hidden_dim
        up_dim = 2 * F if is_gated(config.activation) else F
        self.up = Projection(D, up_dim, ("embed", "mlp"), config, rngs=rngs)
        self.down = Projection(F, D, ("mlp", "embed"), config, rngs=rngs)
        self.activate = functools.partial(activate, config.activation)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Applies the MLP to each token."""
        return self.down(recompute(self.activate, self.up(x)))


def recompute(function: Callable[..., Array], *inputs: Array) -> Array:
    """Computes `function(*inputs)`, keeping only the inputs and parameters for the backward pass."""
    # A scan's backward pass is a loop of its own, and `backward_apart` stands in for that where layers are not
    # scanned: no common subexpression to protect.
    return jax.checkpoint(function, prevent_cse=False)(*inputs)


def backward_apart[**P, T](function: Callable[P, T]) -> Callable[P, T]:
    """Lets the backward pass of a function see the saved values through a barrier.

    Otherwise XLA, with both passes before it, would find that the backward pass recomputes what the forward
    pass has computed, and keep that in between: what recomputation is there to avoid.
    """
    apart = jax.custom_vjp(function)

    def backward(pull_back, cotangent):
        pull_back, cotangent = jax.lax.optimization_barrier((pull_back, cotangent))
        return pull_back(cotangent)

    apart.defvjp(functools.partial(jax.vjp, function), backward)
    return apart
