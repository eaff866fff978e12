"""The layer on meshes of eight virtual devices gives what one device gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jmoe
from jmoe.exchanges import ExchangeName

FEATURES, HIDDEN, EXPERTS, TOP_K = 12, 16, 8, 2


PLACEMENT = jmoe.ExpertPlacement(
    stored=((7, 0, 3, 5), (6, 1, 2, 4)),
    replicas=((jmoe.Replica(1, 0.4),), (jmoe.Replica(0, 0.5), jmoe.Replica(3, 0.2))),
)


def create(exchange: ExchangeName = "auto", placement: jmoe.ExpertPlacement | None = None):
    return jmoe.MoE(
        FEATURES,
        HIDDEN,
        EXPERTS,
        TOP_K,
        use_bias=True,
        bias_init=nnx.initializers.normal(0.5),
        shared_hidden_features=8,
        shared_combine="sigmoid_gate",
        use_output_bias=True,
        exchange=exchange,
        expert_placement=placement,
        rngs=nnx.Rngs(0),
    )


def inputs(batch=8, length=6):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((batch, length, FEATURES)), jnp.float32)
    return x, jnp.asarray(rng.random((batch, length)) < 0.8)


@nnx.jit
def outputs_and_gradients(moe, x, mask):
    def loss(moe, x):
        y, aux = moe(x, mask=mask)
        return jnp.sum(jnp.sin(y)) + aux.load_balancing_loss + aux.router_z_loss, (y, aux)

    (_, outputs), gradients = nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(moe, x)
    return outputs, gradients


@functools.cache
def on_one_device(batch=8):
    return jax.tree.map(np.asarray, outputs_and_gradients(create(), *inputs(batch)))


def make_mesh(shape, axis_type):
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(axis_type,) * len(shape))


def check_against_one_device(shape, axis_type, exchange, relative_error, batch=8, placement=None):
    with jax.set_mesh(make_mesh(shape, axis_type)):
        moe = create(exchange, placement)
        assert moe.w_up[...].sharding.spec[0] == "expert"
        outputs, (dmoe, dx) = outputs_and_gradients(moe, *inputs(batch))
    actual = outputs, (jmoe.reorder_experts(dmoe, None, previous=placement), dx)
    expected = jax.tree.leaves_with_path(on_one_device(batch))
    for (path, wanted), got in zip(expected, jax.tree.leaves(actual), strict=True):
        assert relative_error(got, wanted) < 1e-5, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("shape", "axis_type", "exchange", "placement"),
    [
        ({"data": 2, "expert": 4}, AxisType.Auto, "all_to_all", None),
        ({"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}, AxisType.Auto, "ring", PLACEMENT),
        ({"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}, AxisType.Explicit, "gather", None),
    ],
    ids=["data-expert-auto", "all-auto-placed", "all-explicit"],
)
def test_outputs_statistics_and_gradients_equal_those_of_one_device(
    shape, axis_type, exchange, placement, relative_error
):
    check_against_one_device(shape, axis_type, exchange, relative_error, placement=placement)


@pytest.mark.exhaustive
@pytest.mark.parametrize("exchange", ["gather", "ring", "all_to_all"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    "shape",
    [
        {"expert": 8},
        {"data": 2, "expert": 4},
        {"fsdp": 2, "expert": 4},
        {"expert": 4, "tensor": 2},
        {"data": 2, "fsdp": 2, "expert": 2},
        {"expert": 2, "data": 2, "tensor": 2},
    ],
    ids="-".join,
)
def test_every_exchange_combines_with_every_way_to_shard(shape, axis_type, exchange, relative_error):
    check_against_one_device(shape, axis_type, exchange, relative_error)


@pytest.mark.exhaustive
@pytest.mark.parametrize("exchange", ["gather", "ring", "all_to_all"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("batch", [3, 8])
def test_placed_experts_combine_with_every_way_to_shard(batch, axis_type, exchange, relative_error):
    for shape in ({"data": 2, "expert": 2, "tensor": 2}, {"fsdp": 2, "expert": 2, "tensor": 2}):
        check_against_one_device(shape, axis_type, exchange, relative_error, batch=batch, placement=PLACEMENT)


@pytest.mark.exhaustive
@pytest.mark.parametrize("exchange", ["gather", "ring", "all_to_all"])
@pytest.mark.parametrize("batch", [2, 3, 6])
def test_a_last_batch_of_any_size_gives_what_one_device_gives(batch, exchange, relative_error):
    """On the data axis alone, on no axis at all, and on both the data and the expert axis."""
    shape = {"data": 2, "expert": 2, "tensor": 2} if batch == 6 else {"data": 2, "expert": 4}
    check_against_one_device(shape, AxisType.Auto, exchange, relative_error, batch=batch)


def test_tokens_that_are_sharded_over_every_axis_stay_so_on_an_explicit_mesh(relative_error):
    mesh = make_mesh({"data": 2, "expert": 2, "tensor": 2}, AxisType.Explicit)
    x, mask = inputs()
    spec = PartitionSpec("data", ("tensor", "expert"), None)
    with jax.set_mesh(mesh):
        x = jnp.pad(x, ((0, 0), (0, 2), (0, 0)), constant_values=jnp.nan)
        mask = jnp.pad(mask, ((0, 0), (0, 2)))
        x = jax.device_put(x, NamedSharding(mesh, spec))
        (y, aux), (_, dx) = outputs_and_gradients(create(), x, mask)
    assert jax.typeof(y).sharding.spec == spec
    (expected_y, expected_aux), (_, expected_dx) = on_one_device()
    assert relative_error(np.asarray(y)[:, :6], expected_y) < 1e-5
    assert relative_error(np.asarray(dx)[:, :6], expected_dx) < 1e-5
    assert relative_error(aux.load_balancing_loss, expected_aux.load_balancing_loss) < 1e-5


@pytest.mark.parametrize(
    ("axis_type", "spec"),
    [
        (AxisType.Auto, PartitionSpec("data")),
        (AxisType.Explicit, PartitionSpec("data", ("tensor", "expert"), None)),
        (AxisType.Explicit, PartitionSpec(None, "data", None)),
    ],
    ids=["auto", "parts-of-sequences", "parts-of-sequences-only"],
)
def test_sequences_are_balanced_by_themselves_however_they_are_sharded(axis_type, spec):
    moe = jmoe.MoE(FEATURES, HIDDEN, EXPERTS, TOP_K, load_balancing="sequence", rngs=nnx.Rngs(0))
    x, mask = inputs(length=8)
    mask = mask.at[3].set(False)
    logits = x @ moe.router.kernel[...]
    expected = []
    for z, kept in zip(logits, mask, strict=True):
        if kept.any():
            expected.append(jmoe.load_balancing_loss(jax.nn.softmax(z[kept]), jmoe.route_top_k(z[kept], TOP_K)))

    @nnx.jit
    def run(moe, x):
        return nnx.value_and_grad(lambda moe: moe(x, mask=mask)[1].load_balancing_loss)(moe)

    loss, gradients = run(moe, x)
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-5)
    mesh = make_mesh({"data": 2, "expert": 2, "tensor": 2}, axis_type)
    with jax.set_mesh(mesh):
        loss_on_mesh, gradients_on_mesh = run(moe, jax.device_put(x, NamedSharding(mesh, spec)))
    np.testing.assert_allclose(loss_on_mesh, loss, rtol=1e-5)
    np.testing.assert_allclose(gradients_on_mesh.router.kernel, gradients.router.kernel, rtol=1e-4, atol=1e-7)


def test_a_batch_that_the_mesh_does_not_divide_is_replicated(relative_error):
    apply = nnx.jit(lambda moe, x: moe(x))
    x, _ = inputs(batch=3)
    with jax.set_mesh(make_mesh({"data": 2, "expert": 4}, AxisType.Auto)):
        y, aux = apply(create(), x)
    expected_y, expected_aux = apply(create(), x)
    assert relative_error(y, expected_y) < 1e-5
    assert relative_error(aux.load_balancing_loss, expected_aux.load_balancing_loss) < 1e-5


def test_the_experts_are_computed_where_they_are_stored():
    """No device ever holds more than its own experts, so an all-gather of weights would show."""
    with jax.set_mesh(make_mesh({"data": 2, "expert": 4}, AxisType.Auto)):
        graphdef, state = nnx.split(create())
        run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)[0])
        program = run.lower(state, inputs()[0]).compile().as_text() or ""
    assert f"f32[{EXPERTS // 4},{FEATURES},{2 * HIDDEN}]" in program
    assert f"f32[{EXPERTS},{FEATURES},{2 * HIDDEN}]" not in program


def test_inside_a_shard_map_of_the_caller_the_layer_sees_one_shard(relative_error):
    moe = create()
    x, _ = inputs()
    graphdef, state = nnx.split(moe)

    def apply(state, x):
        y, aux = nnx.merge(graphdef, state)(x)
        return y, jax.tree.map(lambda a: a[None], aux)

    mesh = make_mesh({"data": 4, "expert": 2}, AxisType.Auto)
    shards = PartitionSpec("data")
    sharded = jax.shard_map(
        apply,
        mesh=mesh,
        in_specs=(PartitionSpec(), shards),
        out_specs=(shards, shards),
        axis_names={"data"},
        check_vma=False,
    )
    with jax.set_mesh(mesh):
        y, aux = jax.jit(sharded)(state, x)
    on_one_device = nnx.jit(lambda moe, x: moe(x))
    assert relative_error(y, on_one_device(moe, x)[0]) < 1e-5
    for shard in range(4):
        _, expected = on_one_device(moe, x[2 * shard : 2 * shard + 2])
        assert relative_error(aux.load_balancing_loss[shard], expected.load_balancing_loss) < 1e-5


def test_named_sharding_gives_every_parameter_its_place():
    moe = create()
    mesh = make_mesh({"fsdp": 2, "expert": 4}, AxisType.Auto)
    state = nnx.state(moe)
    shardings = jmoe.named_sharding(state, mesh)
    specs = {path: sharding.spec for path, sharding in jax.tree.leaves_with_path(nnx.to_pure_dict(shardings))}
    specs = {jax.tree_util.keystr(path, simple=True, separator="."): spec for path, spec in specs.items()}
    assert specs["w_up"] == PartitionSpec("expert", "fsdp", None)
    assert specs["b_down"] == PartitionSpec("expert", "fsdp")
    assert specs["router.kernel"] == PartitionSpec("fsdp", None)
    nnx.update(moe, jax.device_put(state, shardings))
    assert moe.w_up[...].addressable_shards[0].data.shape == (2, 6, 32)


def test_flaxs_own_axis_rules_replace_the_default_ones():
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "model"))
    axes, shape = ("expert", "embed", "expert_hidden"), (8, 12, 32)
    assert jmoe.partition_spec(axes, shape, mesh) == PartitionSpec(None, None, None)
    with nnx.logical_axis_rules((("expert", "model"), ("embed", ("data", "model")))):
        assert jmoe.partition_spec(axes, shape, mesh) == PartitionSpec("model", "data", None)


def test_a_dimension_that_an_axis_does_not_divide_is_replicated():
    mesh = jax.sharding.AbstractMesh((2, 4), ("fsdp", "expert"))
    assert jmoe.partition_spec(("expert", "embed"), (6, 12), mesh) == PartitionSpec(None, "fsdp")


@pytest.mark.parametrize(
    ("shape", "sizes", "message"),
    [
        (
            {"expert": 8},
            {},
            "num_experts is 6; it must be a multiple of 8, the size of the mesh axis expert: make it 8,",
        ),
        (
            {"tensor": 8},
            {"hidden_features": 20},
            "^hidden_features is 20; it must be a multiple of 8, the size of the mesh axis tensor: make it 24,",
        ),
        (
            {"tensor": 4},
            {"shared_hidden_features": 18},
            "shared_hidden_features is 18; it must be a multiple of 4, the size of the mesh axis tensor: make it 20, "
            "or give 'expert_hidden' another rule with flax.nnx.logical_axis_rules",
        ),
    ],
    ids=["expert", "tensor", "tensor-shared"],
)
def test_a_mesh_that_cannot_split_the_layer_is_a_value_error_that_says_what_to_do(shape, sizes, message):
    sizes = {"hidden_features": HIDDEN, "num_experts": 6, "top_k": TOP_K} | sizes
    with jax.set_mesh(make_mesh(shape, AxisType.Auto)), pytest.raises(ValueError, match=message):
        jmoe.MoE(FEATURES, **sizes, rngs=nnx.Rngs(0))(inputs()[0])


def test_a_width_that_the_mesh_does_not_divide_may_be_left_whole_by_another_rule(relative_error):
    moe = jmoe.MoE(FEATURES, HIDDEN, EXPERTS, TOP_K, shared_hidden_features=18, rngs=nnx.Rngs(0))
    apply = nnx.jit(lambda moe, x: moe(x)[0])
    x, _ = inputs()
    rules = [rule for rule in jmoe.LOGICAL_AXIS_RULES if rule[0] != "expert_hidden"]
    with jax.set_mesh(make_mesh({"tensor": 4}, AxisType.Auto)), nnx.logical_axis_rules(rules):
        y = apply(moe, x)
    assert relative_error(y, apply(moe, x)) < 1e-5
