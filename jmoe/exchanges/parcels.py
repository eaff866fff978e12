"""What tokens a device sends to which other, round by round, in parcels of a fixed size."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from jmoe.routing import ABSENT, Assignments, Routing


class Plan(NamedTuple):
    """What one device has to send. A unit is what travels together: a token, or one of `Assignments`.

    Attributes:
        num_tokens: T.
        chunk: the most units that go to a device in one round.
        room: the most assignments that go to a device in one round.
        token_index: of each unit; None where units are tokens.
        routing: of each unit.
        shard_of: the shard of each assignment; n where it is absent.
        wants: how many assignments each unit has for each shard.
        rank: how many units before each one go to a shard.
        load: how many assignments units up to each one have for a shard.
    """

    num_tokens: int
    chunk: int
    room: int
    token_index: Int32[Array, " U"] | None
    routing: Routing
    shard_of: Int32[Array, "U K"]
    wants: Int32[Array, "n U"]
    rank: Int32[Array, "n U"]
    load: Int32[Array, "n U"]

    def remains(self, sent: "Sent") -> Bool[Array, ""]:
        """Says whether anything is left to be sent."""
        return (self.load[:, -1] > sent.assignments).any()

    def nothing_sent(self) -> "Sent":
        """Returns the state before the first round."""
        none = jnp.zeros(self.wants.shape[0], jnp.int32)
        return Sent(none, none)

    def token_of(self, parcel: "Parcel") -> Int32[Array, " rows"]:
        """Returns the token of each row; T where there is none."""
        if self.token_index is None:
            return parcel.unit
        return self.token_index.at[parcel.unit].get(mode="fill", fill_value=self.num_tokens)

    def rows_of(self, x: Float[Array, "T D"], parcel: "Parcel") -> Float[Array, "rows D"]:
        """Reads the rows that a parcel has of x; zeros where there is none."""
        return x.at[self.token_of(parcel)].get(mode="fill", fill_value=0)

    def routing_of(self, parcel: "Parcel") -> Routing:
        """Reads the routing of each row; absent where there is none."""
        return Routing(
            self.routing.expert_index.at[parcel.unit].get(mode="fill", fill_value=ABSENT),
            self.routing.weight.at[parcel.unit].get(mode="fill", fill_value=0),
        )

    def weights_of(self, parcel: "Parcel", rows: Float[Array, "rows K"]) -> Float[Array, "U K"]:
        """Takes each assignment's value from the row of the shard that it is for; zeros where none was sent."""
        row = jnp.take_along_axis(parcel.row, self.shard_of, axis=1, mode="fill", fill_value=rows.shape[0])
        return rows.at[row, jnp.arange(rows.shape[1])].get(mode="fill", fill_value=0)


class Sent(NamedTuple):
    """How much has been sent to each shard in the rounds so far."""

    units: Int32[Array, " n"]
    assignments: Int32[Array, " n"]


class Parcel(NamedTuple):
    """What is sent in one round: a chunk of rows for each shard.

    Attributes:
        unit: of each row; U where a chunk has room left.
        row: of each unit, for each shard; past the last where it is not sent there.
    """

    unit: Int32[Array, " rows"]
    row: Int32[Array, "U n"]


def make_plan(
    routing: Routing | Assignments, num_tokens: int, num_shards: int, num_local: int, chunk: int, room: int
) -> Plan:
    """Finds out which tokens go to which shards.

    Args:
        routing: of the tokens, to experts `[0, num_shards * num_local)`.
        num_tokens: T.
        num_shards: n.
        num_local: the experts of each shard.
        chunk: as in `Plan`.
        room: as in `Plan`; at least K, so that any unit has room.
    """
    token_index = None
    if isinstance(routing, Assignments):
        token_index = routing.token_index
        routing = Routing(routing.expert_index[:, None], routing.weight[:, None])
    index = routing.expert_index
    present = (index >= 0) & (index < num_shards * num_local)
    shard_of = jnp.where(present, index // num_local, num_shards)  # [U, K]
    wants = jnp.sum(shard_of == jnp.arange(num_shards)[:, None, None], axis=2, dtype=jnp.int32)
    goes = wants > 0
    rank = jnp.cumsum(goes, axis=1, dtype=jnp.int32) - goes
    return Plan(num_tokens, chunk, room, token_index, routing, shard_of, wants, rank, jnp.cumsum(wants, axis=1))


def pack(plan: Plan, sent: Sent) -> tuple[Parcel, Sent]:
    """Chooses what is sent in a round: for each shard the next units, as many as have room.

    Args:
        plan: what there is to send.
        sent: what has been sent before.

    Returns:
        parcel: the rows of this round.
        sent: what has been sent with it.
    """
    num_shards, num_units = plan.wants.shape
    num_rows = num_shards * plan.chunk
    place = plan.rank - sent.units[:, None]
    load = plan.load - sent.assignments[:, None]
    is_sent = (plan.wants > 0) & (place >= 0) & (place < plan.chunk) & (load <= plan.room)
    first = plan.chunk * jnp.arange(num_shards, dtype=jnp.int32)
    row = jnp.where(is_sent, first[:, None] + place, num_rows)  # [n, U]
    units = jnp.broadcast_to(jnp.arange(num_units, dtype=jnp.int32), row.shape)
    unit = jnp.full(num_rows, num_units, jnp.int32).at[row].set(units, mode="drop")
    sent = Sent(
        sent.units + is_sent.sum(axis=1, dtype=jnp.int32),
        sent.assignments + jnp.sum(jnp.where(is_sent, plan.wants, 0), axis=1, dtype=jnp.int32),
    )
    return Parcel(unit, row.T), sent
