"""The linear router: logits by a matrix, and a function that routes by them."""

import functools
import inspect
from collections.abc import Hashable
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
        options: keyword arguments of `route`. Routers with equal options compare as equal, which stacking layers needs;
            the keyword arguments of a `functools.partial` count as options, unless they hold arrays.

    Raises:
        ValueError: `route` is no function, or has no parameter for an option.
    """

    def __init__(self, route: Route, options: dict[str, Any]):
        if isinstance(route, functools.partial) and _has_comparable_options(route):
            route, options = route.func, {**route.keywords, **options}
        _check_route(route, options)
        self.route = route
        self.options = tuple(sorted(options.items()))
        k = inspect.signature(self._bound_route).parameters.get("k")
        if k is not None and isinstance(k.default, int):
            self.top_k = k.default

    @property
    def score(self) -> Score:
        """The routing function's own `score`; "softmax" for one that has none."""
        parameter = inspect.signature(self._bound_route).parameters.get("score")
        return "softmax" if parameter is None or parameter.default is parameter.empty else parameter.default

    @property
    def takes_key(self) -> bool:
        """Whether a call gets a random key: where it, or the routing function, has an argument `key`."""
        return any("key" in inspect.signature(function).parameters for function in (self.__call__, self.route))

    def routed(
        self, logits: Float[Array, "T E"], inputs: dict[str, Any]
    ) -> tuple[Routing | Assignments, Float[Array, "T E"]]:
        """Routes by logits; returns both, as a router's call does.

        Raises:
            ValueError: an input is one of the options, or as in `with_inputs`.
        """
        for name in inputs.keys() & dict(self.options).keys():
            raise ValueError(
                f"{name} is given, and is an option of the router, {dict(self.options)[name]!r}; leave it out."
            )
        return with_inputs(self._bound_route, logits, inputs), logits

    @property
    def _bound_route(self) -> Route:
        return functools.partial(self.route, **dict(self.options))


def _has_comparable_options(route: functools.partial) -> bool:
    return not route.args and all(isinstance(option, Hashable) for option in route.keywords.values())


def _check_route(route: Route, options: dict[str, Any]) -> None:
    """Raises a ValueError unless a routing function can be called with the options."""
    if not callable(route) or inspect.isclass(route):
        name = f"the class {route.__name__}" if inspect.isclass(route) else repr(route)
        raise ValueError(
            f"router is {name}; it must be a routing function such as jmoe.route_top_k, or an instance of a "
            "jmoe.routers.Router."
        )
    parameters = list(inspect.signature(route).parameters.values())[1:]
    names = {parameter.name for parameter in parameters}
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    for name in options.keys() - names:
        if not takes_any:
            raise ValueError(f"{name} is no option of the routing function; it takes {sorted(names)}.")


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
        **options: keyword arguments of `route`, as of `LogitsRouter`.

    Raises:
        ValueError: `route` is no function, or has no parameter for an option.

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
        kernel_init: Initializer = nnx.initializers.lecun_normal(),
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
