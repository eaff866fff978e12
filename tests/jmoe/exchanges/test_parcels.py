"""What is sent in rounds: all of it once, in order, and never more than there is room for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe.exchanges.parcels import make_plan, pack

NUM_SHARDS, NUM_LOCAL = 3, 4


def rounds_of(plan):
    """The parcels of all rounds, as lists of the units that go to each shard."""
    sent, rounds = plan.nothing_sent(), []
    pack_next = jax.jit(lambda sent: pack(plan, sent))
    while plan.remains(sent):
        parcel, sent = pack_next(sent)
        chunks = np.asarray(parcel.unit).reshape(NUM_SHARDS, plan.chunk)
        rounds.append([chunk[chunk < plan.wants.shape[1]].tolist() for chunk in chunks])
        assert rounds[-1] != [[]] * NUM_SHARDS
        for shard, units in enumerate(rounds[-1]):
            expected = shard * plan.chunk + np.arange(len(units))
            np.testing.assert_array_equal(np.asarray(parcel.row)[np.asarray(units, int), shard], expected)
    return rounds


@pytest.mark.parametrize(("chunk", "room"), [(3, 100), (100, 5), (4, 6), (100, 100)])
def test_every_token_goes_once_to_each_shard_that_it_wants(chunk, room):
    rng = np.random.default_rng(0)
    index = rng.integers(-1, NUM_SHARDS * NUM_LOCAL, (20, 3))
    index[5:12] = 7  # an expert that is chosen thrice
    plan = make_plan(jmoe.Routing(jnp.asarray(index), jnp.ones((20, 3))), 20, NUM_SHARDS, NUM_LOCAL, chunk, room)
    rounds = rounds_of(plan)
    shard_of = np.where(index >= 0, index // NUM_LOCAL, -1)
    for shard in range(NUM_SHARDS):
        wanted = (shard_of == shard).sum(axis=1)
        assert [unit for units in rounds for unit in units[shard]] == np.flatnonzero(wanted).tolist()
        for units in rounds:
            assert len(units[shard]) <= chunk
            assert wanted[units[shard]].sum() <= room
    assert (len(rounds) == 1) == (chunk == room == 100)


def test_without_assignments_nothing_is_sent():
    routing = jmoe.Routing(jnp.full((4, 2), -1), jnp.ones((4, 2)))
    assert rounds_of(make_plan(routing, 4, NUM_SHARDS, NUM_LOCAL, 2, 2)) == []


def test_each_assignment_of_a_list_is_a_unit_of_its_own():
    routing = jmoe.Assignments(jnp.array([1, 0, 1]), jnp.array([0, 11, 5]), jnp.ones(3))
    plan = make_plan(routing, 2, NUM_SHARDS, NUM_LOCAL, 2, 2)
    parcel, _ = pack(plan, plan.nothing_sent())
    assert plan.token_of(parcel).tolist() == [1, 2, 1, 2, 0, 2]
    assert plan.rows_of(jnp.array([[3.0], [4.0]]), parcel).ravel().tolist() == [4, 0, 4, 0, 3, 0]
    np.testing.assert_array_equal(plan.weights_of(parcel, jnp.arange(6.0)[:, None]).ravel(), [0, 4, 2])
