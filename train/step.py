"""The training state and the one compiled step that advances it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int32, PyTree, Shaped

from jmoe import MoE
from jmoe.models import Transformer, TransformerConfig, language_model_loss

Params = PyTree[Float[Array, "..."]]
DeviceBatch = dict[str, Shaped[Array, "B S"]]
"""A `train.data.Batch` on the device."""
Metrics = dict[str, Float[Array, "..."]]


class TrainState(NamedTuple):
    """All that a step reads and changes. A step draws no random numbers, so there is no key among it.

    Attributes:
        step: Updates done so far.
        params: All variables of the model, as nested dicts of arrays: master weights in its `param_dtype`, and the
            selection biases of its routers if they have any.
        opt_state: State of the Optax transformation, which knows of the weights only.
    """

    step: Int32[Array, ""]
    params: Params
    opt_state: optax.OptState


def init_params(config: TransformerConfig, seed: int) -> Params:
    """Draws the parameters of a model; selection biases are 0."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(seed))))


def init_state(config: TransformerConfig, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Draws the parameters and makes the optimizer's state for step 0.

    Args:
        config: The transformer.
        optimizer: Whose state is made.
        seed: Seed of the parameters.
    """
    params = init_params(config, seed)
    weights, _ = _weights_and_biases(graph_of(config), params)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(weights))


def graph_of(config: TransformerConfig) -> nnx.GraphDef[Transformer]:
    """The model without its parameters: `nnx.merge` puts the two together."""
    return nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))


def _weights_and_biases(graph: nnx.GraphDef[Transformer], params: Params) -> tuple[Params, Params]:
    """Tells what the optimizer updates from what it must not touch."""
    _, weights, biases = nnx.split(nnx.merge(graph, params), nnx.Param, ...)
    return nnx.to_pure_dict(weights), nnx.to_pure_dict(biases)


def _with_cast_experts(graph: nnx.GraphDef[Transformer], weights: Params, biases: Params) -> Params:
    """Casts the experts' matrices, nearly all there is, to the dtype that they are multiplied in.

    Once, where the layers would do it in the forward and again in the backward, each time reading master weights. Their
    gradients are then of that dtype too, also where devices add them, as those of all matrices but the router's are.
    """
    model = nnx.merge(graph, weights, biases)
    for _, module in nnx.iter_graph(model):
        if isinstance(module, MoE):
            for matrices in (module.w_up, module.w_down):
                matrices.set_value(matrices[...].astype(module.dtype))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def _with_updated_biases(
    graph: nnx.GraphDef[Transformer], weights: Params, biases: Params, expert_load: Float[Array, "L E"]
) -> Params:
    """Puts weights and biases together again, and moves the biases, if there are any, by the load of the step."""
    model = nnx.merge(graph, weights, biases)
    if biases:
        model.update_biases(expert_load)
    return nnx.to_pure_dict(nnx.state(model))


def make_train_step(
    graph: nnx.GraphDef[Transformer],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    accumulation_steps: int = 1,
    shardings: "TrainState | None" = None,
) -> jax.stages.Wrapped:
    """One update of the parameters from one batch, under `jax.jit`.

    The objective is the cross-entropy per target plus the weighted router losses, as `language_model_loss`
    gives it. The batch is cut into `accumulation_steps` parts along B; each part's loss weighs by its share
    of the targets, so the sum of their gradients is that of the whole batch whatever is padded. Loads and the
    dropped fraction are those of all assignments. A scan inside the step, rather than `optax.MultiSteps`, keeps
    a step one update: the accumulator is no part of the state, every checkpoint falls between two updates, and
    the weights by targets are known before the first part. Selection biases move last, by the load of the whole
    batch.

    Args:
        graph: The model without its parameters.
        optimizer: What turns gradients into updates.
        schedule: The optimizer's learning rate, to report.
        accumulation_steps: Parts of a batch.
        shardings: How the new state shall lie on a mesh, for each of its arrays; None leaves it to the compiler. The
            metrics lie as the number of steps does.

    Returns:
        A function of the state (whose buffers it takes over) and a batch, that returns the new state and
        metrics: `loss` (the objective), `cross_entropy` (nats per target), `load_balancing_loss`,
        `router_z_loss`, `expert_load` [L, E], `dropped_fraction`, `gradient_norm` (before clipping) and
        `learning_rate`.
    """

    def objective(weights: Params, biases: Params, part: DeviceBatch, num_targets: Array) -> tuple[Array, Metrics]:
        loss, aux = language_model_loss(nnx.merge(graph, weights, biases), **part)
        metrics = {
            "loss": loss,
            "cross_entropy": aux.cross_entropy,
            "load_balancing_loss": aux.load_balancing_loss,
            "router_z_loss": aux.router_z_loss,
        }
        metrics = jax.tree.map(lambda value: value * (aux.num_targets / jnp.maximum(num_targets, 1)), metrics)
        # Parts may have other shares of the assignments than of the targets.
        metrics["expert_load"] = jnp.round(aux.expert_load * aux.num_assignments[:, None])
        metrics["dropped_fraction"] = jnp.round(aux.dropped_fraction * aux.num_assignments.sum())
        return metrics["loss"], metrics

    def step(state: TrainState, batch: DeviceBatch) -> tuple[TrainState, Metrics]:
        num_targets = batch["mask"].sum()
        # Every n-th sequence to a part: then each device has its share of every part already.
        parts = jax.tree.map(lambda a: a.reshape(-1, accumulation_steps, *a.shape[1:]).swapaxes(0, 1), batch)
        weights, biases = _weights_and_biases(graph, state.params)
        operands = _with_cast_experts(graph, weights, biases)

        def differentiate(part):
            gradients, metrics = jax.grad(objective, has_aux=True)(operands, biases, part, num_targets)
            # What XLA knows to be a kernel's result it would read twice: for its norm, and for the update.
            gradients = jax.tree.map(lambda g: jax.lax.optimization_barrier(g) if g.ndim > 2 else g, gradients)
            return jax.tree.map(lambda g, weight: g.astype(weight.dtype), gradients, weights), metrics

        def add_part(sums, part):
            return jax.tree.map(jnp.add, sums, differentiate(part)), None

        shapes = jax.eval_shape(differentiate, jax.tree.map(lambda a: a[0], parts))
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        (gradients, metrics), _ = jax.lax.scan(add_part, zeros, parts)
        counts = metrics["expert_load"]  # [L, E]
        metrics["expert_load"] = counts / jnp.maximum(counts.sum(axis=1, keepdims=True), 1)
        metrics["dropped_fraction"] /= jnp.maximum(counts.sum(), 1)

        updates, opt_state = optimizer.update(gradients, state.opt_state, weights)
        weights = optax.apply_updates(weights, updates)
        params = _with_updated_biases(graph, weights, biases, metrics["expert_load"])
        metrics |= {"gradient_norm": optax.tree.norm(gradients), "learning_rate": schedule(state.step)}
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=shardings and (shardings, shardings.step))
