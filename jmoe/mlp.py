"""The expert MLPs of an MoE layer as one function, whose backward keeps only x and the pre-activations."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jmoe import block_sparse
from jmoe.activations import Activation, activate, value_and_derivative
from jmoe.arguments import check_mlp, check_mlp_side_by_side
from jmoe.combine import combine, group_sum
from jmoe.debug import check
from jmoe.dispatch import Dispatch, dispatch_unsorted, make_dispatch
from jmoe.routing import Assignments, Routing, in_range, is_present
from jmoe.rows import accumulator, accumulator_dtype, of_expert, take_rows, weighted
from pallas_kernels import (
    Implementation,
    activation_gradient,
    grouped_matmul,
    grouped_weight_gradient,
)
from pallas_kernels.block_sparse.topology import static_sizes

WeightOn = Literal["output", "input"]
MLPImplementation = Implementation | Literal["block_sparse"]


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
            section 5), by the fastest that can run here: XLA unless on Hopper, in 16 bits, D is a multiple of 64 and
            all F are of 128. All F must be multiples of 64; weights [E, D, H] are copied to [D, E*H]. Experts with
            `hidden_sizes` are computed so too, without a copy, and the other names are then those of
            `pallas_kernels.block_sparse.sdd`.

    Returns:
        [T, D] in x's dtype.

    Raises:
        ValueError: an argument's shape, dtype or name does not fit; the message says what it must be.

    Example:
        >>> import jax.numpy as jnp
        >>> import jmoe
        >>> x, w_up, w_down = jnp.ones((3, 2)), jnp.ones((4, 2, 5)), jnp.ones((4, 5, 2))
        >>> routing = jmoe.Routing(jnp.array([[0], [3], [-1]]), jnp.array([[1.0], [0.5], [1.0]]))
        >>> jmoe.moe_mlp(x, w_up, w_down, routing, activation="relu").tolist()
        [[10.0, 10.0], [5.0, 5.0], [0.0, 0.0]]
    """
    parameters = ExpertParameters(w_up, w_down, b_up, b_down)
    is_block_sparse = hidden_sizes is not None or implementation == "block_sparse"
    of_products = None if implementation == "block_sparse" else implementation
    if hidden_sizes is None:
        check_mlp(x, parameters, routing, activation, weight_on)
        num_experts, hidden, _ = w_down.shape
        hidden_sizes = (hidden,) * num_experts
    else:
        hidden_sizes = static_sizes("hidden_sizes", hidden_sizes)
        num_experts = len(hidden_sizes)
        check_mlp_side_by_side(x, parameters, routing, activation, weight_on, hidden_sizes)
    if isinstance(routing, Assignments):
        routing = in_range(routing, x.shape[0], num_experts)
    check(
        jnp.isfinite(routing.weight) | ~is_present(routing.expert_index, num_experts),
        "the routing weight of a present assignment is not finite",
    )
    if is_block_sparse:
        block_sparse.check_hidden_sizes("w_down" if w_down.ndim == 3 else "hidden_sizes", hidden_sizes)
        if not x.size or not routing.expert_index.size:
            return jnp.zeros_like(x)
        options = block_sparse.Options(activation, weight_on, remat, hidden_sizes, of_products)
        return block_sparse.block_sparse_mlp(
            options, x, parameters, routing.weight, make_dispatch(routing, num_experts)
        )
    options = _Options(activation, weight_on, remat, of_products)
    unsorted = None
    if isinstance(routing, Routing) and 0 < routing.expert_index.size <= _MOST_UNSORTED:
        # Read again for each token that shares an expert with one before it, on average.
        num_tokens, k = routing.expert_index.shape
        bytes_of_expert = (w_up.nbytes + w_down.nbytes) // num_experts
        if num_tokens * (num_tokens - 1) // 2 * k**2 * bytes_of_expert <= num_experts * _BYTES_OF_SORT:
            unsorted = dispatch_unsorted(routing, num_experts)
    return _moe_mlp(options, x, parameters, routing.weight, make_dispatch(routing, num_experts), unsorted)


