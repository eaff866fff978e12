"""Hash routing: the experts of a token follow from its id, by a table."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Int32

from jmoe.routers.router import Router
from jmoe.routing import Routing, check_top_k


def route_hash(
    token_ids: Int[Array, " T"], table: Int[Array, "V K"], *, mask: Bool[Array, " T"] | None = None
) -> Routing:
    """Routes each token to the experts that a table names for its id, each with weight 1 / K.

    Args:
        token_ids: int[T], places in the vocabulary of V tokens. One outside [0, V) goes to no expert.
        table: int[V, K], of `random_hash_table` or `balanced_hash_table`, or of one's own. An expert outside [0, E)
            is an absent assignment, which `jmoe.debug_checks` refuses in the layer unless it is -1.
        mask: as in `jmoe.route_top_k`.

    Returns:
        A `Routing` with weights in float32.

    Raises:
        ValueError: `table` is no matrix of integers, or `token_ids` no vector of integers.

    Source: Roller et al., arXiv 2106.04426.

    Example:
        >>> import jax.numpy as jnp
        >>> import jmoe
        >>> jmoe.routers.route_hash(jnp.array([2, 0, 2]), jnp.array([[1], [0], [3]])).expert_index.tolist()
        [[3], [1], [3]]
    """
    _check_table(table)
    if token_ids.ndim != 1 or not jnp.issubdtype(token_ids.dtype, jnp.integer):
        raise ValueError(f"token_ids is {token_ids.dtype}{list(token_ids.shape)}; it must be int, one for each token.")
    vocabulary, k = table.shape
    expert_index = table.at[token_ids].get(mode="clip")
    routing = Routing(expert_index, jnp.full(expert_index.shape, 1 / k, jnp.float32))
    routing = routing.masked((token_ids >= 0) & (token_ids < vocabulary))
    return routing if mask is None else routing.masked(mask)


def _check_table(table: Int[Array, "V K"]) -> None:
    if table.ndim != 2 or not jnp.issubdtype(table.dtype, jnp.integer):
        raise ValueError(
            f"table is {table.dtype}{list(table.shape)}; it must be int[V, K]: the K experts of each token id."
        )


class HashTable(nnx.Variable):
    """The variable of a table that stays as it is: no parameter."""


class HashRouter(Router):
    """Routes by the tokens' ids, which the layer is called with: `moe(x, token_ids=ids)`.

    It has no logits, so that the layer's losses are 0.

    Args:
        table: int[V, K], as in `route_hash`. The layer's number of experts E is not known here: a table that was made
            for more leaves tokens with fewer than K experts, or none.

    Raises:
        ValueError: `table` is no matrix of integers.

    Source: Roller et al., arXiv 2106.04426.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jmoe
        >>> router = jmoe.routers.HashRouter(jnp.array([[0], [1], [1]]))
        >>> moe = jmoe.MoE(16, 32, num_experts=2, router=router, rngs=nnx.Rngs(0))
        >>> moe(jnp.ones((4, 16)), token_ids=jnp.array([2, 0, 1, 1]))[1].expert_load.tolist()
        [0.25, 0.75]
    """

    def __init__(self, table: Int[Array, "V K"]):
        _check_table(table)
        self.table = HashTable(table)

    def __call__(
        self, x: Float[Array, "T D"], /, *, token_ids: Int[Array, " T"], mask: Bool[Array, " T"] | None = None
    ) -> tuple[Routing, None]:
        """Routes tokens, as `Router` says."""
        del x
        return route_hash(token_ids, self.table[...], mask=mask), None


def random_hash_table(key: Array, vocabulary: int, num_experts: int, k: int = 1) -> Int32[Array, "V K"]:
    """Draws k different experts for each token of a vocabulary, all alike likely.

    Args:
        key: a JAX random key.
        vocabulary: V.
        num_experts: E.
        k: experts per token.

    Returns:
        int32[V, k].

    Raises:
        ValueError: k is not between 1 and E.

    Source: Roller et al., arXiv 2106.04426, "random hash".
    """
    check_top_k(k, num_experts)
    return jax.lax.top_k(jax.random.uniform(key, (vocabulary, num_experts)), k)[1]


def balanced_hash_table(token_counts: np.ndarray | Float[Array, " V"], num_experts: int) -> Int32[Array, "V 1"]:
    """Gives each token of a vocabulary one expert, so that the experts' loads are nearly equal.

    The most frequent token first, each goes to the expert that has least so far. Computed on the host, once.

    Args:
        token_counts: [V], how often each token occurs in the training data.
        num_experts: E.

    Returns:
        int32[V, 1].

    Source: Roller et al., arXiv 2106.04426, "balanced hash".

    Example:
        >>> import numpy as np
        >>> import jmoe
        >>> jmoe.routers.balanced_hash_table(np.array([1, 5, 2, 2]), 2).tolist()
        [[1], [0], [1], [1]]
    """
    check_top_k(1, num_experts)
    counts = np.asarray(token_counts, np.float64)
    load = np.zeros(num_experts)
    table = np.zeros((counts.size, 1), np.int32)
    for token in np.argsort(-counts, kind="stable"):
        table[token] = expert = np.argmin(load)
        load[expert] += counts[token]
    return jnp.asarray(table)
