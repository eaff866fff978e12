"""Which exchange is taken."""

from typing import Literal, get_args

from jmoe.arguments import check_choice
from jmoe.exchanges.all_to_all import AllToAll
from jmoe.exchanges.exchange import Exchange
from jmoe.exchanges.gather import Gather
from jmoe.exchanges.replicas import Replication
from jmoe.exchanges.ring import Ring
from jmoe.local_mlp import MLPOptions

ExchangeName = Literal["auto", "ring", "all_to_all", "gather"]

_EXCHANGES: dict[str, type[Exchange]] = {"ring": Ring, "all_to_all": AllToAll, "gather": Gather}
_RING_BYTES = 32 * 2**20  # of a shard's tokens; not measured yet


def check_exchange(name: str) -> None:
    """Raises a ValueError where a name is that of no exchange."""
    check_choice("exchange", name, get_args(ExchangeName))


def choose_exchange(num_shards: int, top_k: int, shard_bytes: int) -> Literal["ring", "all_to_all", "gather"]:
    """Says what `exchange="auto"` is.

    With more shards than experts per token, a token has nothing to do on most of them: "all_to_all" sends it only
    where it has. Otherwise nearly every shard wants every token. Where a shard's tokens are many, they travel in a
    "ring" while the experts compute, and only one foreign shard is held at a time; where they are few, the steps of
    a ring cost more than they hide, and one "gather" is best.

    Args:
        num_shards: n, the shards that the experts, and the tokens with them, are split into.
        top_k: K, experts per token.
        shard_bytes: size of the tokens of one shard, `T * D * itemsize`.

    Returns:
        The name of an exchange.

    Example:
        >>> choose_exchange(num_shards=64, top_k=8, shard_bytes=2**20)
        'all_to_all'
    """
    if num_shards > top_k:
        return "all_to_all"
    return "ring" if shard_bytes >= _RING_BYTES else "gather"


def make_exchange(
    name: ExchangeName,
    axis_names: tuple[str, ...],
    options: MLPOptions,
    num_experts: int,
    *,
    num_shards: int,
    top_k: int,
    shard_bytes: int,
    replication: Replication | None = None,
) -> Exchange:
    """Makes the exchange of a name.

    Args:
        name: "auto", or what it is to be.
        axis_names: as in `Exchange`.
        options: as in `Exchange`.
        num_experts: as in `Exchange`.
        num_shards: as in `choose_exchange`; with one, nothing is exchanged whatever the name.
        top_k: as in `choose_exchange`.
        shard_bytes: as in `choose_exchange`.
        replication: as in `Exchange`.

    Raises:
        ValueError: there is no such exchange.
    """
    check_exchange(name)
    if num_shards == 1:
        return Gather((), options, num_experts, replication=replication)
    chosen = choose_exchange(num_shards, top_k, shard_bytes) if name == "auto" else name
    return _EXCHANGES[chosen](axis_names, options, num_experts, replication=replication)
