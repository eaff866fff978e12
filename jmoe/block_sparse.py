"""Expert MLPs as products of block-sparse matrices, as MegaBlocks computes them: experts of any widths.

The rows of each expert are padded to whole blocks. Its pre-activations are the blocks of one block-diagonal matrix for
all experts, of which each has its own columns: the up-projection is `sdd`, the down-projection `dsd` (MegaBlocks,
arXiv 2211.15841, section 5).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Shaped

from jmoe.activations import Activation, activate, is_gated, value_and_derivative
from jmoe.combine import combine, group_sum
from jmoe.dispatch import Dispatch
from jmoe.rows import accumulator, accumulator_dtype
from pallas_kernels import Implementation
from pallas_kernels.activation_gradient.reference import go_back
from pallas_kernels.block_sparse import BlockSparseMatrix, Topology, dds, dsd, expert_topology, sdd
from pallas_kernels.block_sparse.topology import padded_bounds
from pallas_kernels.schedule import group_bounds

_BLOCKS = (128, 64)


@dataclasses.dataclass(frozen=True)
class Options:
    """What the MLPs are besides their arrays.

    Attributes:
        activation: as in `moe_mlp`.
        weight_on: as in `moe_mlp`.
        remat: as in `moe_mlp`.
        hidden_sizes: F of each expert.
        implementation: of the products; None for the fastest that can run.
    """

    activation: Activation
    weight_on: str
    remat: bool
    hidden_sizes: tuple[int, ...]
    implementation: Implementation | None

    @property
    def block(self) -> int:
        """Rows and columns of a block: the most that divide all widths."""
        return next(block for block in _BLOCKS if not any(size % block for size in self.hidden_sizes))

    @property
    def up_sizes(self) -> tuple[int, ...]:
        """The pre-activations of each expert."""
        return tuple(2 * size for size in self.hidden_sizes) if is_gated(self.activation) else self.hidden_sizes


def check_hidden_sizes(name: str, hidden_sizes: tuple[int, ...], shards: int = 1) -> None:
    """Raises a ValueError that names the argument where experts, each in that many shards, do not come in blocks."""
    fastest, smallest = (block * shards for block in _BLOCKS)
    for size in hidden_sizes:
        if size < 1 or size % smallest:
            split = f", since the mesh splits them into {shards}" if shards > 1 else ""
            raise ValueError(
                f"{name} has an expert of {size} hidden features; block-sparse MLPs need positive multiples of "
                f"{smallest} (of {fastest}, where all are, for the fastest kernels){split}."
            )


class _Layout(NamedTuple):
    """Where everything is: the rows, padded to blocks, and the blocks of pre-activations and of activations.

    Attributes:
        rows: of tokens T where a row only fills a block.
        is_row: of each row whether it is one, and not padding.
        up: the blocks of the pre-activations; a row's gate columns first.
        hidden: the blocks of the activations.
    """

    rows: Dispatch
    is_row: Bool[Array, " R"]
    up: Topology
    hidden: Topology


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def block_sparse_mlp(options: Options, x: Array, parameters, weight: Array, dispatch: Dispatch) -> Array:
    """Computes `moe_mlp` by block-sparse products, with the same gradients and residuals.

    Args:
        options: static.
        x: [T, D].
        parameters: `ExpertParameters`, or such with `w_up[D, sum of H_e]`, `w_down[sum of F_e, D]` and
            `b_up[sum of H_e]`.
        weight: of the assignments.
        dispatch: the assignments sorted by expert.

    Returns:
        [T, D] in x's dtype.
    """
    y, _ = outputs(options, x, parameters, weight, dispatch)
    return y


def _forward(options, x, parameters, weight, dispatch):
    y, h = outputs(options, x, parameters, weight, dispatch)
    return y, (x, parameters, weight, dispatch, None if options.remat else h)


@functools.partial(jax.jit, static_argnums=0)  # as in `moe_mlp`
def outputs(options, x, parameters, weight, dispatch):
    """Computes y [T, D] and the blocks of the pre-activations."""
    layout = _make_layout(options, dispatch, x.shape[0])
    flat = _flatten(parameters)
    h = _up(options, x, flat, weight, layout)
    # Where layers are scanned, XLA would compute h twice: for the stack of all layers' h, and for the activation.
    h = h.with_values(lax.optimization_barrier(h.values))
    a = _activate(options, h, layout)
    y_rows = dsd(a, flat.w_down.astype(x.dtype), implementation=options.implementation)
    if flat.b_down is not None:
        y_rows = (accumulator(y_rows) + _of_rows(flat.b_down, layout)).astype(x.dtype)
    weight = weight if options.weight_on == "output" else None
    return combine(y_rows, weight, layout.rows, x.shape[0], options.implementation), h.values


@functools.partial(jax.jit, static_argnums=0)
def gradients(options, residuals, dy):
    """Computes the gradients of x, the parameters and the weights; the pre-activations too where they were not kept."""
    x, parameters, weight, dispatch, h = residuals
    # Without the barrier XLA would compute once what forward and backward share, and keep it in between.
    # Parameters that are used as they came have no copy to keep, and where layers are scanned a barrier would make one.
    if parameters.w_up.ndim == 3 or any(p is not None and p.dtype != x.dtype for p in parameters):
        dispatch, parameters, dy = lax.optimization_barrier((dispatch, parameters, dy))
    else:
        dispatch, dy = lax.optimization_barrier((dispatch, dy))
    layout = _make_layout(options, dispatch, x.shape[0])
    flat = _flatten(parameters)
    h = _up(options, x, flat, weight, layout) if h is None else BlockSparseMatrix(h, layout.up)
    x_rows, dy_rows = _gather(x, layout), _gather(dy, layout)  # [R, D]
    scale = _weight_of_rows(weight, layout)
    implementation = options.implementation
    on_output = options.weight_on == "output"

    w_down = flat.w_down.astype(x.dtype)
    da = sdd(dy_rows, w_down, layout.hidden, transpose_rhs=True, implementation=implementation)
    dh, a, of_weight = _go_back(options, h, da, scale if on_output else None, layout)
    dw_down = dsd(a.T, dy_rows, preferred_element_type=flat.w_down.dtype, implementation=implementation)
    dweight = _sum_rows(of_weight, options)
    db_down = None
    if flat.b_down is not None:
        wide_dy = accumulator(dy_rows)
        dweight += jnp.sum(wide_dy * _of_rows(flat.b_down, layout), axis=1)
        dv = scale[:, None] * wide_dy if on_output else wide_dy
        db_down = group_sum(dv, layout.rows.group_sizes).astype(flat.b_down.dtype)

    dx_rows = dsd(dh, flat.w_up.astype(x.dtype), transpose_rhs=True, implementation=implementation)  # [R, D]
    db_up = None if flat.b_up is None else _sum_columns(options, dh).astype(flat.b_up.dtype)
    if on_output:
        dx = combine(dx_rows, None, layout.rows, x.shape[0], implementation)
    else:
        dweight = jnp.sum(accumulator(x_rows) * accumulator(dx_rows), axis=1)
        dx = combine(dx_rows, weight, layout.rows, x.shape[0], implementation)
        dh = dh.with_values((accumulator(dh.values) * _of_blocks(scale, dh, axis=0)).astype(dh.dtype))
    dw_up = dds(x_rows, dh, transpose_lhs=True, preferred_element_type=flat.w_up.dtype, implementation=implementation)

    of_flat = flat._replace(w_up=dw_up, w_down=dw_down, b_up=db_up, b_down=db_down)
    dweight = layout.rows.from_rows(dweight).astype(weight.dtype)
    return dx, _unflatten(of_flat, parameters), dweight


def _backward(options, residuals, dy):
    return *gradients(options, residuals, dy), None


block_sparse_mlp.defvjp(_forward, _backward)


def _make_layout(options: Options, dispatch: Dispatch, num_tokens: int) -> _Layout:
    num_rows, block, num_experts = dispatch.token_index.size, options.block, len(options.hidden_sizes)
    make = functools.partial(expert_topology, dispatch.group_sizes, num_rows=num_rows, block=block)
    hidden = make(options.hidden_sizes)
    up = make(options.up_sizes) if options.up_sizes != options.hidden_sizes else hidden

    start, end = group_bounds(dispatch.group_sizes, num_rows)
    padded_start, padded_end = padded_bounds(dispatch.group_sizes, num_rows=num_rows, block=block)
    shift = padded_start - start
    padded_row = jnp.arange(hidden.shape[0], dtype=jnp.int32)
    expert = jnp.sum(padded_row[:, None] >= padded_end, axis=1, dtype=jnp.int32)  # E past the last group
    row = padded_row - shift.at[expert].get(mode="fill", fill_value=0)
    is_row = row < end.at[expert].get(mode="fill", fill_value=0)
    of_row = jnp.where(is_row, row, num_rows)

    row_shift = shift.at[dispatch.expert_index].get(mode="fill", fill_value=0)
    new_position = jnp.where(dispatch.expert_index < num_experts, jnp.arange(num_rows) + row_shift, hidden.shape[0])
    rows = Dispatch(
        token_index=dispatch.token_index.at[of_row].get(mode="fill", fill_value=num_tokens),
        slot=dispatch.slot.at[of_row].get(mode="fill", fill_value=0),
        expert_index=expert,
        position=new_position.at[dispatch.position].get(mode="fill", fill_value=hidden.shape[0]).astype(jnp.int32),
        group_sizes=padded_end - padded_start,
    )
    return _Layout(rows, is_row, up, hidden)


def _up(options, x, flat, weight, layout) -> BlockSparseMatrix:
    """Computes the pre-activations."""
    exact = options.weight_on == "input" or flat.b_up is not None
    dtype = accumulator_dtype(x) if exact else x.dtype
    h = sdd(
        _gather(x, layout),
        flat.w_up.astype(x.dtype),
        layout.up,
        preferred_element_type=dtype,
        implementation=options.implementation,
    )
    if options.weight_on == "input":
        # After the product, which is still in float32: (w x) W = w (x W).
        h = h.map(lambda values: values * _of_blocks(_weight_of_rows(weight, layout), h, axis=0))
    if flat.b_up is not None:
        h = h.map(lambda values: values + _of_blocks(accumulator(flat.b_up), h, axis=1))
    return h.with_values(h.values.astype(x.dtype))


def _activate(options: Options, h: BlockSparseMatrix, layout: _Layout) -> BlockSparseMatrix:
    parts = jnp.concatenate([accumulator(part) for part in _parts(options, h, layout)], axis=-1)
    return BlockSparseMatrix(activate(options.activation, parts).astype(h.dtype), layout.hidden)


def _go_back(
    options: Options, h: BlockSparseMatrix, da: BlockSparseMatrix, scale: Array | None, layout: _Layout
) -> tuple[BlockSparseMatrix, BlockSparseMatrix, BlockSparseMatrix]:
    """Goes back through the weighted activation, block by block.

    Returns the gradient of h, the weighted activations, and the products of activations and their gradients, in
    float32.
    """
    parts = [accumulator(part) for part in _parts(options, h, layout)]
    a, gradients, of_weight = go_back(parts, accumulator(da.values), value_and_derivative(options.activation))
    if scale is not None:
        scale = _of_blocks(scale, da, axis=0)
        a, gradients = a * scale, [gradient * scale for gradient in gradients]
    dh = gradients[0]
    if len(gradients) == 2:
        # Each block of h is one of the gate or one of the up half of its row.
        row, in_row = _place_in_row(layout.up)
        width = _row_widths(layout.hidden).at[row].get(mode="fill", fill_value=1)
        at = layout.hidden.row_offsets.at[row].get(mode="clip") + in_row % width
        gate, up = (gradient.at[at].get(mode="clip") for gradient in gradients)
        dh = jnp.where((in_row >= width)[:, None, None], up, gate)
    # Rows that only fill a block have no NaN of an activation at 0 either.
    dh = jnp.where(_of_blocks(layout.is_row, h, axis=0), dh, 0)
    of_rows = _of_blocks(layout.is_row, da, axis=0)
    a, of_weight = (jnp.where(of_rows, v, 0) for v in (a, of_weight))
    return h.with_values(dh.astype(h.dtype)), da.with_values(a.astype(h.dtype)), da.with_values(of_weight)


def _parts(options: Options, h: BlockSparseMatrix, layout: _Layout) -> list[Array]:
    """Returns the pre-activations, or their gate and their up half, of each block of the activations."""
    if not is_gated(options.activation):
        return [h.values]
    row, in_row = _place_in_row(layout.hidden)
    gate = layout.up.row_offsets.at[row].get(mode="clip") + in_row
    up = gate + _row_widths(layout.hidden).at[row].get(mode="clip")
    return [h.values.at[at].get(mode="clip") for at in (gate, up)]


def _place_in_row(topology: Topology) -> tuple[Int32[Array, " B"], Int32[Array, " B"]]:
    """Returns the row of each block, and which block of the row it is."""
    number = jnp.arange(topology.max_num_blocks, dtype=jnp.int32)
    return topology.row_indices, number - topology.row_offsets.at[topology.row_indices].get(mode="clip")


def _row_widths(topology: Topology) -> Int32[Array, " rows"]:
    return jnp.diff(topology.row_offsets)


def _sum_rows(matrix: BlockSparseMatrix, options: Options) -> Float[Array, " R"]:
    """Sums the elements of each row, in the order of its blocks, where no row has more than an expert has."""
    topology = matrix.topology
    of_blocks = matrix.values.sum(axis=2)  # [B, block]
    in_row = jnp.arange(max(options.hidden_sizes) // topology.block, dtype=jnp.int32)
    at = topology.row_offsets[:-1, None] + in_row
    of_rows = of_blocks.at[at].get(mode="clip")  # [rows, blocks of a row, block]
    inside = in_row < _row_widths(topology)[:, None]
    return jnp.where(inside[:, :, None], of_rows, 0).sum(axis=1).ravel()


def _sum_columns(options: Options, matrix: BlockSparseMatrix) -> Float[Array, " columns"]:
    """Sums the elements of each column, whose padding is zero, in as many steps as a product takes."""
    ones = jnp.ones((_BLOCKS[-1], matrix.shape[0]), matrix.dtype)  # as few as the kernels take
    return dds(
        ones,
        matrix,
        precision="highest",
        preferred_element_type=accumulator_dtype(matrix.values),
        implementation=options.implementation,
    )[0]


def _of_blocks(vector: Shaped[Array, " _"], matrix: BlockSparseMatrix, *, axis: int) -> Shaped[Array, "B _ _"]:
    """Cuts a value for each row (axis 0) or column (axis 1) of a matrix along its blocks."""
    index = matrix.column_indices if axis else matrix.row_indices
    of_lines = vector.reshape(-1, matrix.block).at[index].get(mode="fill", fill_value=0)
    return jnp.expand_dims(of_lines, axis=2 - axis)


def _gather(tokens: Float[Array, "T D"], layout: _Layout) -> Float[Array, "R D"]:
    """Copies the token of each row, and zeros to rows that only fill a block."""
    rows = tokens.at[layout.rows.token_index].get(mode="clip")
    return jnp.where(layout.is_row[:, None], rows, 0)


def _weight_of_rows(weight: Array, layout: _Layout) -> Float[Array, " R"]:
    return jnp.where(layout.is_row, layout.rows.to_rows(weight), 0)


def _of_rows(per_expert: Float[Array, "E D"], layout: _Layout) -> Float[Array, "R D"]:
    return accumulator(per_expert).at[layout.rows.expert_index].get(mode="fill", fill_value=0)


def _flatten(parameters):
    """Lays the columns of all experts side by side. Of parameters that come so nothing is copied."""
    w_up, w_down, b_up, b_down = parameters
    if w_up.ndim == 3:
        w_up = w_up.swapaxes(0, 1).reshape(w_up.shape[1], -1)
        w_down = w_down.reshape(-1, w_down.shape[2])
    return parameters._replace(w_up=w_up, w_down=w_down, b_up=None if b_up is None else b_up.ravel(), b_down=b_down)


def _unflatten(gradients, parameters):
    """Undoes `_flatten`."""
    if parameters.w_up.ndim == 3:
        experts, features, width = parameters.w_up.shape
        w_up = gradients.w_up.reshape(features, experts, width).swapaxes(0, 1)
        gradients = gradients._replace(w_up=w_up, w_down=gradients.w_down.reshape(parameters.w_down.shape))
    if parameters.b_up is not None:
        gradients = gradients._replace(b_up=gradients.b_up.reshape(parameters.b_up.shape))
    return gradients
