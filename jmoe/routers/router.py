"""What the layer asks of a router: a base class for modules, and how a routing function is called."""

import abc
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx
from jaxtyping import Array, Bool, Float

from jmoe.losses import AxisName
from jmoe.routing import Assignments, Routing, Score

Route = Callable[..., Routing | Assignments]
"""A routing function: `route(logits[T, E], *, mask=None, **options)`, like `jmoe.route_top_k`."""


class Router(nnx.Module):
    """The base class of routers: modules with the parameters and the state of one.

    A call of `jmoe.MoE` calls its router once, on a copy: changes to the variables are lost. State changes in methods
    of their own, which the training step calls. On a mesh a router sees the tokens of one shard.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jmoe
        >>> class Nearest(jmoe.routers.Router):  # to the expert whose centre is nearest, with weight 1
        ...     def __init__(self, centres):
        ...         self.centres = nnx.Param(centres)
        ...
        ...     def __call__(self, x):
        ...         distance = jnp.linalg.norm(x[:, None] - self.centres[...], axis=-1)
        ...         nearest = distance.argmin(axis=1, keepdims=True)
        ...         return jmoe.Routing(nearest, jnp.ones(nearest.shape)), -distance
        >>> router = Nearest(jnp.eye(16)[:4])
        >>> moe = jmoe.MoE(16, 32, num_experts=4, router=router, rngs=nnx.Rngs(0))
        >>> moe(jnp.eye(16)[:2])[1].expert_load.tolist()
        [0.5, 0.5, 0.0, 0.0]
    """

    top_k: int | None = None
    """K, the experts of a token as `shared_combine` and `capacity_factor` of the layer count them, if the router says
    it; by default as many as the routing has room for."""

    @property
    def score(self) -> Score:
        """How the load-balancing loss reads the logits."""
        return "softmax"

    @property
    def takes_key(self) -> bool:
        """Whether a call gets a random key: by default where it has an argument `key`, or takes any input."""
        parameters = inspect.signature(self.__call__).parameters.values()
        return any(parameter.name == "key" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)

    @abc.abstractmethod
    def __call__(self, *x: Any, **inputs: Any) -> tuple[Routing | Assignments, Float[Array, "T E"] | None]:
        """Routes tokens: `router(x, **inputs)`.

        A router declares the inputs that it wants as keyword arguments, and gets no others; those that may be
        missing need a default value.

        Args:
            *x: float[T, D], zero where a token is masked.
            **inputs: `mask`, bool[T], where the layer is called with a mask: tokens that may not take part. The
                layer makes their assignments absent in any case, so a router that looks at each token by itself
                needs no mask. `key`, a random key, where the layer is called with `rngs`. What else the layer is
                called with, such as `token_ids`, flattened to [T, ...].

        Returns:
            The routing, and the logits that the losses are made of; None for a router that has none.
        """

    def statistics(
        self, logits: Float[Array, "T E"], *, mask: Bool[Array, " T"] | None = None, axis_name: AxisName = ()
    ) -> dict[str, Float[Array, "..."]]:
        """Computes what the layer's aux is to tell of this router besides, as `aux.router`; by default nothing.

        It is not called where a router has no logits.

        Args:
            logits: [T, E], as the call has returned them.
            mask: as in `jmoe.load_balancing_loss`.
            axis_name: mesh axes that the tokens are sharded over; results must be the same on all shards.
        """
        del logits, mask, axis_name
        return {}


def call_router(
    router: Router, x: Float[Array, "T D"], inputs: Mapping[str, Any]
) -> tuple[Routing | Assignments, Float[Array, "T E"] | None]:
    """Calls a router with its inputs, as `with_inputs` does.

    Raises:
        ValueError: as of `with_inputs`, or the router returns no routing and logits.
    """
    routed = with_inputs(router, x, inputs)
    if not isinstance(routed, tuple) or len(routed) != 2 or not isinstance(routed[0], Routing | Assignments):
        kind = type(routed).__name__
        raise ValueError(f"the router returns a {kind}; it must be a pair, of a jmoe.Routing and the logits (or None).")
    return routed


def router_key(rngs: nnx.Rngs) -> Array:
    """Takes a random key for the noise of a router.

    Raises:
        ValueError: there is neither a stream "router" nor a "default".
    """
    if not ("router" in rngs or "default" in rngs):
        raise ValueError(f"rngs has the streams {sorted(rngs)}; the router's noise needs 'router' or 'default'.")
    return rngs.router()


def with_inputs[T](function: Callable[..., T], x: Array, inputs: Mapping[str, Any]) -> T:
    """Calls a router or a routing function with those of the inputs that it has parameters for.

    Inputs that are None are not there.

    Raises:
        ValueError: there is no parameter for an input other than `mask` and `key`, which serve without, or nothing
            for a parameter without default value.
    """
    inputs = {name: value for name, value in inputs.items() if value is not None}
    parameters = list(inspect.signature(function).parameters.values())[1:]
    names = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        for name in sorted(inputs.keys() - names - {"mask", "key"}):
            raise ValueError(f"{name} is given, and the router has no such argument; it takes {sorted(names)}.")
        inputs = {name: value for name, value in inputs.items() if name in names}
    for parameter in parameters:
        may_lack = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if parameter.default is parameter.empty and not may_lack and parameter.name not in inputs:
            raise ValueError(
                f"{parameter.name} is missing: the router needs it, so call the layer with it; or bind it, where it is "
                "an option of a routing function, with functools.partial."
            )
    return function(x, **inputs)
