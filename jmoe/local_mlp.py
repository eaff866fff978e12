"""The expert MLPs of one device: arguments checked, and the implementation chosen."""

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from jmoe import block_sparse, grouped_mlp
from jmoe.activations import Activation
from jmoe.arguments import check_mlp, check_mlp_side_by_side
from jmoe.debug import check
from jmoe.dispatch import Dispatch, dispatch_unsorted, make_dispatch
from jmoe.grouped_mlp import ExpertParameters
from jmoe.placement import ExpertPlacement, placed_routing
from jmoe.routing import Assignments, Routing, in_range, is_present
from pallas_kernels import Implementation

WeightOn = Literal["output", "input"]
MLPImplementation = Literal[Implementation, "block_sparse"]
MLPOptions = block_sparse.Options | grouped_mlp.Options

_MOST_UNSORTED = 32  # assignments; each is a group of its own then
_BYTES_OF_SORT = 24_000_000  # what an H100 reads while it sorts few assignments: 8 us


def local_mlp(
    x: Float[Array, "T D"],
    routing: Routing | Assignments,
    parameters: ExpertParameters,
    *,
    activation: Activation,
    weight_on: WeightOn,
    remat: bool,
    hidden_sizes: tuple[int, ...] | None,
    implementation: MLPImplementation | None,
    expert_placement: ExpertPlacement | None,
) -> Float[Array, "T D"]:
    """Computes `jmoe.moe_mlp` of the tokens and experts that are here, whatever mesh there is.

    Args:
        x: [T, D].
        routing: the experts of each token.
        parameters: of the E experts.
        activation: as in `moe_mlp`.
        weight_on: as in `moe_mlp`.
        remat: as in `moe_mlp`.
        hidden_sizes: as in `moe_mlp`.
        implementation: as in `moe_mlp`.
        expert_placement: as in `moe_mlp`; of the order of the parameters only.

    Returns:
        [T, D] in x's dtype.

    Raises:
        ValueError: as in `moe_mlp`.
    """
    if hidden_sizes is None:
        check_mlp(x, parameters, routing, activation, weight_on)
        num_experts, hidden, _ = parameters.w_down.shape
        options = mlp_options((hidden,) * num_experts, activation, weight_on, remat, implementation)
    else:
        num_experts = len(hidden_sizes)
        check_mlp_side_by_side(x, parameters, routing, activation, weight_on, hidden_sizes)
        block_sparse.check_hidden_sizes("hidden_sizes", hidden_sizes)
        of_products = None if implementation == "block_sparse" else implementation
        options = block_sparse.Options(activation, weight_on, remat, hidden_sizes, of_products)
    if isinstance(routing, Assignments):
        routing = in_range(routing, x.shape[0], num_experts)
    if expert_placement is not None:
        expert_placement.check_fits(num_experts, one_width=hidden_sizes is None)
        routing = placed_routing(routing, expert_placement.without_replicas)
    check(
        jnp.isfinite(routing.weight) | ~is_present(routing.expert_index, num_experts),
        "the routing weight of a present assignment is not finite",
    )
    if isinstance(options, block_sparse.Options):
        if not x.size or not routing.expert_index.size:
            return jnp.zeros_like(x)
        dispatch = make_dispatch(routing, num_experts)
        return block_sparse.block_sparse_mlp(options, x, parameters, routing.weight, dispatch)
    unsorted = None
    if isinstance(routing, Routing) and 0 < routing.expert_index.size <= _MOST_UNSORTED:
        # Read again for each token that shares an expert with one before it, on average.
        num_tokens, k = routing.expert_index.shape
        bytes_of_expert = (parameters.w_up.nbytes + parameters.w_down.nbytes) // num_experts
        if num_tokens * (num_tokens - 1) // 2 * k**2 * bytes_of_expert <= num_experts * _BYTES_OF_SORT:
            unsorted = dispatch_unsorted(routing, num_experts)
    dispatch = make_dispatch(routing, num_experts)
    return grouped_mlp.grouped_mlp(options, x, parameters, routing.weight, dispatch, unsorted)


def mlp_options(
    hidden_sizes: tuple[int, ...],
    activation: Activation,
    weight_on: WeightOn,
    remat: bool,
    implementation: MLPImplementation | None,
) -> MLPOptions:
    """Says what experts of these widths are computed by, and how; each has matrices of its own."""
    if implementation == "block_sparse":
        block_sparse.check_hidden_sizes("w_down", hidden_sizes)
        return block_sparse.Options(activation, weight_on, remat, hidden_sizes, None)
    return grouped_mlp.Options(activation, weight_on, remat, implementation)


def mlp_outputs(
    options: MLPOptions, x: Float[Array, "T D"], parameters: ExpertParameters, weight: Array, dispatch: Dispatch
) -> tuple[Float[Array, "T D"], Array]:
    """Computes the MLPs' outputs and the pre-activations, for those who keep what they need themselves."""
    return _implementation(options).outputs(options, x, parameters, weight, dispatch)


def mlp_gradients(
    options: MLPOptions, residuals: tuple[Any, ...], dy: Float[Array, "T D"]
) -> tuple[Float[Array, "T D"], ExpertParameters, Float[Array, "..."]]:
    """Computes the gradients of x, the parameters and the weights.

    Args:
        options: the MLPs.
        residuals: x, parameters, weight and dispatch as `mlp_outputs` gets them, and the pre-activations; None for
            these, and they are computed again.
        dy: [T, D].
    """
    return _implementation(options).gradients(options, residuals, dy)


def _implementation(options):
    return block_sparse if isinstance(options, block_sparse.Options) else grouped_mlp
