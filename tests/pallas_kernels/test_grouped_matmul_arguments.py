"""What the grouped matmuls refuse, and which implementation they choose."""

import functools
import logging

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import grouped_matmul, grouped_weight_gradient, implementations

LHS, RHS, OUT_GRAD, SIZES = jnp.ones((4, 3)), jnp.ones((2, 3, 5)), jnp.ones((4, 5)), jnp.array([1, 3])


@pytest.mark.usefixtures("without_annotation_checks")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lhs": jnp.ones(3)}, r"lhs is float32\[3\]; it must be a floating-point matrix \[M, K\]"),
        ({"lhs": jnp.ones((4, 3), int)}, r"lhs is int32\[4, 3\]; it must be a floating-point"),
        ({"rhs": jnp.ones((3, 5))}, r"rhs is float32\[3, 5\]; it must be a floating-point array \[G, K, N\]"),
        ({"rhs": jnp.ones((2, 3, 5), int)}, r"rhs is int32\[2, 3, 5\]; it must be a floating-point"),
        ({"rhs": jnp.ones((2, 4, 5))}, r"lhs is \[M, K\] = \[4, 3\] and rhs \[G, K, N\] = \[2, 4, 5\]"),
        ({"transpose_rhs": True}, r"rhs \[G, N, K\] = \[2, 3, 5\] \(transpose_rhs=True\).*same K"),
        ({"rhs": jnp.ones((3, 3, 5))}, "rhs has 3 groups and group_sizes 2; they must agree"),
        ({"group_sizes": jnp.ones(2)}, r"group_sizes is float32\[2\]; it must be a vector of integers"),
        ({"group_sizes": jnp.ones((1, 2), int)}, r"group_sizes is int32\[1, 2\]; it must be a vector"),
        ({"group_sizes": jnp.ones(0, int)}, r"group_sizes is int32\[0\]; it must be a vector"),
        (
            {"group_offset": jnp.array([0])},
            "group_offset is not supported: slice rhs and group_sizes instead",
        ),
        (
            {"preferred_element_type": jnp.int32},
            "preferred_element_type is int32; it must be a floating-point",
        ),
        ({"implementation": "triton"}, "implementation is 'triton'; it must be None or one of 'mosaic_gpu'"),
        ({"implementation": "mosaic_gpu"}, 'implementation "mosaic_gpu" needs a Hopper GPU; None picks'),
    ],
)
def test_a_bad_argument_of_the_matmul_is_a_value_error_that_names_it(arguments, message):
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**{"lhs": LHS, "rhs": RHS, "group_sizes": SIZES} | arguments)


@pytest.mark.usefixtures("without_annotation_checks")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lhs": jnp.ones(4)}, r"lhs is float32\[4\]; it must be a floating-point matrix \[M, K\]"),
        ({"out_grad": jnp.ones((4, 5), int)}, r"out_grad is int32\[4, 5\]; it must be .* \[M, N\]"),
        ({"out_grad": jnp.ones((5, 5))}, "lhs has 4 rows and out_grad 5; they must agree"),
        ({"group_sizes": jnp.ones(2)}, r"group_sizes is float32\[2\]; it must be a vector of integers"),
        ({"preferred_element_type": bool}, "preferred_element_type is bool; it must be a floating-point"),
        ({"implementation": "cuda"}, "implementation is 'cuda'; it must be None or one of"),
        ({"implementation": "mosaic_gpu"}, 'implementation "mosaic_gpu" needs a Hopper GPU'),
    ],
)
def test_a_bad_argument_of_the_weight_gradient_is_a_value_error_that_names_it(arguments, message):
    with pytest.raises(ValueError, match=message):
        grouped_weight_gradient(**{"lhs": LHS, "out_grad": OUT_GRAD, "group_sizes": SIZES} | arguments)


@pytest.mark.usefixtures("without_annotation_checks")
def test_bad_arguments_are_refused_while_tracing_and_inside_transformations():
    with pytest.raises(ValueError, match="rhs has 2 groups"):
        jax.eval_shape(grouped_matmul, LHS, RHS, jax.ShapeDtypeStruct((3,), jnp.int32))
    with pytest.raises(ValueError, match="needs a Hopper GPU"):
        jax.jit(lambda lhs: grouped_matmul(lhs, RHS, SIZES, implementation="mosaic_gpu"))(LHS)


