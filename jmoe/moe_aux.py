"""What a layer tells about its routing: losses and statistics, over the tokens of all shards."""

import dataclasses
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jmoe.expert_parallel import ShardAxes
from jmoe.losses import expert_load, load_balancing_loss, router_z_loss, sequence_balancing_loss, token_mean
from jmoe.routers.router import Router
from jmoe.routing import Assignments, Routing, checked_logits, is_present, log_score


@no_type_check  # JAX also builds pytrees of other shapes and of things that are no arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEAux:
    """What an MoE layer tells about its routing, over all tokens that the mask leaves.

    Attributes:
        load_balancing_loss: f32[], 1 at perfect balance (`jmoe.load_balancing_loss`, or
            `jmoe.sequence_balancing_loss`).
        router_z_loss: f32[] (`jmoe.router_z_loss`).
        expert_load: f32[E], each expert's share of the assignments; sums to 1. Where there are experts without
            parameters, they follow the others. What a capacity drops counts here and in the losses.
        mean_score: f32[E], the mean over the tokens of each expert's score, which the load-balancing loss is made of;
            for `jmoe.pooled_balancing_loss`.
        experts_per_token: f32[], how many experts a token has on average: K, where the router does not vary it.
        dropped_fraction: f32[], the share of the assignments to experts with parameters that was over their capacity;
            0 in a dropless layer.
        router: what the router tells of itself (`jmoe.routers.Router.statistics`), by name; nothing as a rule.
    """

    load_balancing_loss: Float[Array, ""]
    router_z_loss: Float[Array, ""]
    expert_load: Float[Array, " E"]
    mean_score: Float[Array, " E"]
    experts_per_token: Float[Array, ""]
    dropped_fraction: Float[Array, ""]
    router: dict[str, Float[Array, "..."]] = dataclasses.field(default_factory=dict)


def moe_aux(
    router: Router,
    routing: Routing | Assignments,
    logits: Float[Array, "T E"] | None,
    num_tokens: int,
    num_logits: int,
    axes: ShardAxes,
    *,
    mask: Bool[Array, " T"] | None,
    num_sequences: int | None,
) -> MoEAux:
    """Computes the losses and statistics of one shard's tokens, together with those of the others.

    Args:
        router: what has routed.
        routing: what the router gave, masked.
        logits: the same; without any, the losses are 0.
        num_tokens: T.
        num_logits: how many experts there are, those without parameters among them.
        axes: the mesh axes that the tokens are sharded over.
        mask: bool[T], false for tokens that enter no statistic.
        num_sequences: where each is to be balanced by itself, the sequences that the T tokens belong to.

    Raises:
        ValueError: the router gives another number of logits, or such that are not floating-point.
    """
    over_tokens: dict[str, Any] = {"mask": mask, "axis_name": axes.tokens}
    load = expert_load(routing, num_logits, axis_name=axes.tokens)
    num_present = is_present(routing.expert_index, num_logits).sum()
    unmasked = jnp.asarray(num_tokens) if mask is None else mask.sum()
    num_present, unmasked = lax.psum((num_present, unmasked), axes.tokens)
    experts_per_token = num_present / jnp.maximum(unmasked, 1).astype(jnp.float32)
    zero = jnp.zeros((), jnp.float32)
    if logits is None:
        return MoEAux(zero, zero, load, jnp.zeros_like(load), experts_per_token, zero)
    if logits.ndim != 2 or logits.shape[1] != num_logits:
        raise ValueError(
            f"the router gives logits {list(logits.shape)}; they must be [T, {num_logits}]: as many as num_experts, "
            "num_identity_experts and num_zero_experts together."
        )
    logits = checked_logits(logits)
    # The loss needs scores that sum to 1 (for sigmoids: DeepSeek-V3, arXiv 2412.19437, equation 19).
    score = router.score
    scores = jax.nn.softmax(logits if score == "softmax" else log_score(logits, score))
    if num_sequences is None:
        balancing_loss = load_balancing_loss(scores, routing, **over_tokens)
    else:
        whole = tuple(axis for axis in axes.tokens if axis not in axes.sequence)
        split = {"axis_name": whole, "sequence_axis_name": axes.sequence}
        balancing_loss = sequence_balancing_loss(scores, routing, num_sequences, mask=mask, **split)
    return MoEAux(
        load_balancing_loss=balancing_loss,
        router_z_loss=router_z_loss(logits, **over_tokens),
        expert_load=load,
        mean_score=token_mean(scores, **over_tokens),
        experts_per_token=experts_per_token,
        dropped_fraction=zero,
        router=router.statistics(logits, **over_tokens),
    )
