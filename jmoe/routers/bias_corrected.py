"""Load balance without an auxiliary loss: a bias on the selection of experts, moved by their load."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jmoe.routers.group_limited import route_group_limited
from jmoe.routers.linear import LinearRouter
from jmoe.routing import Assignments, Routing


class SelectionBias(nnx.Variable):
    """The variable of a selection bias: no parameter, so that neither gradients nor optimizers touch it."""


class BiasCorrectedRouter(LinearRouter):
    """A linear router that selects by score plus bias, and whose bias follows the load of the experts.

    The layer never changes the bias; the training step does, once for each step, with the load over the whole
    batch: `moe.router.update_bias(aux.expert_load)`. On a mesh the load of the layer's aux is the global one.

    Args:
        features: D.
        num_experts: E.
        k: experts per token.
        update_rate: how far one update moves a bias.
        rngs: as in `LinearRouter`.
        **options: those of `route_group_limited` and of `LinearRouter`.

    Source: Wang et al., arXiv 2408.15664, algorithm 1; DeepSeek-V3, arXiv 2412.19437, section 2.1.2.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jmoe
        >>> router = jmoe.routers.BiasCorrectedRouter(16, 4, 2, update_rate=0.5, rngs=nnx.Rngs(0))
        >>> router.update_bias(jnp.array([0.5, 0.5, 0.0, 0.0]))
        >>> router.bias[...].tolist()
        [-0.5, -0.5, 0.5, 0.5]
    """

    def __init__(
        self,
        features: int,
        num_experts: int,
        k: int,
        *,
        update_rate: float = 0.001,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(features, num_experts, route_group_limited, k=k, rngs=rngs, **options)
        self.update_rate = update_rate
        self.bias = SelectionBias(jnp.zeros(num_experts, jnp.float32))

    def __call__(self, x: Float[Array, "T D"], /, **inputs: Any) -> tuple[Routing | Assignments, Float[Array, "T E"]]:
        """Routes tokens, as `Router` says."""
        return super().__call__(x, selection_bias=self.bias[...], **inputs)

    def update_bias(self, expert_load: Float[Array, "*layers E"]) -> None:
        """Moves each bias by `update_rate`, as `updated_bias` does.

        Args:
            expert_load: [E], shares or counts of the assignments of a step, over the whole batch; [layers, E] for
                routers that are stacked.

        Raises:
            ValueError: `expert_load` has another shape.
        """
        self.bias[...] = updated_bias(self.bias[...], expert_load, self.update_rate)


def updated_bias(
    bias: Float[Array, "*layers E"], expert_load: Float[Array, "*layers E"], update_rate: float
) -> Float[Array, "*layers E"]:
    """Moves each bias by `update_rate`: up where the expert got less than the mean load, down where more.

    Args:
        bias: [E], of one layer, or [layers, E].
        expert_load: [E], shares or counts of the assignments. One that is the mean, up to rounding, changes nothing.
        update_rate: how far.

    Returns:
        The new bias.

    Raises:
        ValueError: `expert_load` has another shape than `bias`.

    Source: Wang et al., arXiv 2408.15664, algorithm 1.

    Example:
        >>> import jax.numpy as jnp
        >>> import jmoe
        >>> jmoe.routers.updated_bias(jnp.zeros(3), jnp.array([4, 1, 1]) / 6, 0.5).tolist()
        [-0.5, 0.5, 0.5]
    """
    if expert_load.shape != bias.shape:
        raise ValueError(
            f"expert_load has shape {list(expert_load.shape)}; it must be {list(bias.shape)}, as in the layer's aux."
        )
    # Shares are rounded, and so is their mean: an expert that has it exactly must not seem to miss it. A difference of
    # one assignment is more than that as long as no expert has a million.
    load = expert_load.astype(bias.dtype)
    missing = load.mean(axis=-1, keepdims=True) - load
    rounding = 8 * jnp.finfo(load.dtype).eps * load.max(axis=-1, keepdims=True)
    return bias + update_rate * jnp.where(jnp.abs(missing) > rounding, jnp.sign(missing), 0)
