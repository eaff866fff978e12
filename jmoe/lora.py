"""Low-rank expert adapters over a frozen kernel (mixture of LoRA)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Initializer
from jax import lax
from jaxtyping import Array, Float

from jmoe.dispatch import Dispatch
from jmoe.parallel_linear import check_dispatch, parallel_linear
from jmoe.parameters import per_expert
from jmoe.sharding import partition_spec, partitioned, place
from pallas_kernels import Implementation
from pallas_kernels.device import has_hopper_gpu

_KERNEL_WIDTH = 64  # of which every width in a grouped matmul on Hopper is a multiple
_A_INIT = nnx.initializers.he_uniform()
_B_INIT = nnx.initializers.zeros_init()


class LoRAExperts(nnx.Module):
    """A linear map for each expert, a frozen kernel plus a low-rank adapter that is trained.

    `v[t, k] = x[t] @ (kernel[e] + scale * lora_a[e] @ lora_b[e])` with `e = expert_index[t, k]`: the expert's own
    frozen kernel, or one dense kernel that all share. Called as `jmoe.parallel_linear`: scattered or grouped rows on
    either side, and with `weights` their weighted sum; on a mesh inside `jax.shard_map`, with `check_vma=False`.

    `lora_a` [E, D, rank] and `lora_b` [E, rank, N] are `nnx.LoRAParam`, as in `nnx.LoRA`; `kernel` is an `nnx.Variable`
    and no parameter, so that optimizers leave it, and gets no gradient. Between forward and backward x and an array
    [R, rank] are kept (on Hopper, where the rank is filled up to a multiple of 64, of that width).

    With weights a dense kernel costs one product a token, not K, and where they sum to 1, as those of
    `jmoe.route_top_k` do by default, the result is `x @ kernel + sum_k w_k * scale * x @ lora_a[e_k] @ lora_b[e_k]`.

    Args:
        kernel: the frozen kernel: [D, N], dense, or [E, D, N], of experts.
        rank: the width between an adapter's two matrices.
        num_experts: E; needed with a dense kernel, otherwise the kernel's.
        axes: the logical axes of D and N, as in `jmoe.LOGICAL_AXIS_RULES`.
        alpha: `scale = alpha / rank`; by default as `rank`, for a scale of 1.
        dtype: of the computation and the output; by default the promoted dtype of x, kernel and adapters.
        param_dtype: the dtype of the adapters.
        a_init: initializer of `lora_a`. It sees one expert's [D, rank] at a time.
        b_init: initializer of `lora_b`; zeros let training start from the frozen kernel.
        implementation: of the grouped matmuls, as in `pallas_kernels.grouped_matmul`.
        rngs: random keys for the adapters (stream "params").

    Raises:
        ValueError: the kernel has another shape, `rank` is not positive, or `num_experts` is missing or contradicts
            the kernel.

    Source: Hu et al. (LoRA), arXiv 2106.09685, section 4.1; Zadouri et al. (mixture of LoRA), arXiv 2309.05444,
    section 3.2.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jmoe
        >>> lora = jmoe.LoRAExperts(jnp.eye(4), rank=2, num_experts=3, rngs=nnx.Rngs(0))
        >>> routing = jmoe.Routing(jnp.array([[0, 2]]), jnp.array([[0.5, 0.5]]))
        >>> lora(jnp.ones((1, 4)), jmoe.make_dispatch(routing, 3), weights=routing.weight).tolist()
        [[1.0, 1.0, 1.0, 1.0]]
        >>> lora.merged_kernel().shape
        (3, 4, 4)
    """

    def __init__(
        self,
        kernel: Float[Array, "*_ D N"],
        rank: int,
        *,
        num_experts: int | None = None,
        axes: tuple[str | None, str | None] = ("embed", "expert_hidden"),
        alpha: float | None = None,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        a_init: Initializer = _A_INIT,
        b_init: Initializer = _B_INIT,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        if kernel.ndim not in (2, 3) or not jnp.issubdtype(kernel.dtype, jnp.floating):
            raise ValueError(
                f"kernel is {kernel.dtype}{list(kernel.shape)}; it must be floating-point [D, N] or [E, D, N]."
            )
        if kernel.ndim == 3 and num_experts not in (None, kernel.shape[0]):
            raise ValueError(f"num_experts is {num_experts} and kernel has E={kernel.shape[0]}; leave num_experts out.")
        if kernel.ndim == 3:
            num_experts = kernel.shape[0]
        if num_experts is None or num_experts < 1:
            raise ValueError(f"num_experts is {num_experts}; with a dense kernel it must be given, and at least 1.")
        if rank < 1:
            raise ValueError(f"rank is {rank}; it must be at least 1.")
        self.num_experts: int = num_experts
        self.rank = rank
        self.scale = 1.0 if alpha is None else alpha / rank
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.implementation: Implementation | None = implementation
        names = ("expert", *axes)[-kernel.ndim :]
        # As in `partitioned`, for an array that is there already.
        kernel = place(kernel, partition_spec(names, kernel.shape))
        self.kernel = nnx.Variable(kernel, out_sharding=names, eager_sharding=False)

        def create(initializer: Initializer, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.LoRAParam:
            initializer = partitioned(per_expert(initializer), ("expert", *axes))
            return nnx.LoRAParam(initializer(rngs.params(), (self.num_experts, *shape), param_dtype))

        in_features, out_features = kernel.shape[-2:]
        self.lora_a = create(a_init, (in_features, rank), (axes[0], None))
        self.lora_b = create(b_init, (rank, out_features), (None, axes[1]))

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
        """Applies each expert's adapted kernel; arguments, result and errors are those of `jmoe.parallel_linear`."""
        check_dispatch(dispatch, self.num_experts)
        kernel = lax.stop_gradient(self.kernel[...])
        lora_a, lora_b = self.lora_a[...], self.lora_b[...]
        x = x.astype(jnp.result_type(x, kernel, lora_a) if self.dtype is None else self.dtype)

        def apply(x: Array, kernel: Array, dispatch: Dispatch, grouped_in: bool = grouped_in, **target) -> Array:
            return parallel_linear(
                x, kernel, dispatch, grouped_in=grouped_in, implementation=self.implementation, **target
            )

        target = {"grouped_out": grouped_out, "weights": weights, "num_tokens": num_tokens}
        if num_tokens is None and weights is not None and not grouped_in:
            target["num_tokens"] = x.shape[0]  # which the grouped rows between the two matrices do not tell
        lora_a, lora_b = self._for_kernels(lora_a, lora_b)
        between = self.scale * apply(x, lora_a, dispatch, grouped_out=True)  # [R, rank]
        adapted = apply(between, lora_b, dispatch, grouped_in=True, **target)
        if kernel.ndim == 3:
            base = apply(x, kernel, dispatch, **target)
        elif weights is not None and weights.ndim == x.ndim == 2 and not grouped_in:
            base = _dense_combine(x, weights, kernel, dispatch)
        else:
            base = apply(x, kernel[None], _as_one_group(dispatch), **target)
        return base + adapted

    def _for_kernels(
        self, lora_a: Float[Array, "E D _"], lora_b: Float[Array, "E _ N"]
    ) -> tuple[Float[Array, "E D _"], Float[Array, "E _ N"]]:
        """Fills the rank up with zeros where Hopper's kernels run, which take no narrower matrices."""
        if self.implementation not in (None, "mosaic_gpu") or not has_hopper_gpu():
            return lora_a, lora_b
        zeros = (0, -self.rank % _KERNEL_WIDTH)
        return jnp.pad(lora_a, ((0, 0), (0, 0), zeros)), jnp.pad(lora_b, ((0, 0), zeros, (0, 0)))

    def merged_kernel(self, dtype: jax.typing.DTypeLike | None = None) -> Float[Array, "E D N"]:
        """Computes `kernel + scale * lora_a @ lora_b`, with which `jmoe.parallel_linear` gives what this module gives.

        Computed in float32 or better.

        Args:
            dtype: of the result, by default the kernel's. Where that has 16 bits, it may round small updates away:
                merge in float32 then.
        """
        kernel, lora_a, lora_b = self.kernel[...], self.lora_a[...], self.lora_b[...]
        wide = jnp.promote_types(jnp.result_type(kernel, lora_a, lora_b), jnp.float32)
        update = jnp.matmul(lora_a.astype(wide), lora_b.astype(wide), precision="highest")  # [E, D, N]
        return (kernel.astype(wide) + self.scale * update).astype(kernel.dtype if dtype is None else dtype)


@jax.checkpoint  # or copies of x, weighted, and of the kernel, cast, would be kept for the backward
def _dense_combine(
    x: Float[Array, "T D"], weights: Float[Array, "T K"], kernel: Float[Array, "D N"], dispatch: Dispatch
) -> Float[Array, "T N"]:
    """Sums `weights[t, k] * x[t] @ kernel` over the present assignments, with one product a token."""
    present = dispatch.position < dispatch.group_sizes.sum()
    total = jnp.where(present, weights, 0).sum(axis=1, keepdims=True)  # [T, 1]
    # Weighted before the product, which the gradient of the weights would need otherwise.
    rows = jnp.where(present.any(axis=1, keepdims=True), total.astype(x.dtype) * x, 0)
    return rows @ kernel.astype(x.dtype)


def _as_one_group(dispatch: Dispatch) -> Dispatch:
    """The same rows with one expert for all."""
    return dataclasses.replace(
        dispatch,
        expert_index=(dispatch.expert_index == dispatch.group_sizes.size).astype(jnp.int32),
        group_sizes=dispatch.group_sizes.sum(keepdims=True),
    )
