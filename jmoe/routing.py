"""Routing: which experts each token goes to, and with what weight."""

import dataclasses
import math
from typing import Literal, Self, get_args, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Integer

from jmoe.debug import check
from pallas_kernels import top_k

ABSENT = -1
"""The expert index that marks an absent assignment; any other index outside [0, E) has the same effect."""

Score = Literal["softmax", "sigmoid", "sqrt_softplus"]
ScoreOrder = Literal["before_top_k", "after_top_k"]


@no_type_check  # JAX also builds pytrees of other shapes and of things that are no arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """The K experts of each token and their weights.

    Attributes:
        expert_index: int[T, K]. An index outside [0, E), -1 by custom, is an absent assignment: no row, no
            output, no gradient, whatever its weight.
        weight: float[T, K], what each expert's output (or input) is multiplied with.
    """

    expert_index: Integer[Array, "T K"]
    weight: Float[Array, "T K"]

    def masked(self, mask: Bool[Array, " T"]) -> Self:
        """Makes the assignments of the tokens where `mask` is false absent, with weight 0."""
        return self.where(mask[:, None])

    def where(self, present: Bool[Array, " T #K"]) -> Self:
        """Makes the assignments where `present` is false absent, with weight 0."""
        return _where(self, present)


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Assignments:
    """A flat list of R assignments, for routers that give tokens a varying number of experts.

    R is static; unused entries are absent. Accepted wherever a `Routing` is.

    Attributes:
        token_index: int[R], in any order. An index outside [0, T) makes the assignment absent.
        expert_index: int[R]. An index outside [0, E), -1 by custom, is an absent assignment.
        weight: float[R], what the expert's output (or input) is multiplied with.
    """

    token_index: Integer[Array, " R"]
    expert_index: Integer[Array, " R"]
    weight: Float[Array, " R"]

    def masked(self, mask: Bool[Array, " T"]) -> Self:
        """Makes the assignments of the tokens where `mask` is false absent, with weight 0."""
        token_index = _wide(self.token_index)
        in_range = (token_index >= 0) & (token_index < mask.size)
        return self.where(in_range & mask.at[self.token_index].get(mode="clip"))

    def where(self, present: Bool[Array, " R"]) -> Self:
        """Makes the assignments where `present` is false absent, with weight 0."""
        return _where(self, present)


def _where[R: (Routing, Assignments)](routing: R, present: Array) -> R:
    return dataclasses.replace(
        routing,
        expert_index=jnp.where(present, _wide(routing.expert_index), ABSENT),
        weight=jnp.where(present, routing.weight, 0),
    )


def route_top_k(
    logits: Float[Array, "T E"],
    k: int,
    *,
    score: Score = "softmax",
    score_order: ScoreOrder = "before_top_k",
    normalize: bool | float = True,
    scale: float = 1.0,
    mask: Bool[Array, " T"] | None = None,
) -> Routing:
    """Routes each token to the k experts with its largest logits.

    `weight = scale * s_i / sum_{j in top k} s_j`, or `scale * s_i` with `normalize=False`, where s is the
    score of the logits. All scores grow with the logit, so experts are chosen by logit; of equal ones the
    lower index is chosen first, as by `jax.lax.top_k`. Computed in float32 (float64 for float64 logits).

    A NaN logit counts as the largest. The token is then routed to valid experts with NaN weights: its own
    output is NaN and no other token's. `jmoe.debug_checks()` turns it into an error.

    Args:
        logits: [T, E], the router's output, of any floating-point dtype.
        k: experts per token, between 1 and E.
        score: "softmax" over the experts, "sigmoid" of each logit (DeepSeek-V3, arXiv 2412.19437, section
            2.1.2; Llama 4), or "sqrt_softplus", `sqrt(log(1 + exp(logit)))` (`scoring_func="sqrtsoftplus"` of
            DeepSeek-V4).
        score_order: whether the softmax is over all E logits ("before_top_k") or over the k chosen ones
            ("after_top_k": Mixtral, arXiv 2401.04088, section 2.1). The same for the other scores, and the
            same for a softmax that is normalised.
        normalize: whether a token's k weights are divided by their sum; or the p of a p-norm that they are divided
            by, `(sum_j s_j^p)^(1/p)`, as MegaBlocks' `moe_normalize_expert_weights`: more than 0, `math.inf` for
            the largest.
        scale: a factor on all weights, after the normalisation (`routed_scaling_factor` of DeepSeek-V3).
        mask: bool[T], false for tokens whose assignments are to be absent, such as padding.

    Returns:
        A `Routing` with `expert_index` int32[T, k], in descending order of the logits, and `weight`
        float32[T, k].

    Raises:
        ValueError: k, `score`, `score_order` or `normalize` is not one of the values above, or `logits` is not a
            floating-point matrix.

    Example:
        >>> import jax.numpy as jnp
        >>> import jmoe
        >>> routing = jmoe.route_top_k(jnp.array([[0.0, 2.0, 2.0, 1.0]]), 2)
        >>> routing.expert_index.tolist(), routing.weight.tolist()
        ([[1, 2]], [[0.5, 0.5]])
    """
    logits = checked_logits(logits)
    check_top_k(k, logits.shape[1])
    chosen, expert_index = top_k(logits, k)
    weight = weight_chosen(logits, chosen, score=score, score_order=score_order, normalize=normalize, scale=scale)
    routing = Routing(expert_index, weight)
    return routing if mask is None else routing.masked(mask)


def checked_logits(logits: Float[Array, "..."]) -> Float[Array, "T E"]:
    """Returns logits [T, E] in float32 (float64 for float64), or raises a ValueError where they are no such thing."""
    if logits.ndim != 2 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(
            f"logits is {logits.dtype}{list(logits.shape)}; it must be floating-point [T, E]: flatten the "
            "axes before the last one."
        )
    nan = jnp.isnan(logits).any(axis=1)
    check(~nan, f"logits hold NaN for {{nan}} of {nan.size} tokens", nan=nan.sum())
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def check_top_k(k: int, num_experts: int) -> None:
    """Raises a ValueError where k is no number of experts."""
    if not 1 <= k <= num_experts:
        raise ValueError(f"k is {k}; it must be between 1 and the number of experts, {num_experts}.")


def check_weighting(score: Score, score_order: ScoreOrder, normalize: bool | float) -> None:
    """Raises a ValueError where an option of `route_top_k` is none of its values."""
    _check_score(score)
    if score_order not in ("before_top_k", "after_top_k"):
        raise ValueError(f"score_order is {score_order!r}; it must be 'before_top_k' or 'after_top_k'.")
    if not isinstance(normalize, bool) and not normalize > 0:
        raise ValueError(f"normalize is {normalize}; it must be True, False or the p of a p-norm, more than 0.")


def weight_chosen(
    logits: Float[Array, "T E"],
    chosen: Float[Array, "T K"],
    *,
    score: Score,
    score_order: ScoreOrder = "before_top_k",
    normalize: bool | float,
    scale: float,
) -> Float[Array, "T K"]:
    """Computes the weights of chosen experts from all logits and theirs, as `route_top_k` says."""
    check_weighting(score, score_order, normalize)
    # In the logarithm nothing underflows, so that weights sum to 1 even where every score of a token is tiny.
    if score != "softmax":
        log_weight = log_score(chosen, score)
    elif normalize is not False:
        # A softmax over all experts would only subtract what the normalisation adds again, and keep [T, E] for the
        # backward.
        log_weight = chosen
    else:
        over = logits if score_order == "before_top_k" else chosen
        log_weight = chosen - jax.nn.logsumexp(over, axis=1, keepdims=True)
    if normalize is False:
        weight = jnp.exp(log_weight)
    elif normalize == 1:
        weight = _softmax(log_weight)
    else:
        weight = jnp.exp(log_weight - _log_norm(log_weight, normalize))
    is_one = isinstance(scale, int | float) and scale == 1  # a traced scale is not compared
    return weight if is_one else scale * weight


def log_score(logits: Float[Array, "T N"], score: Score) -> Float[Array, "T N"]:
    """Computes the logarithm of the scores, for a softmax over the last axis."""
    _check_score(score)
    match score:
        case "softmax":
            return jax.nn.log_softmax(logits)
        case "sigmoid":
            return jax.nn.log_sigmoid(logits)
        case "sqrt_softplus":
            # softplus(z) = exp(z) to the last bit long before it underflows.
            is_small = logits < -40
            log_softplus = jnp.log(jax.nn.softplus(jnp.where(is_small, 0, logits)))
            return jnp.where(is_small, logits, log_softplus) / 2


def _check_score(score: Score) -> None:
    if score not in get_args(Score):
        *names, last = map(repr, get_args(Score))
        raise ValueError(f"score is {score!r}; it must be {', '.join(names)} or {last}.")


def _log_norm(log_weight: Float[Array, "T K"], p: float) -> Float[Array, "T 1"]:
    """Computes the logarithm of the p-norm of each token's weights."""
    if p == math.inf:
        return log_weight.max(axis=1, keepdims=True)
    return jax.nn.logsumexp(p * log_weight, axis=1, keepdims=True) / p


