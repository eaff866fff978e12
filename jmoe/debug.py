"""Checks of values inside a traced function, off by default."""

from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.experimental import checkify
from jaxtyping import Array, Bool

# A user context is part of the key of every jit cache, so a function that was traced without the checks is
# traced again, with them, inside `debug_checks()`.
_enabled = jax.make_user_context(False)


def debug_checks() -> AbstractContextManager[None]:
    """Turns values that break a documented rule into checkify errors, inside a `with` block.

    Values are data, so a compiled function cannot raise for them; each function documents what it does
    instead. With the checks on, these are errors:

    - a router logit that is NaN (`route_top_k`; such a token's output is NaN),
    - the routing weight of a present assignment that is not finite (`moe_mlp`, `parallel_linear`; the same),
    - an expert index outside [0, E) other than -1, the index that marks an absent assignment
      (`make_dispatch`),
    - a token index outside [0, T) of a present assignment (`moe_mlp`, where it counts as absent;
      `parallel_linear`, where its token is another),
    - a position that a cache of keys and values has no slot for, and a prompt that does not start at position 0
      (`models.MixtureOfAttention`, `models.Transformer`; the tokens miss what the cache does not give them).

    The function that is checked has to be wrapped by `jax.experimental.checkify.checkify` and called in the
    block. JAX cannot carry checks out of the `jax.shard_map` that `jmoe.MoE` enters on a mesh: run them on
    one device.

    Returns:
        A context manager.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jax.experimental import checkify
        >>> import jmoe
        >>> route = checkify.checkify(lambda logits: jmoe.route_top_k(logits, 1))
        >>> with jmoe.debug_checks():
        ...     error, _ = route(jnp.array([[jnp.nan, 1.0]]))
        >>> print(error.get().splitlines()[0])
        logits hold NaN for 1 of 1 tokens (`check` failed)
    """
    return _enabled(True)


def refuse_mesh() -> None:
    """Raises a ValueError if the checks are on, where JAX would raise a puzzling one.

    `checkify` fails on a `jax.shard_map` under `jax.set_mesh` (JAX 0.11 and 0.12).
    """
    if _enabled.value:
        raise ValueError("debug_checks() is on and a mesh is set; run the checks on one device, without a mesh.")


def check(ok: Bool[Array, "..."], message: str, **values: Any) -> None:
    """Raises a checkify error where `ok` is not all true, if the checks are on."""
    if _enabled.value:
        checkify.check(ok.all(), message, **values)
