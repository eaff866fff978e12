"""The linear router: logits by a matrix, and a function that routes by them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Initializer
from jaxtyping import Array, Bool, Float

from jmoe.routing import Assignments, Routing
from jmoe.sharding import partitioned

Route = Callable[..., Routing | Assignments]
"""A routing function: `route(logits[T, E], *, mask=None, **options)`, like `jmoe.route_top_k`."""


class LinearRouter(nnx.Module):
    """Routes by `logits = x @ kernel`, in float32 whatever the dtype of x (float64 for float64).

    The parameter is `kernel` [D, E]. Subclasses change how logits are made or what is done with them.

    Args:
        features: D, the width of the tokens.
        num_experts: E, the number of logits.
        route: `route(logits, *, mask=None, **options) -> Routing | Assignments`.
        param_dtype: the dtype of the kernel.
        kernel_init: initializer of the kernel.
        rngs: random keys for the kernel (stream "params").
        **options: keyword arguments of `route`. Routers with equal options compare as equal, which stacking
            layers needs and `functools.partial` does not give.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jmoe
        >>> router = jmoe.routers.LinearRouter(16, 4, jmoe.route_top_k, k=2, rngs=nnx.Rngs(0))
        >>> routing, logits = router(jnp.ones((3, 16)))
        >>> routing.expert_index.shape, logits.shape
        ((3, 2), (3, 4))
    """

    def __init__(
        self,
        features: int,
        num_experts: int,
        route: Route,
        *,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),  # noqa: B008 (a pure function)
        rngs: nnx.Rngs,
        **options: Any,
    ):
        self.route = route
        self.options = tuple(sorted(options.items()))
        init = partitioned(kernel_init, ("embed", None))
        self.kernel = nnx.Param(init(rngs.params(), (features, num_experts), param_dtype))

    def __call__(
        self, x: Float[Array, "T D"], *, mask: Bool[Array, " T"] | None = None
    ) -> tuple[Routing | Assignments, Float[Array, "T E"]]:
        """Routes tokens.

        Args:
            x: [T, D].
            mask: bool[T], false for tokens that are not to be routed, such as padding.

        Returns:
            The routing, and the logits for losses.
        """
        logits = linear_logits(x, self.kernel[...])
        return apply_route(self.route, logits, mask, self.options), logits


def apply_route(
    route: Route, logits: Float[Array, "T E"], mask: Bool[Array, " T"] | None, options: tuple[tuple[str, Any], ...]
) -> Routing | Assignments:
    """Calls a routing function, which needs no argument `mask` where there is none."""
    return route(logits, **dict(options)) if mask is None else route(logits, mask=mask, **dict(options))


@jax.checkpoint  # or a float32 copy of x would be kept for the backward
def linear_logits(x: Float[Array, "T D"], kernel: Float[Array, "D E"]) -> Float[Array, "T E"]:
    """Computes `x @ kernel` in float32 (float64 for float64)."""
    dtype = jnp.promote_types(jnp.result_type(x, kernel), jnp.float32)
    return jnp.dot(x.astype(dtype), kernel.astype(dtype), precision="highest")
