"""HyperRouter: a fixed random network makes the router's kernel from a trained embedding."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jmoe.routers.linear import LogitsRouter, linear_logits
from jmoe.routers.router import Route
from jmoe.routing import Assignments, Routing


class HyperNetwork(nnx.Variable):
    """The variable of a network that stays as it was drawn: no parameter."""


class HyperRouter(LogitsRouter):
    """Routes by `logits = x @ kernel`, where `kernel = reshape(relu(embedding @ w_in) @ w_out)`.

    Only the embedding is trained: less than a trained kernel, whose experts may collapse, and more than a
    random one. The parameter is `embedding` [N]; `w_in` [N, H] and `w_out` [H, D * E] keep their random
    values, in variables of their own kind.

    Args:
        features: D, the width of the tokens.
        num_experts: E.
        route: as in `LinearRouter`, such as `jmoe.route_top_k`.
        embedding_features: N, the width of the embedding.
        hidden_features: H, the hidden width of the hypernetwork.
        param_dtype: the dtype of the variables.
        rngs: random keys (stream "params").
        **options: keyword arguments of `route`.

    Source: Do et al., arXiv 2312.07035. Their published network has tanh where this one has ReLU.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jmoe
        >>> router = jmoe.routers.HyperRouter(16, 4, jmoe.route_top_k, k=2, rngs=nnx.Rngs(0))
        >>> routing, logits = router(jnp.ones((3, 16)))
        >>> routing.expert_index.shape, logits.shape, list(nnx.state(router, nnx.Param))
        ((3, 2), (3, 4), ['embedding'])
    """

    def __init__(
        self,
        features: int,
        num_experts: int,
        route: Route,
        *,
        embedding_features: int = 64,
        hidden_features: int = 64,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(route, options)
        self.num_experts = num_experts
        # The kernel's elements get a variance of 1 / D, as if drawn themselves.
        init, init_relu = nnx.initializers.lecun_normal(), nnx.initializers.he_normal()
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (embedding_features,), param_dtype))
        self.w_in = HyperNetwork(init(rngs.params(), (embedding_features, hidden_features), param_dtype))
        w_out = init_relu(rngs.params(), (hidden_features, features * num_experts), param_dtype)
        self.w_out = HyperNetwork(w_out / jnp.sqrt(features).astype(param_dtype))

    @property
    def kernel(self) -> Float[Array, "D E"]:
        """The kernel of the router, as the embedding makes it, in float32 whatever the dtype of the variables."""
        dtype = jnp.promote_types(self.embedding.dtype, jnp.float32)
        e, w_in, w_out = (variable[...].astype(dtype) for variable in (self.embedding, self.w_in, self.w_out))
        return (jax.nn.relu(e @ w_in) @ w_out).reshape(-1, self.num_experts)

    def __call__(self, x: Float[Array, "T D"], /, **inputs: Any) -> tuple[Routing | Assignments, Float[Array, "T E"]]:
        """Routes tokens, as `Router` says."""
        return self.routed(linear_logits(x, self.kernel), inputs)