# Operands that the Hopper kernel does not take: (K, N, dtype, dtype of the result, what is said).
UNSUPPORTED = [
    (100, 128, jnp.bfloat16, None, "a width of 100 is not a multiple of 64"),
    (128, 72, jnp.bfloat16, None, "a width of 72 is not a multiple of 64"),
    (128, 128, jnp.float32, None, "its operands are float32; the kernel multiplies bfloat16 or float16"),
    (128, 128, jnp.bfloat16, jnp.float8_e4m3fn, "its result is float8_e4m3fn; the kernel writes"),
]


@pytest.fixture
def logged_reasons(monkeypatch):
    """What is remembered of the reasons that were logged: nothing yet."""
    reasons = set()
    monkeypatch.setattr(implementations, "_logged_reasons", reasons)
    return reasons


def on_h100(h100, function, *shapes):
    with h100():
        return jax.jit(function).trace(*shapes)


@pytest.mark.parametrize(("k", "n", "dtype", "out_dtype", "reason"), UNSUPPORTED)
def test_on_a_hopper_gpu_a_shape_that_does_not_fit_runs_on_xla_and_one_line_says_why(
    k, n, dtype, out_dtype, reason, h100, caplog, logged_reasons
):
    lhs, rhs, out_grad = (jax.ShapeDtypeStruct(s, dtype) for s in ((256, k), (4, k, n), (256, n)))
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
    calls = {
        "grouped_matmul": (grouped_matmul, lhs, rhs, sizes),
        "grouped_weight_gradient": (grouped_weight_gradient, lhs, out_grad, sizes),
    }
    for name, (function, *shapes) in calls.items():
        caplog.clear()
        logged_reasons.clear()
        with caplog.at_level(logging.DEBUG, logger="pallas_kernels"):
            traced = on_h100(h100, lambda *a, f=function: f(*a, preferred_element_type=out_dtype), *shapes)
        assert "mosaic_gpu" not in str(traced.jaxpr)
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        message = record.getMessage()
        assert message.startswith(f"{name} runs on XLA, not on its Hopper kernel: ")
        assert reason in message
        assert "\n" not in message


@pytest.mark.usefixtures("logged_reasons")
def test_a_gradient_on_a_hopper_gpu_logs_each_reason_once(h100, caplog):
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(lhs, rhs, sizes):
        return grouped_matmul(lhs, rhs, sizes).astype(jnp.float32).sum()

    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
    for k in (100, 100, 40):
        lhs, rhs = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((256, k), (4, k, 128)))
        on_h100(h100, lambda *arrays: gradient(*arrays), lhs, rhs, sizes)
    first, second = (record.getMessage() for record in caplog.records)
    assert "a width of 100 " in first
    assert "a width of 40 " in second


@pytest.mark.parametrize(("k", "n", "dtype", "out_dtype", "reason"), UNSUPPORTED)
def test_on_a_hopper_gpu_a_named_kernel_raises_for_a_shape_that_does_not_fit(k, n, dtype, out_dtype, reason, h100):
    def run(lhs, rhs, sizes):
        return grouped_matmul(lhs, rhs, sizes, preferred_element_type=out_dtype, implementation="mosaic_gpu")

    shapes = (
        jax.ShapeDtypeStruct((256, k), dtype),
        jax.ShapeDtypeStruct((4, k, n), dtype),
        jax.ShapeDtypeStruct((4,), jnp.int32),
    )
    with pytest.raises(ValueError, match=f'"mosaic_gpu" cannot run this grouped_matmul: {reason}'):
        on_h100(h100, run, *shapes)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_named_portable_implementation_runs_on_a_hopper_gpu_too_and_logs_nothing(implementation, h100, caplog):
    shapes = (
        jax.ShapeDtypeStruct((256, 128), jnp.bfloat16),
        jax.ShapeDtypeStruct((4, 128, 128), jnp.bfloat16),
        jax.ShapeDtypeStruct((4,), jnp.int32),
    )
    traced = on_h100(h100, lambda *a: grouped_matmul(*a, implementation=implementation), *shapes)
    assert "mosaic_gpu" not in str(traced.jaxpr)
    assert not caplog.records


def test_other_gpus_than_hopper_run_on_xla(caplog):
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", platform="gpu", num_cores=108)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(grouped_matmul).trace(
            jax.ShapeDtypeStruct((256, 128), jnp.bfloat16),
            jax.ShapeDtypeStruct((4, 128, 128), jnp.bfloat16),
            jax.ShapeDtypeStruct((4,), jnp.int32),
        )
    assert "mosaic_gpu" not in str(traced.jaxpr)
    assert not caplog.records