@jax.custom_jvp
def _softmax(x: Float[Array, "T K"]) -> Float[Array, "T K"]:
    return jax.nn.softmax(x, axis=1)


@_softmax.defjvp
def _softmax_derivative(primals, tangents):
    # By its own result, which is kept in any case, and by nothing else.
    ((x,), (dx,)) = primals, tangents
    weight = _softmax(x)
    return weight, weight * (dx - jnp.sum(weight * dx, axis=1, keepdims=True))


def is_present(expert_index: Integer[Array, "..."], num_experts: int) -> Bool[Array, "..."]:
    """Says which assignments are present: those with an expert index in [0, E)."""
    expert_index = _wide(expert_index)
    return (expert_index >= 0) & (expert_index < num_experts)


def _wide(index: Integer[Array, "..."]) -> Integer[Array, "..."]:
    """Gives indices a dtype that has room for any number of experts or tokens, and for -1."""
    return index.astype(jnp.promote_types(index.dtype, jnp.int32))


def widened[R: Routing | Assignments](routing: R) -> R:
    """Gives the indices of a routing a dtype that has room for any number of experts and tokens, and for -1."""
    if isinstance(routing, Assignments):
        routing = dataclasses.replace(routing, token_index=_wide(routing.token_index))
    return dataclasses.replace(routing, expert_index=_wide(routing.expert_index))


