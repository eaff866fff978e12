"""Expert MLPs as grouped matmuls around a sort, whose backward keeps only x and the pre-activations."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jmoe.activations import Activation, activate, value_and_derivative
from jmoe.combine import combine, group_sum
from jmoe.dispatch import Dispatch
from jmoe.rows import accumulator, accumulator_dtype, of_expert, take_rows, weighted
from pallas_kernels import (
    Implementation,
    activation_gradient,
    grouped_matmul,
    grouped_weight_gradient,
)


class ExpertParameters(NamedTuple):
    """The parameters of E expert MLPs, in the shapes of `moe_mlp`."""

    w_up: Float[Array, "E D H"] | Float[Array, "D H"]
    w_down: Float[Array, "E F D"] | Float[Array, "F D"]
    b_up: Float[Array, "E H"] | Float[Array, " H"] | None = None
    b_down: Float[Array, "E D"] | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """What the MLPs are besides their arrays, as in `moe_mlp`."""

    activation: Activation
    weight_on: str
    remat: bool
    implementation: Implementation | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped_mlp(
    options: Options,
    x: Array,
    parameters: ExpertParameters,
    weight: Array,
    dispatch: Dispatch,
    unsorted: Dispatch | None,
) -> Array:
    """Computes `moe_mlp` by grouped matmuls.

    Args:
        options: static.
        x: [T, D].
        parameters: of the E experts.
        weight: of the assignments.
        dispatch: the assignments sorted by expert.
        unsorted: the same assignments as groups of their own, for few tokens without a backward.

    Returns:
        [T, D] in x's dtype.
    """
    # Without a backward nothing needs the rows in order; what is not used is not computed under jit.
    y, _ = outputs(options, x, parameters, weight, unsorted or dispatch)
    return y


def _forward(options, x, parameters, weight, dispatch, unsorted):
    del unsorted
    y, h = outputs(options, x, parameters, weight, dispatch)
    if parameters.b_up is None and parameters.b_down is None:
        dispatch = dataclasses.replace(dispatch, expert_index=None)  # which only the biases' gradients read
    # The parameters as they came: a copy in the compute dtype would live until the backward.
    return y, (x, parameters, weight, dispatch, None if options.remat else h)


# This and the backward are compiled functions of their own, so that layers of the same shapes are traced and lowered
# once for all of them, which is most of what a model of many layers takes to compile.
@functools.partial(jax.jit, static_argnums=0)
def outputs(options, x, parameters, weight, dispatch):
    """Computes y [T, D] and the pre-activations [R, H]."""
    # Where layers are scanned, XLA would run the matmul twice: once to write to the stack of all layers' h, and
    # once for the activation.
    h = lax.optimization_barrier(_up(options, x, parameters, weight, dispatch))
    a = activate(options.activation, accumulator(h)).astype(x.dtype)  # [R, F]
    y_rows = _down(options, a, parameters, dispatch)  # [R, D]
    weight = weight if options.weight_on == "output" else None
    return combine(y_rows, weight, dispatch, x.shape[0], options.implementation), h


@functools.partial(jax.jit, static_argnums=0)
def gradients(options, residuals, dy):
    """Computes the gradients of x, the parameters and the weights; the pre-activations too where they were not kept."""
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
    return dx, parameter_gradients, dispatch.from_rows(dweight).astype(weight.dtype)


def _backward(options, residuals, dy):
    return *gradients(options, residuals, dy), None, None


grouped_mlp.defvjp(_forward, _backward)


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
