"""Parameters of replicas get to their devices, and their gradients back, however often they are sent on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import jmoe
from jmoe import Replica
from jmoe.exchanges.replicas import Replication, transfer_rounds
from jmoe.grouped_mlp import ExpertParameters

NUM_DEVICES = 6
# Expert 0 has four replicas; device 4 has two replicas; and device 1 sends on what it has got.
PLACEMENT = jmoe.ExpertPlacement(
    stored=tuple((device,) for device in range(NUM_DEVICES)),
    replicas=(
        (),
        (Replica(0, 0.5),),
        (Replica(0, 0.1),),
        (Replica(1, 0.5),),
        (Replica(0, 0.1), Replica(1, 0.2)),
        (Replica(0, 0.2),),
    ),
)


def test_in_a_round_a_device_sends_and_receives_once_what_it_has():
    has = {(device, expert) for device, experts in enumerate(PLACEMENT.stored) for expert in experts}
    num_stored = len(PLACEMENT.stored[0])
    rounds = transfer_rounds(PLACEMENT)
    assert len(rounds) == 3  # 1, 2, 4 devices have expert 0
    for transfers in rounds:
        for number in (0, 1):
            assert len({transfer[number] for transfer in transfers}) == len(transfers)
        arrived = set()
        for source, target, local, replica in transfers:
            expert = PLACEMENT.replicas[target][replica].expert
            at_source = PLACEMENT.stored[source] + tuple(replica.expert for replica in PLACEMENT.replicas[source])
            assert at_source[local] == expert
            assert (source, expert) in has
            arrived.add((target, expert))
        assert not arrived & has
        has |= arrived
    assert len(has) == NUM_DEVICES * num_stored + sum(map(len, PLACEMENT.replicas))


@pytest.mark.parametrize("axis_names", [("a", "b"), pytest.param(("b", "a"), marks=pytest.mark.exhaustive)])
def test_replicas_are_copies_and_their_gradients_sums(axis_names):
    replication = Replication(axis_names, PLACEMENT)
    mesh = jax.make_mesh((3, 2), ("a", "b"), devices=jax.devices()[:NUM_DEVICES])
    sharded = PartitionSpec(axis_names)

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=sharded, out_specs=sharded, check_vma=False)
    def copy_and_sum(parameters, gradients):
        device = replication.device()
        return replication.with_replicas(parameters, device, jnp.float32), replication.summed(gradients, device)

    numbers = np.arange(1.0, NUM_DEVICES + 1, dtype=np.float32)
    gradients = np.random.default_rng(0).random((NUM_DEVICES, 3)).astype(np.float32)
    arguments = [ExpertParameters(a, a) for a in (jnp.reshape(a, (-1, 1, 1)) for a in (numbers, gradients))]
    with jax.set_mesh(mesh):
        copies, sums = copy_and_sum(*jax.device_put(arguments, jax.NamedSharding(mesh, sharded)))
    expected, expected_sums = np.zeros((NUM_DEVICES, 3)), gradients[:, 0].copy()
    for device, replicas in enumerate(PLACEMENT.replicas):
        experts = [replica.expert for replica in replicas]
        expected[device, : 1 + len(experts)] = numbers[[device, *experts]]
        expected_sums[experts] += gradients[device, 1 : 1 + len(experts)]
    for copied, summed in zip(copies[:2], sums[:2], strict=True):
        np.testing.assert_array_equal(np.asarray(copied).reshape(NUM_DEVICES, 3), expected)
        np.testing.assert_allclose(np.ravel(summed), expected_sums, rtol=1e-6)


def test_matrices_are_sent_in_the_dtype_of_the_computation_and_biases_in_their_own():
    placement = jmoe.ExpertPlacement(((0,), (1,)), ((), (Replica(0, 0.5),)))
    replication = Replication(("expert",), placement)
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def append(parameters):
        return replication.with_replicas(parameters, replication.device(), jnp.bfloat16)

    parameters = ExpertParameters(jnp.ones((2, 4, 6)), jnp.ones((2, 6, 4)), jnp.ones((2, 6)))
    sharded = PartitionSpec("expert")
    append = jax.shard_map(append, mesh=mesh, in_specs=sharded, out_specs=sharded, check_vma=False)
    with jax.set_mesh(mesh):
        jaxpr = str(jax.make_jaxpr(append)(parameters))
    sent = [line.split(" = ppermute")[0].split()[-1] for line in jaxpr.splitlines() if " = ppermute" in line]
    assert [of.split(":")[1] for of in sent] == ["bf16[4,6]", "bf16[6,4]", "f32[6]"]
    assert {array.dtype for array in jax.tree.leaves(jax.eval_shape(append, parameters))} == {jnp.dtype("float32")}
