"""Placements of experts: planned as balanced as can be, and carried out as planned."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

import jmoe
from jmoe import Replica
from jmoe.placement import placed_routing


def zipf_choices(num_tokens, num_experts, top_k, seed=0):
    """The K experts of each token, drawn without replacement in proportion to 1, 1/2, 1/3, ...."""
    rng = np.random.default_rng(seed)
    keys = np.log(np.arange(1, num_experts + 1)) - rng.gumbel(size=(num_tokens, num_experts))
    return np.argsort(keys, axis=1)[:, :top_k]


def zipf_load(num_experts=64, top_k=8):
    return np.bincount(zipf_choices(20_000, num_experts, top_k).ravel(), minlength=num_experts)


def contiguous(num_experts, num_devices):
    return jmoe.ExpertPlacement(tuple(map(tuple, np.arange(num_experts).reshape(num_devices, -1).tolist())))


def least_maximum(load, num_devices):
    """The smallest load that the fullest device can have, of all ways to put as many experts on each."""
    if num_devices == 1:
        return load.sum()
    parts = itertools.combinations(range(load.size), load.size // num_devices)
    return min(max(load[list(p)].sum(), least_maximum(np.delete(load, p), num_devices - 1)) for p in parts)


@pytest.mark.parametrize(("num_experts", "num_devices"), [(8, 2), (10, 2), (9, 3), (8, 4)])
def test_plans_are_nearly_the_best_that_there_are(num_experts, num_devices):
    rng = np.random.default_rng(num_experts)
    for load in (rng.random(num_experts), rng.exponential(size=num_experts), rng.integers(0, 3, num_experts)):
        placement = jmoe.plan_placement(load, num_devices)
        device_load = placement.device_load(load)
        best = least_maximum(load / load.sum(), num_devices)
        assert best - 1e-9 <= device_load.max() <= 1.05 * best
        assert placement.balance(load) == pytest.approx(1 / (num_devices * device_load.max()))


@pytest.mark.parametrize("num_devices", [2, 4, 16])
def test_devices_differ_by_no_more_than_experts_do(num_devices):
    rng = np.random.default_rng(num_devices)
    for load in (rng.exponential(size=64), 2.0 ** -np.arange(64), np.ones(64)):
        device_load = jmoe.plan_placement(load, num_devices).device_load(load)
        assert device_load.sum() == pytest.approx(1)
        assert np.ptp(device_load) <= np.ptp(load) / load.sum() + 1e-9


def test_zipf_loads_are_even_on_two_devices_where_experts_in_their_own_order_are_not():
    load = zipf_load()
    assert contiguous(64, 2).balance(load) < 0.62
    assert jmoe.plan_placement(load, 2).balance(load) > 0.999


@pytest.mark.parametrize(("num_devices", "replicas"), [(2, 1), (8, 1), (8, 2), (64, 1), (64, 2)])
def test_replicas_make_loads_even_where_one_expert_is_too_much_for_a_device(num_devices, replicas):
    load = 1 / np.arange(1, 65)
    without, placement = (jmoe.plan_placement(load, num_devices, replicas=r) for r in (0, replicas))
    assert placement.stored == without.stored
    assert placement.num_replicas <= replicas
    assert placement.balance(load) >= max(without.balance(load), 0.9 if replicas == 1 else 0.98)
    assert (placement.num_replicas == 0) == (without.balance(load) > 0.99)


def test_a_plan_has_no_replicas_that_it_does_not_need():
    assert jmoe.plan_placement(np.ones(8), 4, replicas=3).num_replicas == 0
    load = [5.0, 1, 1, 1]
    placement = jmoe.plan_placement(load, 2, replicas=3)
    (none, (replica,)) = placement.replicas
    assert (none, replica.expert, replica.share) == ((), 0, pytest.approx(0.4))
    assert placement.device_load(load).tolist() == [0.5, 0.5]


def test_without_any_load_all_experts_count_alike():
    assert jmoe.plan_placement(jnp.zeros(4), 2) == jmoe.plan_placement([1, 1, 1, 1], 2)


def test_the_rows_of_each_device_are_as_planned():
    num_tokens, num_experts, num_devices, top_k = 4096, 32, 8, 2
    index = zipf_choices(num_tokens, num_experts, top_k)
    load = np.bincount(index.ravel(), minlength=num_experts)
    placement = jmoe.plan_placement(load, num_devices, replicas=2)
    assert placement.num_replicas
    number = placed_routing(jmoe.Routing(jnp.asarray(index), jnp.ones(index.shape)), placement).expert_index
    num_local = num_experts // num_devices + placement.num_replicas
    rows = np.bincount(np.asarray(number).ravel() // num_local, minlength=num_devices)
    np.testing.assert_allclose(rows / rows.sum(), placement.device_load(load), rtol=0.03)
    # And every number is of the expert that was asked for.
    experts = np.full((num_devices, num_local), -1)
    for device, (stored, replicas) in enumerate(zip(placement.stored, placement.replicas, strict=True)):
        experts[device, : len(stored)] = stored
        experts[device, len(stored) : len(stored) + len(replicas)] = [expert for expert, _ in replicas]
    np.testing.assert_array_equal(experts.ravel()[np.asarray(number)], index)


@pytest.mark.parametrize("stride", [1, 2, 3, 128])
def test_an_experts_tokens_are_shared_evenly_whichever_they_are(stride):
    placement = jmoe.ExpertPlacement(((0,), (1,), (2,)), ((), (Replica(0, 0.3),), (Replica(0, 0.6),)))
    token = stride * jnp.arange(1000)
    assignments = jmoe.Assignments(token, jnp.zeros(1000, int), jnp.ones(1000))
    number = placed_routing(assignments, placement).expert_index
    np.testing.assert_allclose(np.bincount(number, minlength=6) / 1000, [0.1, 0, 0, 0.3, 0, 0.6], atol=0.02)


def test_absent_assignments_stay_absent():
    placement = jmoe.ExpertPlacement(((3, 1), (0, 2)), ((Replica(0, 0.5),), ()))
    index = jnp.array([[-1, 3], [4, 2], [7, -9]], jnp.int8)
    number = placed_routing(jmoe.Routing(index, jnp.ones((3, 2))), placement).expert_index
    assert number.tolist() == [[-1, 0], [-1, 4], [-1, -1]]


def test_equal_placements_are_the_same_static_value():
    a, b = jmoe.ExpertPlacement(((0, 1), (2, 3))), jmoe.ExpertPlacement(((0, 1), (2, 3)), ((), ()))
    assert a == b
    assert hash(a) == hash(b)
    assert jmoe.ExpertPlacement(((0, 1), (2, 3)), ((), (Replica(0, 0.5),))).without_replicas == a


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2, 3], 2), "num_devices is 2 and expert_load has 3 experts; it must be at least 1 and divide them"),
        (([1, 2], 0), "num_devices is 0"),
        (([], 1), r"expert_load is \[\]; it must be \[E\]"),
        (([[1, 2]], 1), "it must be .E., of finite numbers"),
        (([1, -1], 1), "at least 0"),
        (([1, np.nan], 1), "of finite numbers"),
    ],
)
def test_a_plan_that_cannot_be_is_a_value_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        jmoe.plan_placement(*arguments)
    with pytest.raises(ValueError, match="replicas is -1; it must be 0"):
        jmoe.plan_placement([1, 2], 2, replicas=-1)


@pytest.mark.parametrize(
    ("stored", "replicas", "message"),
    [
        (((0, 1), (2,)), (), r"stored has \[2, 1\] experts; every device must store the same number"),
        ((), (), "every device must store the same number, at least 1"),
        (((0, 1), (1, 2)), (), "each of the experts 0, 1, ... must be there once"),
        (((0,), (1,)), ((),), "replicas are of 1 devices and stored is of 2"),
        (((0,), (1,)), (((0, 0.5),), ()), r"device 0 has replicas of \[0\], some twice or beside the expert itself"),
        (((0,), (1,)), (((2, 0.5),), ()), "experts are 0 to 1"),
        (((0,), (1,)), (((1, 0.0),), ()), "must be more than 0 and no more than 1 together"),
        (((0,), (1,), (2,)), (((1, 0.6),), (), ((1, 0.6),)), "no more than 1 together"),
    ],
)
@pytest.mark.usefixtures("without_annotation_checks")
def test_a_placement_that_cannot_be_is_a_value_error(stored, replicas, message):
    with pytest.raises(ValueError, match=message):
        jmoe.ExpertPlacement(stored, replicas)


def test_a_placement_of_other_experts_or_devices_is_a_value_error_that_says_what_to_do():
    placement = jmoe.plan_placement(np.ones(8), 2)
    with pytest.raises(ValueError, match="is of 8 experts and the layer has 4; give"):
        jmoe.MoE(8, 8, 4, 2, expert_placement=placement, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="experts have different widths; these are not split over devices"):
        jmoe.MoE(8, [64] * 8, 8, 2, expert_placement=placement, rngs=nnx.Rngs(0))
    routing, x = jmoe.Routing(jnp.zeros((4, 1), int), jnp.ones((4, 1))), jnp.ones((4, 8))

    def apply(num_experts):
        w_up, w_down = jnp.ones((num_experts, 8, 8)), jnp.ones((num_experts, 4, 8))
        return jmoe.moe_mlp(x, w_up, w_down, routing, expert_placement=placement)

    with pytest.raises(ValueError, match="is of 8 experts and the layer has 4"):
        apply(4)
    mesh = jax.make_mesh((4,), ("expert",), (AxisType.Auto,), devices=jax.devices()[:4])
    message = r"is for 2 devices and the mesh splits the experts into 4; make one with .*\(expert_load, 4\), and put"
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        apply(8)
    message = "expert_load is of 9 experts and the placement of 8; leave out the loads of experts that have no param"
    with pytest.raises(ValueError, match=message):
        placement.balance(np.ones(9))


@pytest.mark.usefixtures("without_annotation_checks")
def test_what_is_no_placement_is_a_value_error():
    order: Any = (0, 1, 2, 3)
    with pytest.raises(ValueError, match="expert_placement is a tuple; it must be a jmoe"):
        jmoe.MoE(8, 8, 4, 2, expert_placement=order, rngs=nnx.Rngs(0))
    x, w_up, w_down = jnp.ones((4, 8)), jnp.ones((4, 8, 8)), jnp.ones((4, 4, 8))
    routing = jmoe.Routing(jnp.zeros((4, 1), int), jnp.ones((4, 1)))
    with pytest.raises(ValueError, match="expert_placement is a tuple; it must be a jmoe"):
        jmoe.moe_mlp(x, w_up, w_down, routing, expert_placement=order)


def test_experts_start_alike_wherever_they_are():
    placement = jmoe.ExpertPlacement(((2, 0), (3, 1)))
    layer, placed = (jmoe.MoE(8, 8, 4, 2, expert_placement=p, rngs=nnx.Rngs(0)) for p in (None, placement))
    reordered = jmoe.reorder_experts(nnx.state(placed), None, previous=placement)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(reordered), nnx.to_pure_dict(nnx.state(layer)))
    np.testing.assert_array_equal(placed.w_up[0], layer.w_up[2])
    x = jax.random.normal(jax.random.key(0), (5, 8))
    (y, aux), (expected_y, expected_aux) = (nnx.jit(lambda moe, x: moe(x))(moe, x) for moe in (placed, layer))
    np.testing.assert_array_equal(y, expected_y)
    np.testing.assert_array_equal(aux.expert_load, expected_aux.expert_load)


def test_linen_variables_are_reordered_too():
    placement, x = jmoe.ExpertPlacement(((2, 0), (3, 1))), jnp.ones((1, 8))
    layers = (jmoe.linen.MoE(8, 8, 4, 2, expert_placement=p) for p in (None, placement))
    variables, placed = (jax.jit(layer.init)(jax.random.key(0), x) for layer in layers)
    jax.tree.map(np.testing.assert_array_equal, jmoe.reorder_experts(variables, placement), placed)


def test_only_variables_with_an_axis_of_experts_can_be_reordered():
    placement = jmoe.ExpertPlacement(((1,), (0,)))
    with pytest.raises(ValueError, match="tree has no variable with a logical axis 'expert'"):
        jmoe.reorder_experts({"w_up": jnp.ones((2, 3, 4))}, placement)
    state = nnx.state(jmoe.MoE(8, 8, 4, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(
        ValueError, match=r"a placement has 2 experts and a variable \[4, 8, \d+\] has 4; they must agree"
    ):
        jmoe.reorder_experts(state, placement)
    moe = jmoe.MoE(8, 8, 2, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(moe, optax.adafactor(1e-3, min_dim_size_to_factor=4), wrt=nnx.Param)
    with pytest.raises(ValueError, match="reorder the parameters only, and start the optimizer anew"):
        jmoe.reorder_experts(nnx.state(optimizer), placement)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.exhaustive)])
def test_a_model_goes_on_with_another_placement_on_other_devices_as_if_nothing_had_happened(axis_type, relative_error):
    x = jax.random.normal(jax.random.key(0), (8, 6, 8))

    @nnx.jit
    def train_step(moe, optimizer, x):
        def loss(moe):
            y, aux = moe(x)
            return jnp.mean((y - x) ** 2) + aux.load_balancing_loss, aux.expert_load

        gradients, load = nnx.grad(loss, has_aux=True)(moe)
        optimizer.update(moe, gradients)
        return load

    def create():
        moe = jmoe.MoE(8, 8, 8, 2, rngs=nnx.Rngs(0))
        return moe, nnx.Optimizer(moe, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

    expected, optimizer = create()
    moe, optimizer_of_moe = create()
    load = train_step(moe, optimizer_of_moe, x)
    for _ in range(2):
        train_step(expected, optimizer, x)

    moe.expert_placement = jmoe.plan_placement(load, 4, replicas=1)
    assert moe.expert_placement.num_replicas
    mesh = jax.make_mesh((4,), ("expert",), (axis_type,), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        for part in (moe, optimizer_of_moe):
            state = jax.device_put(nnx.state(part), jmoe.named_sharding(nnx.state(part), mesh))
            nnx.update(part, jmoe.reorder_experts(state, moe.expert_placement))
        assert moe.w_up[...].sharding.spec[0] == "expert"
        train_step(moe, optimizer_of_moe, jax.device_put(x, jax.NamedSharding(mesh, jax.P("expert"))))
    # By way of another placement, which is the same.
    other = jmoe.plan_placement(load, 2)
    state = jmoe.reorder_experts(nnx.state(moe), other, previous=moe.expert_placement)
    state = jmoe.reorder_experts(state, None, previous=other)
    for actual, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(nnx.state(expected)), strict=True):
        assert relative_error(actual, wanted) < 1e-5
