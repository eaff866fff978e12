"""The language-model objective: cross entropy over the vocabulary and the routers' losses."""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jmoe.losses import pooled_balancing_loss
from jmoe.models.mesh import with_auto_axes
from jmoe.models.transformer import Transformer
from jmoe.models.vocabulary import mean_cross_entropy


@no_type_check  # JAX also builds pytrees of other shapes and of things that are no arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossAux:
    """What the loss is made of, and how the routers behaved.

    Attributes:
        cross_entropy: Mean over the counted targets, in nats.
        num_targets: Number of counted targets.
        load_balancing_loss: Mean over the MoE layers, unless `config.load_balancing` pools them; 1 at perfect
            balance.
        router_z_loss: Mean over the MoE layers.
        expert_load: Share of the assignments that each expert of each MoE layer got.
        num_assignments: Number of the assignments of each MoE layer, which the shares are of.
        dropped_fraction: Share of the assignments of all MoE layers that were dropped.
    """

    cross_entropy: Float[Array, ""]
    num_targets: Int[Array, ""]
    load_balancing_loss: Float[Array, ""]
    router_z_loss: Float[Array, ""]
    expert_load: Float[Array, "L E"]
    num_assignments: Float[Array, " L"]
    dropped_fraction: Float[Array, ""]


def language_model_loss(
    model: Transformer,
    tokens: Int[Array, "B S"],
    targets: Int[Array, "B S"],
    *,
    mask: Bool[Array, "B S"] | None = None,
    positions: Int[Array, "B S"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
) -> tuple[Float[Array, ""], LossAux]:
    """Computes the training objective of a language model.

    `loss = cross_entropy + load_balancing_coef * load_balancing_loss + router_z_coef * router_z_loss`

    The cross entropy is computed in float32, over `config.loss_chunk_size` tokens at a time: the logits of all
    tokens never exist together.

    Args:
        model: The model.
        tokens: Token ids.
        targets: The id each token should predict; any value where it does not count.
        mask: Which targets count; None counts all but those of padding (segment 0).
        positions: Position of each token; see `Transformer`.
        segment_ids: Which document each token belongs to; see `Transformer`.

    Returns:
        The loss, and its parts. Without any counted target the cross entropy is 0.
    """
    run = with_auto_axes(_language_model_loss, PartitionSpec())
    return run(model, tokens, targets, mask, positions, segment_ids)


def _language_model_loss(
    model: Transformer,
    tokens: Int[Array, "B S"],
    targets: Int[Array, "B S"],
    mask: Bool[Array, "B S"] | None,
    positions: Int[Array, "B S"] | None,
    segment_ids: Int[Array, "B S"] | None,
) -> tuple[Float[Array, ""], LossAux]:
    config = model.config
    if mask is None:
        mask = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids != 0  # [B, S]
    hidden, aux = model.hidden(tokens, positions=positions, segment_ids=segment_ids)  # [B, S, D]

    cross_entropy = mean_cross_entropy(hidden, model.output_matrix, targets, mask, config.loss_chunk_size)
    num_moe_layers = max(len(aux.load_balancing_loss), 1)
    if config.load_balancing == "model" and len(aux.load_balancing_loss):
        load_balancing_loss = pooled_balancing_loss(aux.expert_load, aux.mean_score)
    else:
        load_balancing_loss = jnp.sum(aux.load_balancing_loss) / num_moe_layers
    router_z_loss = jnp.sum(aux.router_z_loss) / num_moe_layers

    num_tokens = tokens.size if segment_ids is None else jnp.sum(segment_ids != 0)
    num_assignments = aux.experts_per_token * num_tokens  # [L]
    num_dropped = jnp.sum(aux.dropped_fraction * num_assignments)

    loss = (
        cross_entropy
        + config.load_balancing_coef * load_balancing_loss
        + config.router_z_coef * router_z_loss
    )  # fmt: skip
    return loss, LossAux(
        cross_entropy=cross_entropy,
        num_targets=jnp.sum(mask),
        load_balancing_loss=load_balancing_loss,
        router_z_loss=router_z_loss,
        expert_load=aux.expert_load,
        num_assignments=num_assignments,
        dropped_fraction=num_dropped / jnp.maximum(jnp.sum(num_assignments), 1),
    )
