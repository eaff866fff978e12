"""Every exchange gives what one device gives, forward and every gradient, whatever the routing."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import jmoe
from jmoe import Replica

TOKENS, FEATURES, HIDDEN = 24, 8, 8  # tokens of each device
ROUTINGS = ("uniform", "zipf", "one_expert", "empty_experts")
EXCHANGES = ("gather", "ring", "all_to_all")

# Any two of exchange, K and experts per device occur together once, each exchange once with experts placed by load.
# (exchange, K, experts per device, devices, the most replicas on a device; None: experts in their own order)
SAMPLE = [
    ("gather", 1, 1, 2, None),
    ("gather", 2, 2, 4, 1),
    ("gather", 8, 16, 4, None),
    ("ring", 1, 16, 2, None),
    ("ring", 2, 1, 3, 1),
    ("ring", 8, 2, 4, None),
    ("all_to_all", 1, 2, 2, 1),
    ("all_to_all", 2, 16, 4, None),
    ("all_to_all", 8, 1, 8, None),
]
GRID = [
    (exchange, top_k, experts_per_device, 8, replicas)
    for exchange, top_k, experts_per_device, replicas in itertools.product(
        EXCHANGES, (1, 2, 8), (1, 2, 16), (None, 0, 2)
    )
]
EXHAUSTIVE = pytest.mark.exhaustive
CELLS = [pytest.param(*c) for c in SAMPLE] + [pytest.param(*c, marks=EXHAUSTIVE) for c in GRID]

# Replicas that are sent on by one another, and one that takes all of an expert's load; device 3 has none.
PLACEMENT = jmoe.ExpertPlacement(
    stored=((7, 0), (5, 2), (1, 3), (6, 4)),
    replicas=((Replica(3, 0.25),), (Replica(7, 0.5), Replica(0, 0.2)), (Replica(0, 0.2), Replica(6, 1.0)), ()),
)
OF_FOUR = jmoe.ExpertPlacement(((3, 0), (2, 1)), ((Replica(1, 0.3),), (Replica(3, 0.6),)))


def expert_indices(routing, num_tokens, num_experts, top_k):
    rng = np.random.default_rng([num_tokens, num_experts, top_k])
    popularity = 1 / np.arange(1, num_experts + 1) if routing == "zipf" else np.ones(num_experts)
    by_preference = np.argsort(-np.log(popularity) - rng.gumbel(size=(num_tokens, num_experts)), axis=1)
    index = by_preference[:, :top_k].astype(np.int32)
    if routing == "one_expert":
        index[:, 0], index[:, 1:] = num_experts - 1, -1
    if routing == "empty_experts":
        index[index < num_experts // 2] = -1  # all those of the first devices
    return index


@functools.cache
def arguments(routing, num_tokens, num_experts, top_k):
    index = expert_indices(routing, num_tokens, num_experts, top_k)
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    x = normal(num_tokens, FEATURES)
    arrays = {
        # What a token without an expert holds is nobody's business.
        "x": jnp.where((index < 0).all(axis=1)[:, None], jnp.nan, x),
        "w_up": normal(num_experts, FEATURES, 2 * HIDDEN) / 3,
        "w_down": normal(num_experts, HIDDEN, FEATURES) / 3,
        "weight": jnp.asarray(rng.random(index.shape), jnp.float32),
    }
    if top_k == 2:
        arrays |= {"b_up": normal(num_experts, 2 * HIDDEN), "b_down": normal(num_experts, FEATURES)}
    return arrays, jnp.asarray(index), normal(num_tokens, FEATURES)


@functools.cache
def compiled(exchange, placement=None, **options):
    @jax.jit
    def run(arrays, index, dy):
        def apply(x, weight, **parameters):
            if placement is not None:
                parameters = {name: array[np.array(placement.order)] for name, array in parameters.items()}
            where = {"exchange": exchange, "expert_placement": placement}
            return jmoe.moe_mlp(x, routing=jmoe.Routing(index, weight), **where, **parameters, **options)

        y, pull_back = jax.vjp(lambda arrays: apply(**arrays), arrays)
        return y, pull_back(dy)[0]

    return run


def expert_mesh(num_devices):
    return jax.make_mesh((num_devices,), ("expert",), (AxisType.Auto,), devices=jax.devices()[:num_devices])


def check(exchange, mesh, routing, num_tokens, num_experts, top_k, relative_error, placement=None, **options):
    problem = arguments(routing, num_tokens, num_experts, top_k)
    expected = jax.tree.leaves_with_path(compiled("auto", **options)(*problem))
    with jax.set_mesh(mesh):
        actual = jax.tree.leaves(compiled(exchange, placement, **options)(*problem))
    for (path, wanted), got in zip(expected, actual, strict=True):
        assert np.isfinite(wanted).all()
        assert relative_error(got, wanted) < 1e-5, jax.tree_util.keystr(path)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("exchange", "top_k", "experts_per_device", "num_devices", "replicas"), CELLS)
def test_outputs_and_gradients_equal_those_of_one_device(
    exchange, top_k, experts_per_device, num_devices, replicas, routing, relative_error
):
    num_experts, placement = experts_per_device * num_devices, None
    if replicas is not None:  # planned for one routing, and right for all
        load = np.bincount(expert_indices("zipf", 1000, num_experts, top_k).ravel(), minlength=num_experts)
        placement = jmoe.plan_placement(load, num_devices, replicas=replicas)
    sizes = TOKENS * num_devices, num_experts, top_k
    check(exchange, expert_mesh(num_devices), routing, *sizes, relative_error, placement)


@pytest.mark.parametrize(
    "exchange", ["gather", *(pytest.param(e, marks=pytest.mark.exhaustive) for e in EXCHANGES[1:])]
)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_tokens_that_the_devices_do_not_divide_are_on_all_of_them(exchange, routing, relative_error):
    check(exchange, expert_mesh(2), routing, 2 * TOKENS + 1, 4, 2, relative_error, OF_FOUR)


@pytest.mark.exhaustive
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(
    "options",
    [{"weight_on": "input"}, {"remat": True}, {"activation": jmoe.Gated(jnp.tanh)}],
    ids=["weight-on-input", "remat", "gate-of-the-users"],
)
@pytest.mark.parametrize("placement", [None, PLACEMENT], ids=["in-order", "placed"])
def test_options_of_the_mlps_do_what_they_do_on_one_device(options, exchange, routing, placement, relative_error):
    check(exchange, expert_mesh(4), routing, 4 * TOKENS, 8, 2, relative_error, placement, **options)


@pytest.mark.exhaustive
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("batch_axes", ["data", ("data", "model")], ids=["one-of-two", "both"])
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("placement", [None, PLACEMENT], ids=["in-order", "placed"])
def test_tokens_are_exchanged_along_those_expert_axes_that_they_are_on(
    exchange, batch_axes, routing, placement, relative_error
):
    mesh = jax.make_mesh((2, 2), ("data", "model"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])
    compiled.cache_clear()  # the rules are no part of the key of a compiled function
    with nnx.logical_axis_rules([("batch", batch_axes), ("expert", ("model", "data"))]):
        check(exchange, mesh, routing, 4 * TOKENS, 8, 2, relative_error, placement)


@pytest.mark.parametrize(
    "exchange", ["all_to_all", *(pytest.param(e, marks=pytest.mark.exhaustive) for e in ("gather", "ring"))]
)
@pytest.mark.parametrize("placement", [None, pytest.param(OF_FOUR, marks=EXHAUSTIVE)], ids=["in-order", "placed"])
def test_a_list_of_assignments_is_exchanged_too_from_explicit_axes(exchange, placement, relative_error):
    """With a data axis beside; the pairs of devices then have rounds of their own number."""
    rng = np.random.default_rng(0)
    num_tokens, num_experts, size = 32, 4, 96
    token = jnp.asarray(rng.integers(-1, num_tokens + 1, size))  # some of no token
    expert = jnp.asarray(np.where(token < num_tokens // 2, 3, rng.integers(-1, num_experts, size)))
    arrays, _, dy = arguments("uniform", num_tokens, num_experts, 2)

    @functools.partial(jax.jit, static_argnames="placement")
    def run(arrays, weight, placement=None):
        def apply(arrays, weight):
            parameters = {name: array for name, array in arrays.items() if name != "weight"}
            if placement is not None:
                order = np.array(placement.order)
                parameters = {name: array if name == "x" else array[order] for name, array in parameters.items()}
            where = {"exchange": exchange, "expert_placement": placement}
            return jmoe.moe_mlp(routing=jmoe.Assignments(token, expert, weight), remat=True, **where, **parameters)

        y, pull_back = jax.vjp(apply, arrays, weight)
        return y, pull_back(dy)

    weight = jnp.asarray(rng.random(size), jnp.float32)
    expected = jax.tree.leaves_with_path(run(arrays, weight))
    mesh = jax.make_mesh((2, 2), ("data", "expert"), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        tokens = jax.NamedSharding(mesh, jax.P(("data", "expert")))
        actual = jax.tree.leaves(run(arrays | {"x": jax.device_put(arrays["x"], tokens)}, weight, placement))
    for (path, wanted), got in zip(expected, actual, strict=True):
        assert relative_error(got, wanted) < 1e-5, jax.tree_util.keystr(path)