class ExpertParameters(NamedTuple):
    """The parameters of E expert MLPs, in the shapes of `moe_mlp`."""

    w_up: Float[Array, "E D H"] | Float[Array, "D H"]
    w_down: Float[Array, "E F D"] | Float[Array, "F D"]
    b_up: Float[Array, "E H"] | Float[Array, " H"] | None = None
    b_down: Float[Array, "E D"] | None = None


_MOST_UNSORTED = 32  # assignments; each is a group of its own then
_BYTES_OF_SORT = 24_000_000  # what an H100 reads while it sorts few assignments: 8 us


@dataclasses.dataclass(frozen=True)
class _Options:
    activation: Activation
    weight_on: WeightOn
    remat: bool
    implementation: Implementation | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _moe_mlp(
    options: _Options,
    x: Array,
    parameters: ExpertParameters,
    weight: Array,
    dispatch: Dispatch,
    unsorted: Dispatch | None,
) -> Array:
    # Without a backward nothing needs the rows in order; what is not used is not computed under jit.
    y, _ = _outputs(options, x, parameters, weight, unsorted or dispatch)
    return y


def _forward(options, x, parameters, weight, dispatch, unsorted):
    del unsorted
    y, h = _outputs(options, x, parameters, weight, dispatch)
    if parameters.b_up is None and parameters.b_down is None:
        dispatch = dataclasses.replace(dispatch, expert_index=None)  # which only the biases' gradients read
    # The parameters as they came: a copy in the compute dtype would live until the backward.
    return y, (x, parameters, weight, dispatch, None if options.remat else h)


# This and the backward are compiled functions of their own, so that layers of the same shapes are traced and lowered
# once for all of them, which is most of what a model of many layers takes to compile.
@functools.partial(jax.jit, static_argnums=0)
def _outputs(options, x, parameters, weight, dispatch):
    """Computes y [T, D] and the pre-activations [R, H]."""
    # Where layers are scanned, XLA would run the matmul twice: once to write to the stack of all layers' h, and
    # once for the activation.
    h = lax.optimization_barrier(_up(options, x, parameters, weight, dispatch))
    a = activate(options.activation, accumulator(h)).astype(x.dtype)  # [R, F]
    y_rows = _down(options, a, parameters, dispatch)  # [R, D]
    weight = weight if options.weight_on == "output" else None
    return combine(y_rows, weight, dispatch, x.shape[0], options.implementation), h


@functools.partial(jax.jit, static_argnums=0)
def _backward(options, residuals, dy):
    x, parameters, weight, dispatch, h = residuals
    # The backward repeats gathers and casts of the forward. Without the barrier XLA would see that, compute them
    # once and keep them from forward to backward; or begin with them before dy is there. Where layers are scanned,
    # a barrier makes copies, so of the parameters only those that are cast go through it.
    are_cast = [p if p is not None and p.dtype != x.dtype else None for p in parameters]
    row_maps = dispatch.token_index, dispatch.position
    (token_index, position), are_cast, dy = lax.optimization_barrier((row_maps, are_cast, dy))
    dispatch = dataclasses.replace(dispatch, token_index=token_index, position=position)
    parameters = ExpertParameters._make(p if c is None else c for p, c in zip(parameters, are_cast, strict=True))
    if h is None:
        h = _up(options, x, parameters, weight, dispatch)  # [R, H]
    # [R, H], [R, F], [R]
    dh, a, dweight = _down_input_gradient(options, dy, h, parameters, weight, dispatch)
    dw_down = _weight_gradient(options, a, dy, parameters.w_down, dispatch, out_grad_index=token_index)  # [E, F, D]
    db_down = None
    if parameters.b_down is not None:
        dy_rows = accumulator(take_rows(dy, dispatch.token_index))
        dv_rows = weighted(dy_rows, weight, dispatch) if options.weight_on == "output" else dy_rows
        db_down = _bias_gradient(dv_rows, parameters.b_down, dispatch)  # [E, D]

    dx_rows = _matmul(options, dh, parameters.w_up, dispatch, transpose_rhs=True)  # [R, D]
    db_up = _bias_gradient(dh, parameters.b_up, dispatch)  # [E, H]
    if options.weight_on == "input":
        dweight = jnp.sum(accumulator(take_rows(x, dispatch.token_index)) * accumulator(dx_rows), axis=1)
        dx = combine(dx_rows, weight, dispatch, x.shape[0], options.implementation)
        dh = weighted(dh, weight, dispatch)
    else:
        dx = combine(dx_rows, None, dispatch, x.shape[0], options.implementation)
    dw_up = _weight_gradient(options, x, dh, parameters.w_up, dispatch, lhs_index=token_index)  # [E, D, H]

    parameter_gradients = ExpertParameters(dw_up, dw_down, db_up, db_down)
    return dx, parameter_gradients, dispatch.from_rows(dweight).astype(weight.dtype), None, None


