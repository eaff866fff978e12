"""The parts a transformer layer shares with any other: projection, RMSNorm and the dense MLP."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jmoe.models.config import TransformerConfig


def logical_axes(*names: str) -> dict[str, Any]:
    """Returns variable metadata that names a parameter's axes for sharding, without needing a mesh."""
    return {"out_sharding": names, "eager_sharding": False}


class Projection(nnx.Linear):
    """A bias-free `nnx.Linear` that computes in the model's compute dtype.

    Between forward and backward it keeps its input and the parameter itself, not the kernel cast to the compute
    dtype: over a scan of layers those casts would add up to a second copy of the model.
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
            kernel_metadata=logical_axes(*axes),
            rngs=rngs,
        )

    def __call__(self, inputs: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """Computes `inputs @ kernel`."""
        return jax.checkpoint(super().__call__, prevent_cse=False)(inputs)


class RMSNorm(nnx.RMSNorm):
    """Computes `x / sqrt(mean(x**2) + eps) * scale` over the last axis, in float32, and keeps only x for backward."""

    def __init__(self, features: int, config: TransformerConfig, *, rngs: nnx.Rngs):
        super().__init__(
            features,
            epsilon=config.norm_eps,
            dtype=jnp.float32,
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalizes x; the result has the dtype of x."""
        return jax.checkpoint(super().__call__, prevent_cse=False)(x).astype(x.dtype)


class MLP(nnx.Module):
    """The dense gated MLP (SwiGLU, arXiv 2002.05202): `(silu(x @ w_gate) * (x @ w_value)) @ w_down`.

    `up` holds `w_gate` and `w_value` side by side, gate columns first, as `w_up` of `jmoe.MoE` does.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.up = Projection(config.embed_dim, 2 * config.hidden_dim, ("embed", "mlp"), config, rngs=rngs)
        self.down = Projection(config.hidden_dim, config.embed_dim, ("mlp", "embed"), config, rngs=rngs)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Applies the MLP to each token."""
        gate, value = jnp.split(self.up(x), 2, axis=-1)  # [..., F] each
        return self.down(jax.nn.silu(gate) * value)


@jax.custom_vjp
def vocabulary_matmul(hidden: Float[Array, "B S D"], embedding: Float[Array, "V D"]) -> Float[Array, "B S V"]:
    """Computes `hidden @ embedding.T` in float32 from operands in the dtype of `hidden`.

    Its gradients multiply in the dtype of `hidden` too, where the derivative of a mixed-precision product would run
    in float32, and the gradient of the embedding is accumulated in the embedding's own dtype.
    """
    return jnp.einsum(
        "bsd,vd->bsv", hidden, embedding.astype(hidden.dtype), preferred_element_type=jnp.float32
    )


def _vocabulary_matmul_forward(hidden: Array, embedding: Array) -> tuple[Array, tuple[Array, Array]]:
    return vocabulary_matmul(hidden, embedding), (hidden, embedding)


def _vocabulary_matmul_backward(saved: tuple[Array, Array], logits_grad: Array) -> tuple[Array, Array]:
    hidden, embedding = saved
    logits_grad = logits_grad.astype(hidden.dtype)
    hidden_grad = jnp.einsum("bsv,vd->bsd", logits_grad, embedding.astype(hidden.dtype))
    embedding_grad = jnp.einsum("bsv,bsd->vd", logits_grad, hidden, preferred_element_type=embedding.dtype)
    return hidden_grad, embedding_grad


vocabulary_matmul.defvjp(_vocabulary_matmul_forward, _vocabulary_matmul_backward)
