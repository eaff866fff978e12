"""The parameters of experts in the order of a placement."""

import functools
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import nnx

from jmoe.placement import ExpertPlacement


def reorder_experts[T](tree: T, placement: ExpertPlacement | None, *, previous: ExpertPlacement | None = None) -> T:
    """Puts the parameters of experts, and what is kept for each of them, into the order of a placement.

    Args:
        tree: the state of an NNX module or of its `nnx.Optimizer`, or Linen variables: any pytree whose variables
            carry logical axis names. Those with an axis "expert" are reordered along it, so it should be of those
            layers only that are placed.
        placement: the order to have; None for that of the experts, 0, 1, ....
        previous: the order that they are in.

    Returns:
        The same tree; arrays stay sharded as they are.

    Raises:
        ValueError: no variable has an axis "expert", or one of another size than the placement's; or an optimizer keeps
            something of another shape under a parameter's names, as `optax.adafactor` does.

    Example:
        >>> import jmoe
        >>> from flax import nnx
        >>> moe = jmoe.MoE(16, 32, num_experts=4, top_k=2, rngs=nnx.Rngs(0))
        >>> w_up = moe.w_up[...]
        >>> moe.expert_placement = jmoe.plan_placement([0.4, 0.3, 0.2, 0.1], 2)
        >>> nnx.update(moe, jmoe.reorder_experts(nnx.state(moe), moe.expert_placement))
        >>> moe.expert_placement.order, bool((moe.w_up[1] == w_up[3]).all())
        ((0, 3, 1, 2), True)
    """
    orders = [p.order for p in (placement, previous) if p is not None]
    num_reordered = 0

    def reorder(leaf: Any) -> Any:
        nonlocal num_reordered
        if isinstance(leaf, nnx.Variable):
            names = leaf.get_metadata().get("out_sharding") or ()
        else:
            names = leaf.names if isinstance(leaf, nn.Partitioned) else ()
        if "expert" not in names or not orders:
            return leaf
        num_reordered += 1
        axis = names.index("expert")
        array = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf.value
        if len(names) != array.ndim:
            raise ValueError(
                f"a variable {list(array.shape)} has the axes {names} of its parameter: an optimizer keeps something "
                "of another shape; reorder the parameters only, and start the optimizer anew."
            )
        for order in orders:
            if len(order) != array.shape[axis]:
                raise ValueError(
                    f"a placement has {len(order)} experts and a variable {list(array.shape)} has {array.shape[axis]}; "
                    "they must agree: pass the variables of the placed layers only."
                )
        index = np.arange(array.shape[axis]) if previous is None else np.argsort(previous.order)
        index = index if placement is None else index[list(placement.order)]
        reordered = _take(axis, tuple(index.tolist()), _sharding(array))(array)
        return leaf.replace(reordered) if isinstance(leaf, nnx.Variable) else leaf.replace_boxed(reordered)

    def is_named(leaf: Any) -> bool:
        return isinstance(leaf, nnx.Variable | nn.Partitioned)

    tree = jax.tree.map(reorder, tree, is_leaf=is_named)
    if orders and not num_reordered:
        raise ValueError(
            "tree has no variable with a logical axis 'expert'; it must be the state of a layer or of its "
            "nnx.Optimizer, or Linen variables that are boxed."
        )
    return tree


def _sharding(array):
    """How an array is sharded; None on one device, which it is then not bound to if it was not before."""
    sharding = getattr(array, "sharding", None)
    return sharding if sharding is not None and len(sharding.device_set) > 1 else None


@functools.cache
def _take(axis, index, sharding):
    """Makes a function that takes entries along an axis of arrays that are sharded like this."""
    place = (slice(None),) * axis + (np.array(index),)
    return jax.jit(lambda array: array.at[place].get(out_sharding=jax.typeof(array).sharding), out_shardings=sharding)