_moe_mlp.defvjp(_forward, _backward)


def _up(options, x, parameters, weight, dispatch):
    """Computes the pre-activations, one row for each assignment."""
    exact = options.weight_on == "input" or parameters.b_up is not None
    dtype = accumulator_dtype(x) if exact else x.dtype
    h = _matmul(options, x, parameters.w_up, dispatch, lhs_index=dispatch.token_index, dtype=dtype)
    if options.weight_on == "input":
        # After the matmul, where the product is still in float32: (w x) W = w (x W).
        h = weighted(h, weight, dispatch)
    if parameters.b_up is not None:
        h += of_expert(parameters.b_up, dispatch)
    return h.astype(x.dtype)


def _down(options, a, parameters, dispatch):
    """Computes the experts' outputs, one row for each assignment."""
    if parameters.b_down is None:
        return _matmul(options, a, parameters.w_down, dispatch)
    y_rows = _matmul(options, a, parameters.w_down, dispatch, dtype=accumulator_dtype(a))
    return (y_rows + of_expert(parameters.b_down, dispatch)).astype(a.dtype)


def _down_input_gradient(options, dy, h, parameters, weight, dispatch):
    """Goes back through the down-projection and the activation.

    Returns the gradient of the pre-activations, the activations that the gradient of w_down needs, and that
    of the weights on the outputs v, `<dy, v> = <dy @ w_down^T, a> + <dy, b_down>`.
    """
    da = _matmul(options, dy, parameters.w_down, dispatch, lhs_index=dispatch.token_index, transpose_rhs=True)  # [R, F]
    dh, a, dweight = activation_gradient(
        h,
        da,
        dispatch.to_rows(weight) if options.weight_on == "output" else None,
        value_and_derivative(options.activation),
        # A kernel of ours may not be able to compute a function of the user's.
        implementation="xla" if callable(options.activation) else options.implementation,
    )
    if dweight is not None and parameters.b_down is not None:
        dy_rows = accumulator(take_rows(dy, dispatch.token_index))
        dweight += jnp.sum(dy_rows * of_expert(parameters.b_down, dispatch), axis=1)
    return dh, a, dweight


def _bias_gradient(rows, bias, dispatch):
    return None if bias is None else group_sum(rows, dispatch.group_sizes).astype(bias.dtype)


def _matmul(options, rows, weights, dispatch, *, lhs_index=None, dtype=None, transpose_rhs=False):
    return grouped_matmul(
        rows,
        weights.astype(rows.dtype),
        dispatch.group_sizes,
        preferred_element_type=dtype,
        transpose_rhs=transpose_rhs,
        lhs_index=lhs_index,
        rhs_index=dispatch.expert_of_group,
        implementation=options.implementation,
    )


def _weight_gradient(options, rows, out_grad, weights, dispatch, *, lhs_index=None, out_grad_index=None):
    return grouped_weight_gradient(
        rows,
        out_grad,
        dispatch.group_sizes,
        preferred_element_type=weights.dtype,
        lhs_index=lhs_index,
        out_grad_index=out_grad_index,
        implementation=options.implementation,
    )
