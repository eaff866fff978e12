"""Which device each expert is on, and which assignments it gets there."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jmoe.routing import ABSENT, Assignments, Routing, checked_present

_GOLDEN_RATIO = 0x9E3779B9  # its fraction, of 2^32


class Replica(NamedTuple):
    """A copy of an expert on a device that does not store it.

    Attributes:
        expert: which one.
        share: how much of the expert's load the copy takes, more than 0 and at most 1.
    """

    expert: int
    share: float


@dataclasses.dataclass(frozen=True)
class ExpertPlacement:
    """Where E experts are on n devices.

    A static value: it can be hashed and compared, and a program is compiled for it.

    Attributes:
        stored: for each device the E/n experts that it stores, and trains, in the order of their parameters.
        replicas: for each device the experts that it computes besides, from copies of their parameters; () for none
            anywhere. What the replicas of an expert leave of its load is for the device that stores it.

    Raises:
        ValueError: devices store different numbers of experts, an expert is stored by none or by two, or a replica is
            of no expert, on a device that has the expert already, or leaves less than nothing of its load.

    Example:
        >>> import jmoe
        >>> placement = jmoe.ExpertPlacement(stored=((0, 2), (3, 1)))
        >>> placement.order, placement.device_load([4, 1, 1, 2]).tolist()
        ((0, 2, 3, 1), [0.625, 0.375])
    """

    stored: tuple[tuple[int, ...], ...]
    replicas: tuple[tuple[Replica, ...], ...] = ()

    def __post_init__(self):
        """Checks the values, and makes equal placements the same value."""
        stored = tuple(tuple(int(expert) for expert in of_device) for of_device in self.stored)
        replicas = self.replicas or ((),) * len(stored)
        replicas = tuple(tuple(Replica(int(e), float(share)) for e, share in of_device) for of_device in replicas)
        if len({len(of_device) for of_device in stored}) != 1 or not stored[0]:
            counts = [len(of_device) for of_device in stored]
            raise ValueError(f"stored has {counts} experts; every device must store the same number, at least 1.")
        if sorted(sum(stored, ())) != list(range(sum(map(len, stored)))):
            raise ValueError(f"stored is {stored}; each of the experts 0, 1, ... must be there once.")
        object.__setattr__(self, "stored", stored)
        object.__setattr__(self, "replicas", replicas)
        self._check_replicas()

    def _check_replicas(self) -> None:
        if len(self.replicas) != self.num_devices:
            raise ValueError(
                f"replicas are of {len(self.replicas)} devices and stored is of {self.num_devices}; they must agree."
            )
        for device, (stored, replicas) in enumerate(zip(self.stored, self.replicas, strict=True)):
            experts = [replica.expert for replica in replicas]
            if len({*stored, *experts}) != len(stored) + len(experts):
                raise ValueError(f"device {device} has replicas of {experts}, some twice or beside the expert itself.")
            if not all(0 <= expert < self.num_experts for expert in experts):
                raise ValueError(f"device {device} has replicas of {experts}; experts are 0 to {self.num_experts - 1}.")
        shares = np.array([replica.share for replicas in self.replicas for replica in replicas])
        if not (shares > 0).all() or not (self.shares() >= -1e-6).all():
            raise ValueError("the shares of an expert's replicas must be more than 0 and no more than 1 together.")

    @property
    def num_devices(self) -> int:
        """The devices n."""
        return len(self.stored)

    @property
    def num_experts(self) -> int:
        """The experts E."""
        return len(self.stored) * len(self.stored[0])

    @property
    def num_stored(self) -> int:
        """The E/n experts that each device stores."""
        return len(self.stored[0])

    @property
    def num_replicas(self) -> int:
        """How many replicas the device with most has; every device has room for as many."""
        return max(map(len, self.replicas))

    @property
    def without_replicas(self) -> "ExpertPlacement":
        """The same order of the experts, with each computed by the device that stores it."""
        return ExpertPlacement(self.stored)

    @property
    def order(self) -> tuple[int, ...]:
        """The E experts in the order of the devices and of the parameters there."""
        return sum(self.stored, ())

    def device_load(self, expert_load: ArrayLike) -> np.ndarray:
        """Computes each device's share of the assignments, float64[n], where the experts' loads are as given.

        Args:
            expert_load: [E], as in `plan_placement`.

        Raises:
            ValueError: `expert_load` is not of the E experts, or has a number that is negative or not finite.
        """
        load = load_shares(expert_load)
        if load.size != self.num_experts:
            raise ValueError(
                f"expert_load is of {load.size} experts and the placement of {self.num_experts}; leave out the loads "
                "of experts that have no parameters."
            )
        return self.shares() @ load

    def balance(self, expert_load: ArrayLike) -> float:
        """Computes the mean load of the devices over the largest, from 1/n to 1.

        All devices wait for the fullest, so experts are computed no faster than at this share of the speed that even
        loads have.

        Args:
            expert_load: [E], as in `plan_placement`.

        Raises:
            ValueError: as `device_load`.
        """
        return float(1 / (self.num_devices * self.device_load(expert_load).max()))

    def check_fits(self, num_experts: int, num_devices: int | None = None, *, one_width: bool = True) -> None:
        """Raises a ValueError where a layer's experts are no such experts, or on other devices.

        Args:
            num_experts: those of the layer.
            num_devices: those that the layer's experts are split over, if they are.
            one_width: whether all experts have the same width.
        """
        if not one_width:
            raise ValueError(
                "expert_placement is given and experts have different widths; these are not split over devices: leave "
                "it out."
            )
        if self.num_experts != num_experts:
            raise ValueError(
                f"expert_placement is of {self.num_experts} experts and the layer has {num_experts}; give "
                "jmoe.plan_placement the loads of the experts that have parameters, and leave it out inside a "
                "jax.shard_map of your own, where a layer has those of one device."
            )
        if num_devices is not None and self.num_devices != num_devices:
            raise ValueError(
                f"expert_placement is for {self.num_devices} devices and the mesh splits the experts into "
                f"{num_devices}; make one with jmoe.plan_placement(expert_load, {num_devices}), and put the parameters "
                "into its order with jmoe.reorder_experts."
            )

    def shares(self) -> np.ndarray:
        """Computes the share of each expert's load that each device takes, float64[n, E]."""
        shares = np.zeros((self.num_devices, self.num_experts))
        for device, replicas in enumerate(self.replicas):
            for expert, share in replicas:
                shares[device, expert] = share
        left = 1 - shares.sum(axis=0)
        for device, experts in enumerate(self.stored):
            shares[device, list(experts)] = left[list(experts)]
        return shares


