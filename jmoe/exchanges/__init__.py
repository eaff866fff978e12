"""Exchanges: how tokens get to the experts of other devices, and the experts' outputs back, inside `jax.shard_map`.

Each is a class with a forward and a backward (`Exchange`), and a file of its own. They drop no token, whatever the
routing, and need no buffer for the worst case: what random routing does not need is computed, and with `all_to_all`
exchanged, in more rounds.
"""

from jmoe.exchanges.all_to_all import AllToAll
from jmoe.exchanges.choice import ExchangeName, check_exchange, choose_exchange, make_exchange
from jmoe.exchanges.exchange import Exchange
from jmoe.exchanges.gather import Gather
from jmoe.exchanges.ring import Ring

__all__ = [
    "AllToAll",
    "Exchange",
    "ExchangeName",
    "Gather",
    "Ring",
    "check_exchange",
    "choose_exchange",
    "make_exchange",
]
