"""The expert MLPs of an MoE layer as one function, whose backward keeps only x and the pre-activations."""

from collections.abc import Sequence

import jax
from jaxtyping import Array, Float

from jmoe.activations import Activation
from jmoe.exchanges import ExchangeName, check_exchange
from jmoe.expert_parallel import mlp_on_mesh
from jmoe.grouped_mlp import ExpertParameters
from jmoe.local_mlp import MLPImplementation, WeightOn, local_mlp
from jmoe.placement import ExpertPlacement, check_placement
from jmoe.routing import Assignments, Routing
from jmoe.sharding import mesh_axes
from pallas_kernels.block_sparse.topology import static_sizes


def moe_mlp(
    x: Float[Array, "T D"],
    w_up: Float[Array, "E D H"] | Float[Array, "D H"],
    w_down: Float[Array, "E F D"] | Float[Array, "F D"],
    routing: Routing | Assignments,
    *,
    activation: Activation = "swiglu",
    b_up: Float[Array, "E H"] | Float[Array, " H"] | None = None,
    b_down: Float[Array, "E D"] | None = None,
    weight_on: WeightOn = "output",
    remat: bool = False,
    hidden_sizes: Sequence[int] | None = None,
    implementation: MLPImplementation | None = None,
    exchange: ExchangeName = "auto",
    expert_placement: ExpertPlacement | None = None,
) -> Float[Array, "T D"]:
    """Computes the weighted sum of each token's expert MLPs; no token is dropped, whatever the routing.

    `y[t] = sum_k w[t, k] * (act(x[t] @ w_up[e] + b_up[e]) @ w_down[e] + b_down[e])` with `e = expert_index[t,
    k]`.

    Between forward and backward it keeps x, the pre-activations [R, H] and integers; the backward recomputes
    the rest and gets the routing weights' gradients without the experts' outputs (SonicMoE, arXiv 2512.14080,
    section 3). Differentiable once, in reverse mode, in x, the four parameters and the routing weights. The
    same inputs on the same device give the same bits.

    Args:
        x: [T, D]. Its dtype is that of the computation; sums are taken in float32 (float64 for float64).
        w_up: [E, D, 2F] for a gated activation, gate columns first; [E, D, F] for a plain one. Cast to x's
            dtype inside, so that master weights can be passed as they are; its gradient has its own dtype.
        w_down: [E, F, D]; the same.
        routing: the experts of each token. A token with no present assignment gets zeros.
        activation: gated "swiglu", "geglu", "reglu"; plain "gelu", "relu", "relu_squared", "silu", or any
            function of an array, applied element by element (a plain one; it may not close over traced
            arrays); gated with any function as gate: `jmoe.Gated`.
        b_up: [E, 2F] or [E, F], added before the activation.
        b_down: [E, D], added to the expert's output, so that it is weighted too.
        weight_on: what the routing weight multiplies, the expert's "output" or its "input" (Llama 4).
        remat: whether the backward computes the pre-activations again instead of keeping them; then only x is
            kept, for one more product.
        hidden_sizes: F of each expert, static, where experts have different ones. The arrays then have their
            columns, or rows, side by side: w_up [D, sum of 2F_e] (an expert's gate columns, then its up columns) or
            [D, sum of F_e], w_down [sum of F_e, D], b_up as w_up without D. The pre-activations that are kept, and
            the work on them, have room for all rows on the widest expert.
        implementation: of the grouped matmuls, as in `pallas_kernels.grouped_matmul`; or "block_sparse", which pads
            each expert's rows to blocks and multiplies block-sparse matrices as MegaBlocks does (arXiv 2211.15841,
            section 5), by the fastest that can run here: XLA unless on Hopper, in 16 bits, D is a multiple of 64. All
            F must be multiples of 64, and blocks are of 128 where all F are multiples of that; weights [E, D, H] are
            copied to [D, E*H]. Experts with `hidden_sizes` are computed so too, without a copy, and the other names
            are then those of `pallas_kernels.block_sparse.sdd`.
        exchange: on a mesh (`jax.set_mesh`) with an axis for the experts, how tokens get to the experts of other
            devices and back: "gather", "ring", "all_to_all" (`jmoe.exchanges`), or "auto" for what
            `jmoe.exchanges.choose_exchange` takes. All arrays are then those of all devices together. Elsewhere, and
            inside a `jax.shard_map` over that axis, it means nothing.
        expert_placement: on the same meshes, which device has which experts (`jmoe.plan_placement`); by default device
            i has the i-th E/n of them. The parameters and their gradients are in its `order`, with a mesh and without
            one; routing has the experts' own numbers. Replicas take part only where experts are split. Inside a
            `jax.shard_map` over that axis, where the parameters are those of one device, leave it out.

    Returns:
        [T, D] in x's dtype.

    Raises:
        ValueError: an argument's shape, dtype or name does not fit, or the mesh does not divide the experts; the
            message says what it must be.

    Example:
        >>> import jax.numpy as jnp
        >>> import jmoe
        >>> x, w_up, w_down = jnp.ones((3, 2)), jnp.ones((4, 2, 5)), jnp.ones((4, 5, 2))
        >>> routing = jmoe.Routing(jnp.array([[0], [3], [-1]]), jnp.array([[1.0], [0.5], [1.0]]))
        >>> jmoe.moe_mlp(x, w_up, w_down, routing, activation="relu").tolist()
        [[10.0, 10.0], [5.0, 5.0], [0.0, 0.0]]
    """
    check_exchange(exchange)
    check_placement(expert_placement)
    parameters = ExpertParameters(w_up, w_down, b_up, b_down)
    options = {
        "activation": activation,
        "weight_on": weight_on,
        "remat": remat,
        "hidden_sizes": None if hidden_sizes is None else static_sizes("hidden_sizes", hidden_sizes),
        "implementation": implementation,
        "expert_placement": expert_placement,
    }
    if mesh_axes("expert", jax.sharding.get_abstract_mesh()):
        return mlp_on_mesh(x, routing, parameters, exchange=exchange, **options)
    return local_mlp(x, routing, parameters, **options)
