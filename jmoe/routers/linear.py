"""The linear router: logits by a matrix, and a function that routes by them."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Initializer
from jaxtyping import Array, Float

from jmoe.routers.router import Route, Router, with_inputs
from jmoe.routing import Assignments, Routing, Score
from jmoe.sharding import partitioned


class LogitsRouter(Router):
    """Routes by logits: what routers have in common that differ in how they make these.

    Args:
        route: `route(logits, *, mask=None, **options) -> Routing | Assignments`. It gets inputs as a `Router` does.
        options: keyword arguments of `route`. Routers with equal options compare as equal, which stacking layers
            needs and `functools.partial` does not give.
    """

    def __init__(self, route: Route, options: dict[str, Any]):
        self.route = route
        self.options = tuple(sorted(options.items()))

    @property
    def score(self) -> Score:
        """The routing function's own `score`; "softmax" for one that has none."""
        parameter = inspect.signature(self._bound_route).parameters.get("score")
        return "softmax" if parameter is None or parameter.default is parameter.empty else parameter.default

    def routed(
        self, logits: Float[Array, "T E"], inputs: dict[str, Any]
    ) -> tuple[Routing | Assignments, Float[Array, "T E"]]:
        """Routes by logits; returns both, as a router's call does."""
        return with_inputs(self._bound_route, logits, inputs), logits

    @property
    def _bound_route(self) -> Route:
        return functools.partial(self.route, **dict(self.options))


class LinearRouter(LogitsRouter):
    """Routes by `logits = x @ kernel`, in float32 whatever the dtype of x (float64 for float64).

    The parameter is `kernel` [D, E].

    Args:
        features: D, the width of the tokens.
        num_experts: E, the number of logits.
        route: `route(logits, *, mask=None, **options) -> Routing | Assignments`. It gets inputs as a `Router` does.
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
        super().__init__(route, options)
        init = partitioned(kernel_init, ("embed", None))
        self.kernel = nnx.Param(init(rngs.params(), (features, num_experts), param_dtype))

    def __call__(self, x: Float[Array, "T D"], /, **inputs: Any) -> tuple[Routing | Assignments, Float[Array, "T E"]]:
        """Routes tokens, as `Router` says."""
        return self.routed(linear_logits(x, self.kernel[...]), inputs)


@jax.checkpoint  # or a float32 copy of x would be kept for the backward
def linear_logits(x: Float[Array, "T D"], kernel: Float[Array, "D E"]) -> Float[Array, "T E"]:
    """Computes `x @ kernel` in float32 (float64 for float64)."""
    dtype = jnp.promote_types(jnp.result_type(x, kernel), jnp.float32)
    return jnp.dot(x.astype(dtype), kernel.astype(dtype), precision="highest")
