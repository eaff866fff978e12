"""The optimizer of a run: a learning-rate schedule and a chain of Optax transformations."""

import math

import jax
import optax
from jaxtyping import Array, Float, PyTree
from optax.contrib import MuonDimensionNumbers, muon

from train.config import OptimizerConfig

# Vectors in all but shape: with the layers (and experts) stacked in leading axes, only the name tells them
# from matrices.
_VECTOR_NAMES = frozenset({"scale", "bias", "b_up", "b_down"})


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate at each step: a linear warm-up to the peak, then the decay that `config` names.

    Cosine and linear decay reach `final_learning_rate` times the peak at the last step; `wsd` (warm-up,
    stable, decay: Hu et al. 2024, arXiv 2404.06395) holds the peak and decays linearly over the last
    `decay_fraction` of the steps.

    Args:
        config: The peak, the warm-up and the shape of the decay.
        num_steps: Steps of the whole run, the warm-up among them.

    Returns:
        An Optax schedule: step (an int or an int32 scalar) to learning rate.

    Raises:
        ValueError: If the warm-up is not shorter than the run.

    Example:
        >>> config = OptimizerConfig(schedule="linear", warmup_steps=2, learning_rate=0.1)
        >>> schedule = make_schedule(config, 12)
        >>> [round(float(schedule(step)), 3) for step in (0, 1, 2, 7, 12)]
        [0.0, 0.05, 0.1, 0.055, 0.01]
    """
    if config.warmup_steps >= num_steps:
        raise ValueError(
            f"optimizer.warmup_steps must be less than steps = {num_steps}, got {config.warmup_steps}: "
            "warm up for less or train for longer"
        )
    peak, final = config.learning_rate, config.learning_rate * config.final_learning_rate
    decay_steps = num_steps - config.warmup_steps
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    match config.schedule:
        case "cosine":
            decay = optax.cosine_decay_schedule(peak, decay_steps, alpha=config.final_learning_rate)
        case "linear":
            decay = optax.linear_schedule(peak, final, decay_steps)
        case "constant":
            decay = optax.constant_schedule(peak)
        case "wsd":
            last_steps = math.ceil(config.decay_fraction * decay_steps)
            decay = optax.linear_schedule(peak, final, last_steps, transition_begin=decay_steps - last_steps)
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Clips by the global norm, then applies the update rule that `config` names on its schedule.

    Weight decay is decoupled (Loshchilov and Hutter 2019, arXiv 1711.05101) and spares norm scales and
    biases.

    Args:
        config: The update rule and its settings.
        num_steps: Steps of the whole run, for the schedule.

    Returns:
        An Optax gradient transformation.

    Raises:
        ValueError: If the warm-up is not shorter than the run.
    """
    schedule = make_schedule(config, num_steps)
    match config.name:
        case "adamw":
            rule = optax.adamw(
                schedule,
                config.beta1,
                config.beta2,
                config.epsilon,
                weight_decay=config.weight_decay,
                mask=decayed_parameters,
            )
        case "lion":
            rule = optax.lion(
                schedule,
                config.beta1,
                config.beta2,
                weight_decay=config.weight_decay,
                mask=decayed_parameters,
            )
        case "muon":
            rule = muon(
                schedule,
                beta=config.beta1,
                weight_decay=config.weight_decay,
                adam_b1=config.beta1,
                adam_b2=config.beta2,
                adam_weight_decay=0.0,
                eps=config.epsilon,
                consistent_rms=0.2,  # updates as large as AdamW's, so that one learning rate suits both
                muon_weight_dimension_numbers=_matrix_axes,
            )
        case "sgd":
            rule = optax.chain(
                optax.trace(config.beta1),
                optax.add_decayed_weights(config.weight_decay, decayed_parameters),
                optax.scale_by_learning_rate(schedule),
            )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)


def decayed_parameters(params: PyTree[Float[Array, "..."]]) -> PyTree[bool]:
    """True for each parameter that weight decay applies to: all but norm scales and biases.

    Args:
        params: Parameters as nested dicts; the last key names the kind of a parameter.

    Returns:
        A tree of the same structure.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in _VECTOR_NAMES, params)


def _matrix_axes(params: PyTree) -> PyTree:
    """For Muon: the last two axes of each matrix, with those before them (layers, experts) as a batch.

    Embeddings and vectors take Adam (None), as in https://kellerjordan.github.io/posts/muon.
    """

    def axes(path, leaf) -> MuonDimensionNumbers | None:
        if path[-1].key in _VECTOR_NAMES | {"embedding"} or leaf.ndim < 2:
            return None
        return MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    return jax.tree_util.tree_map_with_path(axes, params)
