"""Token rounding: top-k, with every expert's tokens rounded to whole blocks."""

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jmoe.routing import ABSENT, Assignments, Score, checked_logits, count_assignments, log_score, route_top_k

Rounding = Literal["nearest", "up", "down"]


def route_token_rounding(
    logits: Float[Array, "T E"],
    k: int,
    *,
    block_rows: int = 128,
    rounding: Rounding = "nearest",
    score: Score = "softmax",
    normalize: bool | float = True,
    scale: float = 1.0,
    mask: Bool[Array, " T"] | None = None,
) -> Assignments:
    """Routes as `jmoe.route_top_k`, then rounds each expert's number of tokens to a multiple of `block_rows`.

    An expert that is rounded down loses those of its tokens with the least weight; one that is rounded up
    takes the tokens with the largest scores among those that did not choose it, with the score as weight. So
    no row of a kernel's block is wasted, and an expert differs from top-k by less than a block ("nearest": by
    half of one at most). The remaining assignments of a token keep their weight. Where fewer tokens are left
    than an expert is to get, it gets all.

    A token may lose experts here, all of them too: this is for training, where speed is worth that. An expert that less
    than half a block chose gets nothing ("nearest"; "down": less than a block), so that with few tokens, `T * k / E`
    less than `block_rows / 2`, there may be no assignment at all. At inference use `jmoe.route_top_k`, as the paper
    does: a layer with the same parameters and `top_k=k`.

    Args:
        logits: [T, E], the router's output, of any floating-point dtype.
        k: experts per token before the rounding.
        block_rows: the rows of a block of the grouped matmuls.
        rounding: "nearest" (half a block to the even number of blocks), "up" or "down".
        score: as in `jmoe.route_top_k`.
        normalize: as in `jmoe.route_top_k`; the scores of tokens that are added are not normalised.
        scale: as in `jmoe.route_top_k`.
        mask: bool[T], false for tokens that are not to be routed, such as padding.

    Returns:
        `Assignments`, sorted by token, then expert. Their number R is a static bound: the smaller of T * E
        and T * k plus, for each expert, what rounding may add: `block_rows - 1` ("up"), `block_rows // 2`
        ("nearest") or nothing ("down").

    Raises:
        ValueError: an argument is not one of the values above.

    On a mesh `jmoe.MoE` routes the tokens of each shard by themselves: what experts get is whole blocks from each
    shard.

    Source: Guo et al. (SonicMoE), arXiv 2512.14080, "token rounding". Unlike there, where the weights are scores that
    are not normalised, `normalize` is the user's choice.

    Example:
        >>> import jax.numpy as jnp
        >>> import jmoe
        >>> logits = jnp.array([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> up = jmoe.routers.route_token_rounding(logits, 1, block_rows=2, rounding="up")
        >>> jmoe.expert_load(up, 2).tolist()  # 3 and 1 tokens, made 4 and 2
        [0.6666666865348816, 0.3333333432674408]
    """
    if block_rows < 1:
        raise ValueError(f"block_rows is {block_rows}; it must be at least 1.")
    if rounding not in ("nearest", "up", "down"):
        raise ValueError(f"rounding is {rounding!r}; it must be 'nearest', 'up' or 'down'.")
    logits = checked_logits(logits)
    num_tokens, num_experts = logits.shape
    top_k = route_top_k(logits, k, score=score, normalize=normalize, scale=scale)

    # All as [T, E]: what top-k chose, and the weights, of which the scores stand for what it did not choose.
    rows = jnp.arange(num_tokens)[:, None]
    is_chosen = jnp.zeros(logits.shape, bool).at[rows, top_k.expert_index].set(True)
    weight = scale * jnp.exp(log_score(logits, score))
    weight = weight.at[rows, top_k.expert_index].set(top_k.weight, unique_indices=True)
    if mask is not None:
        top_k = top_k.masked(mask)

    count = _round(count_assignments(top_k.expert_index, num_experts), block_rows, rounding)  # [E]
    # Tokens in the order in which each expert takes them: those that chose it first, by weight; masked ones last.
    unavailable = ~is_chosen if mask is None else jnp.where(mask[:, None], ~is_chosen, 2)
    keys = unavailable.astype(jnp.int32), -lax.stop_gradient(weight), jnp.broadcast_to(rows, logits.shape)
    *_, order = lax.sort(keys, dimension=0, num_keys=2, is_stable=True)  # [T, E]
    is_taken = jnp.zeros(logits.shape, bool).at[order, jnp.arange(num_experts)].set(rows < count)
    if mask is not None:
        is_taken &= mask[:, None]

    most_added = {"up": block_rows - 1, "nearest": block_rows // 2, "down": 0}[rounding]
    bound = min(num_tokens * k + num_experts * most_added, num_tokens * num_experts)
    token_index, expert_index = jnp.nonzero(is_taken, size=bound, fill_value=ABSENT)
    weight = jnp.where(expert_index == ABSENT, 0, weight[token_index, expert_index])
    return Assignments(token_index.astype(jnp.int32), expert_index.astype(jnp.int32), weight)


def _round(count, block_rows, rounding):
    blocks, rest = jnp.divmod(count, block_rows)
    if rounding == "up":
        blocks += rest > 0
    elif rounding == "nearest":
        blocks += (2 * rest > block_rows) | ((2 * rest == block_rows) & (blocks % 2 == 1))
    return blocks * block_rows
