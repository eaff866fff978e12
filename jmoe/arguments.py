"""Checks of arguments, which name the argument, what it is and what it must be."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jmoe.activations import is_gated
from jmoe.dispatch import check_routing
from jmoe.routing import Routing


def check_array(name: str, array: Array, layout: Sequence[str], sizes: Mapping[str, int], remedy: str = "") -> None:
    """Raises a ValueError unless an array is floating-point and has the layout, with the sizes that are known."""
    fits = array.ndim == len(layout) and all(sizes.get(d, s) == s for d, s in zip(layout, array.shape, strict=True))
    if not fits or not jnp.issubdtype(array.dtype, jnp.floating):
        expected = ", ".join(f"{d}={sizes[d]}" if d in sizes else d for d in layout)
        raise ValueError(f"{name} is {array.dtype}{list(array.shape)}; it must be floating-point [{expected}]{remedy}.")


def check_mlp(x, parameters, routing, activation, weight_on) -> None:
    """Raises a ValueError unless the arguments of `jmoe.moe_mlp` fit each other, for experts of one width."""
    gated = _check_input(x, routing, activation, weight_on)
    features = x.shape[1]
    check_array("w_down", parameters.w_down, ("E", "F", "D"), {"D": features})
    num_experts, hidden, _ = parameters.w_down.shape
    width = "2F" if gated else "F"
    sizes = {"E": num_experts, "D": features, "F": hidden, "2F": 2 * hidden}
    remedy = f" ({activation} is gated: gate columns first, then as many up columns)" if gated else ""
    check_array("w_up", parameters.w_up, ("E", "D", width), sizes, remedy)
    if parameters.b_up is not None:
        check_array("b_up", parameters.b_up, ("E", width), sizes, remedy)
    if parameters.b_down is not None:
        check_array("b_down", parameters.b_down, ("E", "D"), sizes)


def check_mlp_side_by_side(x, parameters, routing, activation, weight_on, hidden_sizes) -> None:
    """Raises a ValueError unless they fit each other, for experts of different widths."""
    gated = _check_input(x, routing, activation, weight_on)
    if not hidden_sizes:
        raise ValueError("hidden_sizes is empty; there must be one for each expert.")
    up, down = "sum of 2F" if gated else "sum of F", "sum of F"
    sizes = {"D": x.shape[1], "E": len(hidden_sizes), down: sum(hidden_sizes)}
    sizes["sum of 2F"] = 2 * sizes[down]
    remedy = f" ({activation} is gated: each expert's gate columns, then its up columns)" if gated else ""
    check_array("w_up", parameters.w_up, ("D", up), sizes, remedy)
    check_array("w_down", parameters.w_down, (down, "D"), sizes)
    if parameters.b_up is not None:
        check_array("b_up", parameters.b_up, (up,), sizes, remedy)
    if parameters.b_down is not None:
        check_array("b_down", parameters.b_down, ("E", "D"), sizes)


def check_choice(name: str, choice: Any, allowed: Sequence[Any]) -> None:
    """Raises a ValueError unless an option is one of its values."""
    if choice not in allowed:
        raise ValueError(f"{name} is {choice!r}; it must be one of {', '.join(map(repr, allowed))}.")


def check_layer_input(x: Array, features: int, mask: Array | None, router_inputs: Mapping[str, Any]) -> None:
    """Raises a ValueError unless the arguments of a call of `jmoe.MoE` fit each other."""
    if not x.ndim or x.shape[-1] != features or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype}{list(x.shape)}; it must be a floating-point array [..., D={features}].")
    if "key" in router_inputs:
        raise ValueError("key is given; random keys for the router come from rngs=flax.nnx.Rngs(...).")
    batch = list(x.shape[:-1])
    for name, array in {**router_inputs, **({} if mask is None else {"mask": mask})}.items():
        if not isinstance(array, jax.Array | np.ndarray):
            raise ValueError(f"{name} is {array!r}; it must be an array {[*batch, '...']}: of each token of x.")
    if mask is not None and (list(mask.shape) != batch or mask.dtype != jnp.bool_):
        raise ValueError(f"mask is {mask.dtype}{list(mask.shape)}; it must be bool{batch}: one for each token of x.")
    for name, array in router_inputs.items():
        if list(array.shape[: len(batch)]) != batch:
            raise ValueError(f"{name} is {list(array.shape)}; it must be {[*batch, '...']}: of each token of x.")


def _check_input(x, routing, activation, weight_on) -> bool:
    """Checks what does not depend on the parameters; says whether the activation is gated."""
    if weight_on not in ("output", "input"):
        raise ValueError(f"weight_on is {weight_on!r}; it must be 'output' or 'input'.")
    gated = is_gated(activation)
    check_routing(routing)
    check_array("x", x, ("T", "D"), {})
    if isinstance(routing, Routing) and routing.expert_index.shape[0] != x.shape[0]:
        raise ValueError(
            f"routing is for {routing.expert_index.shape[0]} tokens and x has {x.shape[0]}; they must agree."
        )
    return gated