def checked_present(expert_index: Integer[Array, "..."], num_experts: int) -> Bool[Array, "..."]:
    """Says which assignments are present; the debug checks report indices of the others that are not -1."""
    expert_index = _wide(expert_index)
    present = is_present(expert_index, num_experts)
    check(
        present | (expert_index == ABSENT),
        "expert_index lies between {low} and {high}; it must be in [0, E), or -1 where absent",
        low=expert_index.min(initial=0),
        high=expert_index.max(initial=0),
    )
    return present


def in_range(routing: Assignments, num_tokens: int, num_experts: int) -> Assignments:
    """Makes the assignments of token indices outside [0, T) absent; the debug checks say where there are any."""
    routing = widened(routing)
    is_token = (routing.token_index >= 0) & (routing.token_index < num_tokens)
    ok = is_token | ~is_present(routing.expert_index, num_experts)
    check(ok, "token_index of a present assignment is outside [0, T)")
    return routing.where(is_token)


def count_assignments(expert_index: Integer[Array, "..."], num_experts: int) -> Int32[Array, " E"]:
    """Counts the assignments of each expert."""
    expert_index = _wide(expert_index)
    experts = jnp.arange(num_experts, dtype=expert_index.dtype)
    return jnp.sum(expert_index.reshape(-1, 1) == experts, axis=0, dtype=jnp.int32)
