"""Plans of which device each expert is on, from measured load."""

import numpy as np
from numpy.typing import ArrayLike

from jmoe.placement import ExpertPlacement, Replica, load_shares

_TOLERANCE = 0.01  # of the mean load of a device; less is not worth a replica


def plan_placement(expert_load: ArrayLike, num_devices: int, *, replicas: int = 0) -> ExpertPlacement:
    """Plans which device has which experts, so that the fullest device has little more than the others.

    Each device stores E/n experts. From the one with most load to that with least, experts go to the emptiest device
    with room; then an expert of the fullest device is exchanged for one of another for as long as that makes the
    fullest less full. So, without replicas, no device has more load than another by more than the loads of the experts
    differ. More cannot be had where one expert has more than the mean load of a device: that takes replicas.

    With replicas the fullest device gives part of the load of its hottest expert to a device that has less than the
    mean, for as long as any has room for a replica and the fullest is more than 1 % above the mean. A plan has no more
    than it needs, and is never worse than that without.

    Args:
        expert_load: [E], the assignments of each expert, or shares of them, at least 0: `expert_load` of
            `jmoe.MoEAux`, of one step or the mean over many. Loads of experts without parameters, which follow the E,
            are to be cut off.
        num_devices: n, the size of the mesh's expert axis.
        replicas: the most replicas that a device may have. Each costs memory and traffic as one expert's parameters.

    Returns:
        The placement.

    Raises:
        ValueError: a load is no number from 0, n does not divide E, or `replicas` is negative.

    Example:
        >>> import jmoe
        >>> load = [8, 3, 2, 1, 1, 1]
        >>> jmoe.plan_placement(load, 2).stored
        ((0, 4, 5), (1, 2, 3))
        >>> placement = jmoe.plan_placement(load, 2, replicas=1)
        >>> placement.replicas, placement.balance(load)
        (((), (Replica(expert=0, share=0.25),)), 1.0)
    """
    load = load_shares(expert_load)
    if num_devices < 1 or load.size % num_devices:
        raise ValueError(
            f"num_devices is {num_devices} and expert_load has {load.size} experts; it must be at least 1 and divide "
            "them."
        )
    if replicas < 0:
        raise ValueError(f"replicas is {replicas}; it must be 0 (none) or more.")
    device_of = _balanced(load, num_devices)
    shares = _with_replicas(load, device_of, num_devices, replicas)
    return ExpertPlacement(
        tuple(tuple(np.flatnonzero(device_of == device).tolist()) for device in range(num_devices)),
        tuple(
            tuple(Replica(e, float(of_device[e])) for e in np.flatnonzero(of_device).tolist() if device_of[e] != device)
            for device, of_device in enumerate(shares)
        ),
    )


def _balanced(load, num_devices):
    """Returns the device of each expert, as many on each, such that no exchange makes the fullest less full."""
    total, room = np.zeros(num_devices), np.full(num_devices, load.size // num_devices)
    device_of = np.zeros(load.size, int)
    for expert in np.argsort(-load, kind="stable"):
        device_of[expert] = np.where(room > 0, total, np.inf).argmin()
        total[device_of[expert]] += load[expert]
        room[device_of[expert]] -= 1
    while num_devices > 1:
        total = np.bincount(device_of, load, num_devices)
        fullest = total.argmax()
        inside, outside = np.flatnonzero(device_of == fullest), np.flatnonzero(device_of != fullest)
        given = load[inside][:, None] - load[outside]
        fuller = np.maximum(total[fullest] - given, total[device_of[outside]] + given)  # of the two, afterwards
        i, o = np.unravel_index(fuller.argmin(), fuller.shape)
        if fuller[i, o] >= total[fullest] - 1e-12:
            break
        device_of[inside[i]], device_of[outside[o]] = device_of[outside[o]], fullest
    return device_of


def _with_replicas(load, device_of, num_devices, replicas):
    """Returns the share of each expert that each device takes, [n, E], with at most so many replicas on a device."""
    shares = (device_of == np.arange(num_devices)[:, None]).astype(float)
    room = np.full(num_devices, replicas)
    mean = 1 / num_devices
    while True:
        total = shares @ load
        giver = total.argmax()
        excess, lack = total[giver] - mean, np.where(room > 0, mean - total, 0)
        if excess <= _TOLERANCE * mean or lack.max() <= _TOLERANCE * mean:
            return shares
        # The smallest gap that takes all there is to give, or else the largest gap.
        taker = np.where(lack >= excess, -lack, lack - 2).argmax()
        expert = (shares[giver] * load).argmax()
        share = min(excess, lack[taker], shares[giver, expert] * load[expert]) / load[expert]
        shares[giver, expert] -= share
        shares[taker, expert] += share
        room[taker] -= 1
