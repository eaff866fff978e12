"""How well the model predicts held-out text."""

import contextlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import grain
import jax
from flax import nnx
from jaxtyping import Array, Float, Int32

from jmoe.models import Transformer, language_model_loss
from train.step import DeviceBatch, Params

EvalStep = Callable[[Params, DeviceBatch], tuple[Float[Array, ""], Int32[Array, ""]]]


@dataclass(frozen=True)
class Evaluation:
    """What some text cost the model.

    Attributes:
        nats: Summed cross-entropy of the targets.
        num_targets: How many there were, ends of documents among them.
    """

    nats: float
    num_targets: int

    @property
    def loss(self) -> float:
        """Nats per target."""
        return self.nats / self.num_targets

    def bits_per_byte(self, num_bytes: int | float) -> float:
        """Bits per byte of a text of `num_bytes` bytes whose tokens were the targets.

        Example:
            >>> Evaluation(nats=8 * math.log(2), num_targets=2).bits_per_byte(4)
            2.0
        """
        return self.nats / math.log(2) / num_bytes


def make_eval_step(graph: nnx.GraphDef[Transformer]) -> EvalStep:
    """Compiles the cost of one batch.

    Args:
        graph: The model without its parameters.

    Returns:
        A function of parameters and a batch, that returns the summed cross-entropy in nats and the number of
        targets.
    """

    def step(params: Params, batch: DeviceBatch) -> tuple[Array, Array]:
        _, aux = language_model_loss(nnx.merge(graph, params), **batch)
        return aux.cross_entropy * aux.num_targets, aux.num_targets

    return jax.jit(step)


def evaluate(
    eval_step: EvalStep, params: Params, loader: grain.IterDataset[DeviceBatch], num_batches: int | None = None
) -> Evaluation:
    """Sums the cost of the batches of `loader`, in float64 on the host.

    Args:
        eval_step: From `make_eval_step`.
        params: Parameters of the model.
        loader: Batches on the device.
        num_batches: How many of them, from the first; all if None.
    """
    with contextlib.closing(iter(loader)) as batches:
        costs = [eval_step(params, batch) for batch in itertools.islice(batches, num_batches)]
    nats, targets = zip(*jax.device_get(costs), strict=True)
    return Evaluation(math.fsum(map(float, nats)), sum(map(int, targets)))
