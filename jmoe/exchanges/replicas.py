"""Experts that several devices compute: their parameters on the way there, and the gradients on the way back."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32

from jmoe.grouped_mlp import ExpertParameters
from jmoe.placement import ExpertPlacement


class Transfer(NamedTuple):
    """An expert's parameters on their way from one device to another.

    Attributes:
        source: the device that has them.
        target: the device that gets them.
        local: their place among the experts and replicas of the source.
        replica: their place among the replicas of the target.
    """

    source: int
    target: int
    local: int
    replica: int


@functools.cache
def transfer_rounds(placement: ExpertPlacement) -> tuple[tuple[Transfer, ...], ...]:
    """Plans the transfers of all replicas, in rounds in which each device sends and receives at most once.

    A device that has got a replica sends it on, so that an expert with c replicas takes about `log2(c + 1)` rounds.
    """
    num_stored = placement.num_stored
    # Of each expert, the devices that have it, and its place there.
    having = {e: {device: i} for device, experts in enumerate(placement.stored) for i, e in enumerate(experts)}
    missing = [
        (device, i, e) for device, replicas in enumerate(placement.replicas) for i, (e, _) in enumerate(replicas)
    ]
    rounds = []
    while missing:
        transfers: dict[int, Transfer] = {}  # of each target
        sources = set()
        for target, replica, expert in missing:
            source = next((device for device in having[expert] if device not in sources), None)
            if source is not None and target not in transfers:
                sources.add(source)
                transfers[target] = Transfer(source, target, having[expert][source], replica)
        for target, transfer in transfers.items():
            expert = placement.replicas[target][transfer.replica].expert
            having[expert][target] = num_stored + transfer.replica
        missing = [(t, i, e) for t, i, e in missing if t not in transfers or transfers[t].replica != i]
        rounds.append(tuple(transfers.values()))
    return tuple(rounds)


@dataclasses.dataclass(frozen=True)
class Replication:
    """Brings the parameters of replicas to their devices, and their gradients back, inside `jax.shard_map`.

    Attributes:
        axis_names: the mesh axes that experts are sharded over, in that order.
        placement: where they are.
    """

    axis_names: tuple[str, ...]
    placement: ExpertPlacement

    def device(self) -> Int32[Array, ""]:
        """Returns the number of this device."""
        return lax.axis_index(self.axis_names)

    def with_replicas(
        self, parameters: ExpertParameters, device: Int32[Array, ""], dtype: jax.typing.DTypeLike
    ) -> ExpertParameters:
        """Appends the parameters of this device's replicas to those of its experts.

        Args:
            parameters: of the E/n experts stored here.
            device: the number of this device.
            dtype: that of the computation; where it is narrower than theirs, matrices are cast to it and sent in it.

        Returns:
            Parameters of `E/n + num_replicas` experts, in their own dtype; zeros where this device has fewer replicas
            than others.
        """

        def append(own):
            is_cast = own.ndim == 3 and jnp.dtype(dtype).itemsize < own.dtype.itemsize
            # Nothing but zero, which XLA does not know: it would find the same copy in forward and backward, and keep
            # it in between.
            zero = jnp.minimum(device, 0).astype(own.dtype)
            all_ = jnp.concatenate([own, jnp.broadcast_to(zero, (self.placement.num_replicas, *own.shape[1:]))])
            for transfers in transfer_rounds(self.placement):
                source, target = self._places(transfers, device)
                sent = lax.dynamic_index_in_dim(all_, source, keepdims=False)
                sent = sent.astype(dtype) if is_cast else sent
                all_ = _add_at(all_, target, self._sent(sent, [(t.source, t.target) for t in transfers]))
            return all_

        return jax.tree.map(append, parameters)

    def summed(self, gradients: ExpertParameters, device: Int32[Array, ""]) -> ExpertParameters:
        """Sends the gradients of replicas back the same way, and adds them to those of the experts.

        Args:
            gradients: of what `with_replicas` returns.
            device: the number of this device.

        Returns:
            The gradients of the E/n experts stored here.
        """

        def add(all_):
            for transfers in reversed(transfer_rounds(self.placement)):
                source, target = self._places(transfers, device)
                sent = lax.dynamic_index_in_dim(all_, target, keepdims=False)
                all_ = _add_at(all_, source, self._sent(sent, [(t.target, t.source) for t in transfers]))
            return all_[: len(all_) - self.placement.num_replicas]

        return jax.tree.map(add, gradients)

    def _places(self, transfers, device):
        """Returns what of this device's experts and replicas is sent, and what received; anything, if nothing is."""
        num_stored = self.placement.num_stored
        source, target = np.zeros((2, self.placement.num_devices), np.int32)
        for transfer in transfers:
            source[transfer.source], target[transfer.target] = transfer.local, num_stored + transfer.replica
        return jnp.asarray(source)[device], jnp.asarray(target)[device]

    def _sent(self, array, pairs):
        """Sends an array from the first device of each pair to the second; others receive zeros."""
        sizes = [lax.axis_size(axis) for axis in self.axis_names]
        # JAX wants devices numbered in the mesh's order of axes.
        in_order = sorted(self.axis_names, key=jax.sharding.get_abstract_mesh().axis_names.index)
        number = np.arange(math.prod(sizes)).reshape([lax.axis_size(axis) for axis in in_order])
        number = number.transpose([in_order.index(axis) for axis in self.axis_names]).ravel().tolist()
        return lax.ppermute(array, tuple(in_order), [(number[a], number[b]) for a, b in pairs])


def _add_at(array, index, row):
    row = lax.dynamic_index_in_dim(array, index, keepdims=False) + row.astype(array.dtype)
    return lax.dynamic_update_index_in_dim(array, row, index, axis=0)
