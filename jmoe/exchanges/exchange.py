"""What all exchanges are: a forward and a backward of a shard's tokens through the experts of all shards."""

import abc
import dataclasses
import functools
import math
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Float

from jmoe.exchanges.replicas import Replication
from jmoe.grouped_mlp import ExpertParameters
from jmoe.local_mlp import MLPOptions
from jmoe.routing import Assignments, Routing

_MULTIPLE = 8  # of rows in a buffer


@dataclasses.dataclass(frozen=True)
class Exchange(abc.ABC):
    """Computes `moe_mlp` inside `jax.shard_map`, where each shard has some of the tokens and some of the experts.

    Shard i of n, in the order of `axis_names`, has the experts `[i * E/n, (i + 1) * E/n)`, and routes its tokens to
    any. Buffers have room for `slack` times what random routing needs; what exceeds it goes through them in more
    rounds, so that nothing is dropped and no memory depends on the routing.

    It is called with x [T, D], the routing of these tokens and the parameters of this shard's experts, and gives
    [T, D]. Differentiable once, in reverse mode, in x, the parameters and the routing weights.

    Attributes:
        axis_names: the mesh axes that both tokens and experts are sharded over; () for one shard.
        options: the MLPs.
        num_experts: how many experts the routing chooses from. More than those of the n shards where the routing's
            other assignments are absent: they belong to experts on further mesh axes.
        slack: the room in buffers, as a multiple of what random routing needs on average.
        replication: of the experts that several shards compute, if there are any. Each shard's replicas then count as
            further experts, after its own, in `num_experts` too; their parameters are not passed, and the routing is
            that of `jmoe.placement.placed_routing`.
    """

    axis_names: tuple[str, ...]
    options: MLPOptions
    num_experts: int
    slack: float = 1.125
    replication: Replication | None = None

    def __call__(
        self, x: Float[Array, "T D"], routing: Routing | Assignments, parameters: ExpertParameters
    ) -> Float[Array, "T D"]:
        """Applies the experts of all shards to this shard's tokens."""
        without_weight = dataclasses.replace(routing, weight=None)
        return _apply(self, x, parameters, routing.weight, without_weight)

    @abc.abstractmethod
    def forward(
        self, x: Float[Array, "T D"], routing: Routing | Assignments, parameters: ExpertParameters
    ) -> tuple[Float[Array, "T D"], Any]:
        """Returns the outputs and what is kept for the backward besides the arguments."""

    @abc.abstractmethod
    def backward(
        self,
        x: Float[Array, "T D"],
        routing: Routing | Assignments,
        parameters: ExpertParameters,
        kept: Any,
        dy: Float[Array, "T D"],
    ) -> tuple[Float[Array, "T D"], ExpertParameters, Float[Array, "..."]]:
        """Returns the gradients of x, of this shard's parameters and of the routing weights."""

    @property
    def num_shards(self) -> int:
        """The shards n that tokens are exchanged between."""
        return math.prod(lax.axis_size(axis) for axis in self.axis_names)

    def room(self, mean: float | int, most: int) -> int:
        """How many rows a buffer has that random routing fills with `mean` rows on average."""
        return min(most, _MULTIPLE * math.ceil(self.slack * mean / _MULTIPLE))

    def room_for_rows(self, num_assignments: int, num_local: int) -> int:
        """How many of so many assignments, to experts anywhere, have room in one window of the local experts."""
        return self.room(num_assignments * num_local / self.num_experts, num_assignments)

    def local_part[R: Routing | Assignments](self, routing: R, num_local: int) -> R:
        """Numbers this shard's experts from 0 and makes assignments to those of other shards absent."""
        first = lax.axis_index(self.axis_names) * num_local if self.axis_names else 0
        local_index = routing.expert_index - first
        is_local = (local_index >= 0) & (local_index < num_local)
        return dataclasses.replace(routing, expert_index=local_index).where(is_local)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(exchange, x, parameters, weight, without_weight):
    y, _ = _forward_jit(exchange, x, dataclasses.replace(without_weight, weight=weight), parameters)
    return y


def _forward(exchange, x, parameters, weight, without_weight):
    y, kept = _forward_jit(exchange, x, dataclasses.replace(without_weight, weight=weight), parameters)
    return y, (x, parameters, weight, without_weight, kept)


def _backward(exchange, residuals, dy):
    x, parameters, weight, without_weight, kept = residuals
    # Without the barrier XLA would send x once for forward and backward, and keep what arrives in between.
    x, dy = lax.optimization_barrier((x, dy))
    routing = dataclasses.replace(without_weight, weight=weight)
    return *_backward_jit(exchange, x, routing, parameters, kept, dy), None


_apply.defvjp(_forward, _backward)


# Compiled functions of their own, as in `moe_mlp`, so that layers of the same shapes are traced and lowered once.
@functools.partial(jax.jit, static_argnums=0)
def _forward_jit(exchange, x, routing, parameters):
    if (replication := exchange.replication) is not None:
        parameters = replication.with_replicas(parameters, replication.device(), x.dtype)
    return exchange.forward(x, routing, parameters)


@functools.partial(jax.jit, static_argnums=0)
def _backward_jit(exchange, x, routing, parameters, kept, dy):
    if (replication := exchange.replication) is None:
        return exchange.backward(x, routing, parameters, kept, dy)
    # Brought again, as x is; the barrier is for the same reason.
    device, dy = lax.optimization_barrier((replication.device(), dy))
    parameters = replication.with_replicas(parameters, device, x.dtype)
    dx, dparameters, dweight = exchange.backward(x, routing, parameters, kept, dy)
    return dx, replication.summed(dparameters, device), dweight
