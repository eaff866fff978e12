"""Top-k among the experts of a token's best groups, with a bias on the selection."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jmoe.routing import Routing, Score, check_top_k, checked_logits, log_score, weight_chosen
from pallas_kernels import top_k

GroupScore = Literal["max", "top_2_sum"]


def route_group_limited(
    logits: Float[Array, "T E"],
    k: int,
    *,
    num_groups: int = 1,
    top_k_groups: int = 1,
    group_score: GroupScore = "top_2_sum",
    score: Score = "sigmoid",
    selection_bias: Float[Array, " E"] | None = None,
    normalize: bool | float = True,
    scale: float = 1.0,
    mask: Bool[Array, " T"] | None = None,
) -> Routing:
    """Routes each token to its k best experts within its `top_k_groups` best groups.

    An expert is selected by `s_e + b_e`, its score plus its bias; experts e of group g are `g * E /
    num_groups` to `(g + 1) * E / num_groups - 1`, and a group is as good as its best expert ("max") or its
    two best added ("top_2_sum"). Weights are those of `jmoe.route_top_k`, of scores without the bias. Groups
    are what lies on one device: a token then goes to few devices.

    Of equal ones the lower index is chosen first. A NaN logit counts as the largest, as in
    `jmoe.route_top_k`.

    Args:
        logits: [T, E], the router's output, of any floating-point dtype.
        k: experts per token, at most those of `top_k_groups` groups.
        num_groups: groups of E / num_groups experts; 1 for none.
        top_k_groups: groups that a token may go to.
        group_score: "max" (DeepSeek-V2) or "top_2_sum" (DeepSeek-V3).
        score: as in `jmoe.route_top_k`: "softmax" in DeepSeek-V2, "sigmoid" in V3.
        selection_bias: [E], added to the scores for the selection only, so that it gets no gradient.
        normalize: as in `jmoe.route_top_k`.
        scale: as in `jmoe.route_top_k`.
        mask: as in `jmoe.route_top_k`.

    Returns:
        A `Routing` with `expert_index` int32[T, k], best first, and `weight` float32[T, k].

    Raises:
        ValueError: an argument is not one of the values above.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.2.2; DeepSeek-V3, arXiv 2412.19437, section 2.1.2 and its
    published `MoEGate`.

    Example:
        >>> import jax.numpy as jnp
        >>> import jmoe
        >>> logits = jnp.array([[3.0, -9.0, 2.0, 2.0]])  # in groups of two
        >>> jmoe.routers.route_group_limited(logits, 2, num_groups=2).expert_index.tolist()
        [[2, 3]]
        >>> jmoe.routers.route_group_limited(logits, 2, num_groups=2, group_score="max").expert_index.tolist()
        [[0, 1]]
    """
    logits = checked_logits(logits)
    num_experts = logits.shape[1]
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups is {num_groups}; it must divide the number of experts, {num_experts}.")
    if not 1 <= top_k_groups <= num_groups:
        raise ValueError(f"top_k_groups is {top_k_groups}; it must be between 1 and num_groups, {num_groups}.")
    group_size = num_experts // num_groups
    if group_score not in ("max", "top_2_sum"):
        raise ValueError(f"group_score is {group_score!r}; it must be 'max' or 'top_2_sum'.")
    if num_groups > 1 and group_score == "top_2_sum" and group_size < 2:
        raise ValueError(
            f"num_groups is {num_groups}, one expert each; 'top_2_sum' needs two: take fewer groups, or 'max'."
        )
    check_top_k(k, num_experts)
    if k > top_k_groups * group_size:
        raise ValueError(
            f"k is {k}; {top_k_groups} groups have only {top_k_groups * group_size} experts: raise top_k_groups."
        )
    if selection_bias is not None and selection_bias.shape != (num_experts,):
        raise ValueError(f"selection_bias has shape {list(selection_bias.shape)}; it must be [E={num_experts}].")

    selection = lax.stop_gradient(jnp.exp(log_score(logits, score)))  # [T, E]
    if selection_bias is not None:
        selection += lax.stop_gradient(selection_bias)
    if top_k_groups < num_groups:
        grouped = selection.reshape(-1, num_groups, group_size)
        best, _ = top_k(selection.reshape(-1, group_size), 1 if group_score == "max" else 2)
        _, group_index = top_k(best.sum(axis=1).reshape(-1, num_groups), top_k_groups)
        allowed = jax.nn.one_hot(group_index, num_groups, dtype=bool).any(axis=1)  # [T, groups]
        selection = jnp.where(allowed[:, :, None], grouped, -jnp.inf).reshape(selection.shape)
    _, expert_index = top_k(selection, k)
    chosen = jnp.take_along_axis(logits, expert_index, axis=1)
    routing = Routing(expert_index, weight_chosen(logits, chosen, score=score, normalize=normalize, scale=scale))
    return routing if mask is None else routing.masked(mask)