def check_placement(placement: object) -> None:
    """Raises a ValueError where something is neither a placement nor None."""
    if placement is not None and not isinstance(placement, ExpertPlacement):
        raise ValueError(
            f"expert_placement is a {type(placement).__name__}; it must be a jmoe.ExpertPlacement, as "
            "jmoe.plan_placement makes, or None."
        )


def placed_routing[R: Routing | Assignments](routing: R, placement: ExpertPlacement) -> R:
    """Gives each assignment to one of the devices that have its expert, in the shares of the placement.

    Experts are numbered by what computes them: device d has the numbers from `d * S`, `S = E/n + num_replicas`, first
    for its stored experts, then for its replicas. Without replicas that is their place in the order of the placement.

    An assignment goes by the number of its token t among those of the shard: to the device in whose part of [0, 1) the
    fraction of `t * golden ratio` falls. Any run of tokens, or every m-th of it, is so split evenly (Weyl's
    equidistribution theorem), and shards that have the same tokens choose alike. Devices do not prefer
    their own replicas: pairs of devices would have more to exchange than others, and the exchanges more rounds.

    Args:
        routing: with expert indices in [0, E); all others are absent, and stay so.
        placement: of the E experts.
    """
    numbers, ends = _numbers_and_ends(placement)
    present = checked_present(routing.expert_index, placement.num_experts)
    expert = jnp.where(present, routing.expert_index, 0).astype(jnp.int32)
    which = jnp.zeros_like(expert)
    if placement.num_replicas:
        token = jnp.arange(expert.shape[0])[:, None] if isinstance(routing, Routing) else routing.token_index
        point = token.astype(jnp.uint32) * jnp.uint32(_GOLDEN_RATIO)  # of 2^32
        which = jnp.sum(point[..., None] > jnp.asarray(ends)[expert], axis=-1)
    number = jnp.asarray(numbers)[expert, which]
    return dataclasses.replace(routing, expert_index=jnp.where(present, number, ABSENT))


def _numbers_and_ends(placement: ExpertPlacement) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers of each expert, int32[E, C], and where each but the last one's part ends, uint32[E, C - 1].

    Experts that fewer than C devices have get their last number again, with an empty part.
    """
    num_stored = placement.num_stored
    num_local = num_stored + placement.num_replicas
    parts: list[list[tuple[int, float]]] = [[] for _ in range(placement.num_experts)]
    shares = placement.shares()
    for device, experts in enumerate(placement.stored):
        for local, expert in enumerate(experts):
            parts[expert].append((device * num_local + local, shares[device, expert]))
    for device, replicas in enumerate(placement.replicas):
        for local, (expert, share) in enumerate(replicas, num_stored):
            parts[expert].append((device * num_local + local, share))
    most = max(map(len, parts))
    numbers = np.empty((placement.num_experts, most), np.int32)
    ends = np.full((placement.num_experts, most - 1), 2**32 - 1, np.uint32)
    for expert, of_expert in enumerate(parts):
        count = len(of_expert)
        numbers[expert, :count], numbers[expert, count:] = [number for number, _ in of_expert], of_expert[-1][0]
        sums = np.cumsum([share for _, share in of_expert])[:-1]
        ends[expert, : count - 1] = np.clip(sums * 2**32, 0, 2**32 - 1)
    return numbers, ends


def load_shares(expert_load: ArrayLike) -> np.ndarray:
    """Returns loads that sum to 1; equal ones where there is no load at all."""
    load = np.asarray(expert_load, np.float64)
    if load.ndim != 1 or not load.size or not (np.isfinite(load) & (load >= 0)).all():
        raise ValueError(f"expert_load is {load}; it must be [E], of finite numbers that are at least 0.")
    return load / load.sum() if load.sum() else np.full(load.size, 1 / load.size)
