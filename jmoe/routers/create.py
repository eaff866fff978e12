"""The router of a layer, from what its caller has said about routing."""

import inspect
from typing import Any

import jax
from flax import nnx
from flax.typing import Initializer

from jmoe.routers.linear import LinearRouter
from jmoe.routers.router import Route, Router
from jmoe.routing import check_weighting, route_top_k


def create_router(
    router: Router | Route | None,
    features: int,
    num_logits: int,
    *,
    top_k: int | None,
    param_dtype: jax.typing.DTypeLike,
    kernel_init: Initializer,
    rngs: nnx.Rngs,
    **options: Any,
) -> Router:
    """Returns a router itself; for a routing function, or for `jmoe.route_top_k` with the options, a linear router.

    Raises:
        ValueError: `top_k` or an option is out of range, options that are not the defaults are beside a router, or it
            is neither a function nor a `Router`.
    """
    if router is None:
        if top_k is None or not 1 <= top_k <= num_logits:
            raise ValueError(
                f"top_k is {top_k}; without a router it must be between 1 and the number of experts, {num_logits}."
            )
        check_weighting(options["score"], options["score_order"], options["normalize"])
        router, options = route_top_k, {"k": top_k, **options}
    else:
        _refuse_beside_router(top_k=top_k, **options)
        options = {}
    if isinstance(router, Router):
        return router
    if isinstance(router, nnx.Module):
        raise ValueError(f"router is a {type(router).__name__}; a module must be a jmoe.routers.Router.")
    return LinearRouter(
        features, num_logits, router, param_dtype=param_dtype, kernel_init=kernel_init, rngs=rngs, **options
    )


def _refuse_beside_router(**options: Any) -> None:
    """Raises a ValueError where an option is not the default, which a router would not see."""
    of_top_k = inspect.signature(route_top_k).parameters
    for name, value in options.items():
        default = None if name == "top_k" else of_top_k[name].default
        if value != default:
            raise ValueError(f"{name} is {value!r} beside a router; leave it out, and give the router its own options.")
