"""ReLU routing: as many experts as have a positive logit, kept few by an L1 loss that adapts itself."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jmoe.losses import AxisName, token_mean
from jmoe.routers.linear import LinearRouter
from jmoe.routing import Routing, check_top_k, checked_logits
from pallas_kernels import top_k


def route_relu(
    logits: Float[Array, "T E"], *, max_k: int | None = None, mask: Bool[Array, " T"] | None = None
) -> Routing:
    """Routes each token to all experts with a positive logit, which is also the weight: `relu(logits)`.

    Unlike a top-k this is continuous in the logits. A token without a positive logit goes to no expert.

    Args:
        logits: [T, E], the router's output, of any floating-point dtype.
        max_k: the static bound on the experts of one token, by default E. Of a token with more positive
            logits only the `max_k` largest count; `relu_density` tells how many there are. Training begins
            with about half of all logits positive.
        mask: as in `jmoe.route_top_k`.

    Returns:
        A `Routing` with K = `max_k`, the largest weights first; entries that are not used are absent.

    Raises:
        ValueError: `max_k` is not between 1 and E, or `logits` is not a floating-point matrix.

    Source: Wang et al. (ReMoE), arXiv 2412.14711.

    Example:
        >>> import jax.numpy as jnp
        >>> import jmoe
        >>> routing = jmoe.routers.route_relu(jnp.array([[-1.0, 2.0, 0.5], [-1.0, -2.0, 0.0]]))
        >>> routing.expert_index.tolist(), routing.weight.tolist()
        ([[1, 2, -1], [-1, -1, -1]], [[2.0, 0.5, 0.0], [0.0, 0.0, 0.0]])
    """
    logits = checked_logits(logits)
    max_k = logits.shape[1] if max_k is None else max_k
    check_top_k(max_k, logits.shape[1])
    chosen, expert_index = top_k(logits, max_k)
    # A NaN stays, and spoils its own token, as in every router.
    routing = Routing(expert_index, chosen).where(~(chosen <= 0))
    return routing if mask is None else routing.masked(mask)


def relu_density(
    logits: Float[Array, "T E"], *, mask: Bool[Array, " T"] | None = None, axis_name: AxisName = ()
) -> Float[Array, ""]:
    """Computes the share of positive logits: 1 minus the sparsity of the paper; 0 where no token is left.

    Args:
        logits: [T, E], the router's output.
        mask: bool[T], false for tokens that enter no statistic, such as padding.
        axis_name: as in `jmoe.load_balancing_loss`.
    """
    return token_mean(logits > 0, mask, axis_name).mean()


def relu_l1_loss(
    logits: Float[Array, "T E"],
    k: int,
    *,
    balance: bool = True,
    mask: Bool[Array, " T"] | None = None,
    axis_name: AxisName = (),
) -> Float[Array, ""]:
    """Computes the L1 norm of a token's routing weights, by default weighted by the load of the experts.

    `mean_t sum_e f_e * relu(logits[t, e])`, where `f_e = E / (k * T) * count_e` grows with the tokens that
    have a positive logit for e (a count: no gradient), or 1 with `balance=False`.

    Args:
        logits: [T, E], the router's output.
        k: the mean number of experts per token that is aimed at.
        balance: whether experts that get more are pressed down more.
        mask: bool[T], false for tokens that enter no statistic, such as padding.
        axis_name: as in `jmoe.load_balancing_loss`.

    Returns:
        A scalar in float32 (float64 for float64 logits); 0 where no token is left.

    Source: Wang et al. (ReMoE), arXiv 2412.14711.
    """
    logits = checked_logits(logits)
    check_top_k(k, logits.shape[1])
    weight = token_mean(jax.nn.relu(logits), mask, axis_name)  # [E]
    if balance:
        weight *= logits.shape[1] / k * token_mean(logits > 0, mask, axis_name)
    return weight.sum()


class L1Coefficient(nnx.Variable):
    """The variable of a loss weight that adapts itself: no parameter."""


class ReLURouter(LinearRouter):
    """A linear router with `route_relu`, and the weight of its L1 loss.

    The layer's `aux.router` holds `l1_loss` (`relu_l1_loss`) and `density` (`relu_density`), both over the whole
    batch. The training step adds `router.l1_coefficient[...] * aux.router["l1_loss"]` to the objective, and calls
    `router.update_l1(aux.router["density"])` once. In the paper a model has one coefficient and one density, the
    mean over its layers: give that to the routers of all layers, and their coefficients stay equal.

    Args:
        features: D.
        num_experts: E.
        k: the mean number of experts per token that is aimed at.
        max_k: as in `route_relu`.
        initial_l1: the coefficient at the beginning.
        l1_factor: what one update multiplies or divides the coefficient with.
        rngs: as in `LinearRouter`.
        **options: those of `LinearRouter`.

    Source: Wang et al. (ReMoE), arXiv 2412.14711, where `initial_l1` is 1e-8 and `l1_factor` 1.2.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jmoe
        >>> router = jmoe.routers.ReLURouter(16, 4, 2, initial_l1=1.0, l1_factor=2.0, rngs=nnx.Rngs(0))
        >>> router.update_l1(jnp.array(0.75))  # three of four experts: more than two
        >>> float(router.l1_coefficient[...])
        2.0
    """

    def __init__(
        self,
        features: int,
        num_experts: int,
        k: int,
        *,
        max_k: int | None = None,
        initial_l1: float = 1e-8,
        l1_factor: float = 1.2,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        check_top_k(k, num_experts)
        super().__init__(features, num_experts, route_relu, max_k=max_k, rngs=rngs, **options)
        self.k = k
        self.target_density = k / num_experts
        self.l1_factor = l1_factor
        self.l1_coefficient = L1Coefficient(jnp.asarray(initial_l1, jnp.float32))

    def statistics(
        self, logits: Float[Array, "T E"], *, mask: Bool[Array, " T"] | None = None, axis_name: AxisName = ()
    ) -> dict[str, Float[Array, "..."]]:
        """Computes what the loss and its control need: `l1_loss` and `density`."""
        return {
            "l1_loss": relu_l1_loss(logits, self.k, mask=mask, axis_name=axis_name),
            "density": relu_density(logits, mask=mask, axis_name=axis_name),
        }

    def update_l1(self, density: Float[Array, ""]) -> None:
        """Multiplies the coefficient with `l1_factor` where more experts are active than wanted, divides where fewer.

        Args:
            density: the share of active experts over the whole batch (`relu_density`).
        """
        self.l1_coefficient[...] *= self.l1_factor ** jnp.sign(density - self.target_density)
