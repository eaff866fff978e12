"""A linear map with a matrix for each expert, from rows and to rows that are scattered or grouped (ScatterMoE)."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Initializer
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from jmoe.arguments import check_array
from jmoe.combine import combine, group_sum
from jmoe.debug import check
from jmoe.dispatch import Dispatch
from jmoe.parameters import per_expert
from jmoe.rows import accumulator, accumulator_dtype, of_expert, take_rows, weighted
from jmoe.sharding import partitioned
from pallas_kernels import Implementation, grouped_matmul, grouped_weight_gradient

_Order = Literal["tokens", "assignments", "rows"]  # what an array has a row for


def parallel_linear(
    x: Float[Array, "*_ D"],
    kernel: Float[Array, "E D N"],
    dispatch: Dispatch,
    *,
    grouped_in: bool = False,
    grouped_out: bool = False,
    weights: Float[Array, "*_"] | None = None,
    bias: Float[Array, "E N"] | None = None,
    num_tokens: int | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "*_ N"]:
    """Multiplies each assignment's row with the matrix of its expert.

    `v[t, k] = x[t] @ kernel[e] + bias[e]` with `e = expert_index[t, k]`, or of `x[t, k]`; with `weights`,
    `y[t] = sum_k weights[t, k] * v[t, k]`. Rows are scattered (where their token is) or grouped (sorted by
    expert, as `dispatch` has them) on either side. Scattered rows are read where they are: there is no padded
    copy of x and, on Hopper, no sorted one.

    | | `grouped_out=False` | `grouped_out=True` |
    |---|---|---|
    | `grouped_in=False` | x [T, D] or [T, K, D] to [T, K, N] | to [R, N] |
    | `grouped_in=True` | x [R, D] to [T, K, N] | to [R, N] |

    With `weights` a scattered output is [T, N]. An absent assignment gives zeros and gets no gradient, whatever
    its row or weight.

    On a mesh call it inside `jax.shard_map`, with `check_vma=False`: its loops do not say what they vary over.

    Between forward and backward it keeps its arguments only: the gradient of the weights needs no v, since
    `<dy, x @ kernel> = <dy @ kernel^T, x>`. Differentiable once, in reverse mode, in x, kernel, bias and weights.
    The same inputs on the same device give the same bits.

    Args:
        x: [T, D], shared by a token's assignments; [T, K, D], a row for each assignment; [R, D] with `grouped_in`.
        kernel: [E, D, N]. Cast to x's dtype inside; its gradient has its own dtype.
        dispatch: of `jmoe.make_dispatch`. From `Assignments` it has no K: x is then [T, D] or grouped, and a
            scattered output without weights is [R, N] in the order of the assignments. The token indices of
            their present ones must lie in [0, T); `jmoe.debug_checks()` reports others.
        grouped_in: whether x is sorted by expert.
        grouped_out: whether the output shall be; `weights` are for a scattered one.
        weights: [T, K] by assignment ([R] from `Assignments`), such as `routing.weight`.
        bias: [E, N], added before the weights.
        num_tokens: T, needed only where neither x nor `dispatch` tells it: for `weights` on grouped rows of
            `Assignments`.
        implementation: of the grouped matmuls, as in `pallas_kernels.grouped_matmul`.

    Returns:
        [T, K, N], [T, N] or [R, N] as above, in x's dtype.

    Raises:
        ValueError: the shape or dtype of an array does not fit, or `weights` meet `grouped_out`.

    Source: Tan et al. (ScatterMoE), arXiv 2403.08245, section 3.1.

    Example:
        >>> import jax.numpy as jnp
        >>> import jmoe
        >>> routing = jmoe.Routing(jnp.array([[0, 1], [1, -1]]), jnp.array([[0.5, 0.5], [1.0, 1.0]]))
        >>> dispatch = jmoe.make_dispatch(routing, 2)
        >>> x, kernel = jnp.array([[1.0], [2.0]]), jnp.array([[[10.0]], [[100.0]]])
        >>> jmoe.parallel_linear(x, kernel, dispatch).squeeze(-1).tolist()
        [[10.0, 100.0], [200.0, 0.0]]
        >>> jmoe.parallel_linear(x, kernel, dispatch, grouped_out=True).squeeze(-1).tolist()
        [10.0, 100.0, 200.0, 0.0]
        >>> jmoe.parallel_linear(x, kernel, dispatch, weights=routing.weight).tolist()
        [[55.0], [200.0]]
    """
    source: _Order = "rows" if grouped_in else "assignments" if x.ndim == 3 else "tokens"
    target: _Order = "rows" if grouped_out else "assignments" if weights is None else "tokens"
    if weights is not None and grouped_out:
        raise ValueError(
            "weights are given and grouped_out is True; weights belong to a scattered output: drop one of the two."
        )
    num_tokens = _check_arguments(source, x, kernel, dispatch, weights, bias, num_tokens)
    if num_tokens is not None:
        in_range = (dispatch.token_index >= 0) & (dispatch.token_index < num_tokens)
        check(in_range | ~_in_group(dispatch), "the token index of a present assignment is outside [0, T)")
    if weights is not None:
        check(jnp.isfinite(weights) | ~_is_present(dispatch), "the weight of a present assignment is not finite")
    options = _Options(source, target, num_tokens, implementation)
    return _parallel_linear(options, x, kernel, bias, weights, dispatch)


@dataclasses.dataclass(frozen=True)
class _Options:
    source: _Order
    target: _Order
    num_tokens: int | None
    implementation: Implementation | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _parallel_linear(
    options: _Options, x: Array, kernel: Array, bias: Array | None, weights: Array | None, dispatch: Dispatch
) -> Array:
    rows = grouped_matmul(
        _as_matrix(x),
        kernel.astype(x.dtype),
        dispatch.group_sizes,
        preferred_element_type=x.dtype if bias is None else accumulator_dtype(x),
        lhs_index=_index(options.source, dispatch),
        implementation=options.implementation,
    )  # [R, N]
    if bias is not None:
        rows = _without_absent(rows + of_expert(bias, dispatch), dispatch).astype(x.dtype)
    return _from_rows(options, options.target, rows, weights, dispatch)


def _forward(options, x, kernel, bias, weights, dispatch):
    return _parallel_linear(options, x, kernel, bias, weights, dispatch), (x, kernel, bias, weights, dispatch)


def _backward(options, residuals, dy):
    x, kernel, bias, weights, dispatch = residuals
    # As in the backward of `moe_mlp`: nothing computed in the forward is to be kept for this.
    dispatch, dy = lax.optimization_barrier((dispatch, dy))
    if kernel.dtype != x.dtype:
        kernel = lax.optimization_barrier(kernel)
    x_rows, x_index = _as_matrix(x), _index(options.source, dispatch)
    dy_rows, dy_index = _as_matrix(dy), _index(options.target, dispatch)
    # Without the weights, so that their gradient can be had from it.
    dx_rows = grouped_matmul(
        dy_rows,
        kernel.astype(x.dtype),
        dispatch.group_sizes,
        transpose_rhs=True,
        lhs_index=dy_index,
        implementation=options.implementation,
    )  # [R, D]
    dx = _from_rows(options, options.source, dx_rows, weights, dispatch)

    dweights = None
    if bias is not None or weights is not None:
        dy_rows, dy_index = take_rows(dy_rows, dy_index), None
    if weights is not None:
        of_rows = jnp.sum(accumulator(take_rows(x_rows, x_index)) * accumulator(dx_rows), axis=1)  # [R]
        if bias is not None:
            of_rows += jnp.sum(accumulator(dy_rows) * of_expert(bias, dispatch), axis=1)
        dweights = dispatch.from_rows(of_rows).astype(weights.dtype)
        dy_rows = weighted(dy_rows, weights, dispatch)
    dkernel = grouped_weight_gradient(
        x_rows,
        dy_rows,
        dispatch.group_sizes,
        preferred_element_type=kernel.dtype,
        lhs_index=x_index,
        out_grad_index=dy_index,
        implementation=options.implementation,
    )  # [E, D, N]
    dbias = None if bias is None else group_sum(dy_rows, dispatch.group_sizes).astype(bias.dtype)  # [E, N]
    return dx, dkernel, dbias, dweights, None


_parallel_linear.defvjp(_forward, _backward)


def _as_matrix(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _index(order: _Order, dispatch: Dispatch) -> Int32[Array, " R"] | None:
    """Says where each row is in an array of that order, its axes but the last flattened; None if row m is row m."""
    match order:
        case "tokens":
            return dispatch.token_index
        case "assignments" if dispatch.position.ndim == 2:
            return dispatch.token_index * dispatch.position.shape[1] + dispatch.slot
        case "assignments":
            return dispatch.slot
        case "rows":
            return None


def _from_rows(options: _Options, order: _Order, rows: Array, weights: Array | None, dispatch: Dispatch) -> Array:
    """Brings rows into that order, weighted; absent ones as zeros, and those of a token summed."""
    if order == "tokens":
        assert options.num_tokens is not None
        return combine(rows, weights, dispatch, options.num_tokens, options.implementation)
    if weights is not None:
        rows = _without_absent(weighted(rows, weights, dispatch), dispatch)
    if order == "rows":
        return rows
    return jnp.where(_is_present(dispatch)[..., None], rows[dispatch.position], 0)


def _without_absent(rows: Array, dispatch: Dispatch) -> Array:
    return jnp.where(_in_group(dispatch)[:, None], rows, 0)


def _is_present(dispatch: Dispatch) -> Bool[Array, "*_"]:
    """Says which assignments have a row in a group."""
    return dispatch.position < dispatch.group_sizes.sum()


def _in_group(dispatch: Dispatch) -> Bool[Array, " R"]:
    """Says which rows are in a group."""
    return jnp.arange(dispatch.token_index.size, dtype=jnp.int32) < dispatch.group_sizes.sum()


def check_dispatch(dispatch: Dispatch, num_experts: int | None = None) -> None:
    """Raises a ValueError unless this is a dispatch to experts, of that number if one is given."""
    if not isinstance(dispatch, Dispatch):
        raise ValueError(
            f"dispatch is a {type(dispatch).__name__}; it must be a jmoe.Dispatch, of jmoe.make_dispatch(routing, E)."
        )
    if dispatch.expert_of_group is not None:
        raise ValueError("dispatch has expert_of_group, groups that are no experts; it must be of jmoe.make_dispatch.")
    if num_experts not in (None, dispatch.group_sizes.size):
        raise ValueError(
            f"dispatch is of {dispatch.group_sizes.size} experts; it must be of {num_experts}, the layer's num_experts."
        )


def _check_arguments(
    source: _Order,
    x: Array,
    kernel: Array,
    dispatch: Dispatch,
    weights: Array | None,
    bias: Array | None,
    num_tokens: int | None,
) -> int | None:
    """Checks what goes with what, and returns T where it is known."""
    check_dispatch(dispatch)
    check_array("kernel", kernel, ("E", "D", "N"), {"E": dispatch.group_sizes.size})
    sizes = {"D": kernel.shape[1], "N": kernel.shape[2], "E": kernel.shape[0], "R": dispatch.token_index.size}
    assignments = ("R",)
    if dispatch.position.ndim == 2:
        assignments = ("T", "K")
        sizes["T"], sizes["K"] = dispatch.position.shape
    if num_tokens is not None:
        if sizes.get("T", num_tokens) != num_tokens:
            raise ValueError(f"num_tokens is {num_tokens} and dispatch has T={sizes['T']}; leave num_tokens out.")
        sizes["T"] = num_tokens
    if source == "assignments" and assignments == ("R",):
        raise ValueError("x is [T, K, D] and dispatch is of Assignments, which have no K; x must be [T, D] or grouped.")
    layout = {"tokens": ("T", "D"), "assignments": ("T", "K", "D"), "rows": ("R", "D")}[source]
    remedy = " (grouped_in is True: sorted by expert)" if source == "rows" else ""
    if source == "tokens" and "K" in sizes:
        remedy = " or [T, K, D], a row for each assignment"
    check_array("x", x, layout, sizes, remedy)
    if source == "tokens":
        sizes["T"] = x.shape[0]
    if bias is not None:
        check_array("bias", bias, ("E", "N"), sizes)
    if weights is not None:
        check_array("weights", weights, assignments, sizes)
        if "T" not in sizes:
            raise ValueError(
                "num_tokens is None, and neither a grouped x nor a dispatch of Assignments tells the number of tokens "
                "that weights sum to; pass num_tokens."
            )
    return sizes.get("T")


class ParallelLinear(nnx.Module):
    """`jmoe.parallel_linear` with its parameters: `kernel` [E, D, N] and, with `use_bias`, `bias` [E, N].

    Two of them and an activation are an expert MLP (`jmoe.moe_mlp` is the same with fewer arrays kept for the
    backward); two around an attention are `jmoe.models.MixtureOfAttention`. It computes what it is given: on a mesh
    call it inside `jax.shard_map`, with `check_vma=False`.

    Args:
        in_features: D.
        out_features: N.
        num_experts: E.
        use_bias: whether each expert has a bias.
        axes: the logical axes of D and N, as in `jmoe.LOGICAL_AXIS_RULES`.
        dtype: of the computation and the output; by default the promoted dtype of x and the parameters.
        param_dtype: the dtype of the parameters.
        kernel_init: initializer of the kernel. It sees one expert's [D, N] at a time.
        bias_init: initializer of the bias.
        implementation: of the grouped matmuls, as in `pallas_kernels.grouped_matmul`.
        rngs: random keys for the parameters (stream "params").

    Raises:
        ValueError: a size is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jmoe
        >>> up = jmoe.ParallelLinear(4, 16, num_experts=8, rngs=nnx.Rngs(0))
        >>> down = jmoe.ParallelLinear(16, 4, num_experts=8, axes=("expert_hidden", "embed"), rngs=nnx.Rngs(1))
        >>> routing = jmoe.Routing(jnp.array([[0, 7], [3, 0]]), jnp.full((2, 2), 0.5))
        >>> dispatch = jmoe.make_dispatch(routing, 8)
        >>> h = up(jnp.ones((2, 4)), dispatch, grouped_out=True)
        >>> y = down(nnx.relu(h), dispatch, grouped_in=True, weights=routing.weight)
        >>> h.shape, y.shape
        ((4, 16), (2, 4))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int,
        *,
        use_bias: bool = False,
        axes: tuple[str | None, str | None] = ("embed", "expert_hidden"),
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),
        bias_init: Initializer = nnx.initializers.zeros_init(),
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        sizes = {"in_features": in_features, "out_features": out_features, "num_experts": num_experts}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1.")
        self.in_features = in_features
        self.out_features = out_features
        self.num_experts = num_experts
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.implementation: Implementation | None = implementation

        def create(initializer: Initializer, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
            initializer = partitioned(per_expert(initializer), ("expert", *axes))
            return nnx.Param(initializer(rngs.params(), (num_experts, *shape), param_dtype))

        self.kernel = create(kernel_init, (in_features, out_features), axes)
        self.bias = create(bias_init, (out_features,), axes[1:]) if use_bias else None

    def __call__(
        self,
        x: Float[Array, "*_ D"],
        dispatch: Dispatch,
        *,
        grouped_in: bool = False,
        grouped_out: bool = False,
        weights: Float[Array, "*_"] | None = None,
        num_tokens: int | None = None,
    ) -> Float[Array, "*_ N"]:
        """Computes `jmoe.parallel_linear` with the module's parameters; arguments, result and errors are its."""
        kernel, bias = self.kernel[...], None if self.bias is None else self.bias[...]
        dtype = jnp.result_type(x, kernel) if self.dtype is None else self.dtype
        return parallel_linear(
            x.astype(dtype),
            kernel,
            dispatch,
            grouped_in=grouped_in,
            grouped_out=grouped_out,
            weights=weights,
            bias=bias,
            num_tokens=num_tokens,
            implementation=self.implementation,
        )
