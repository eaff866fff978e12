"""MoE layers through JAX: this project's, and one on any function with the meaning of `jax.lax.ragged_dot`."""

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

import jmoe
from benchmarks.jax_matmuls import CUBLAS_OPTIONS, NO_AUTOTUNING, check_memory, kernel_implementation
from benchmarks.layers import RESULTS, Configuration, sample_tokens
from benchmarks.record import Record, custom_calls
from benchmarks.timing import Variant

type LayerFunction = Callable[[Array, Array, Array, Array], Array]
"""Computes y[T, D] from x[T, D], w_up[E, D, H], w_down[E, F, D] and logits[T, E]."""

_MIB = 2**20


def jmoe_layer(configuration: Configuration) -> LayerFunction:
    """This project's layer, on its kernels wherever these can run."""

    def layer(x: Array, w_up: Array, w_down: Array, logits: Array) -> Array:
        routing = jmoe.route_top_k(logits, configuration.K)
        return jmoe.moe_mlp(
            x, w_up, w_down, routing, activation=configuration.activation, implementation=kernel_implementation()
        )

    return layer


def ragged_dot_layer(configuration: Configuration, ragged_dot: Callable[..., Array]) -> LayerFunction:
    """A layer as one writes it around `jax.lax.ragged_dot`: rows sorted by expert, derivatives by JAX."""
    T, K, E = configuration.T, configuration.K, configuration.E

    def layer(x: Array, w_up: Array, w_down: Array, logits: Array) -> Array:
        weight, expert = _route(logits, K)
        order = jnp.argsort(expert.ravel(), stable=True)
        sizes = jnp.bincount(expert.ravel(), length=E).astype(jnp.int32)
        h = ragged_dot(x[order // K], w_up, sizes)
        a = _activate(configuration, h.astype(jnp.float32)).astype(x.dtype)
        v = ragged_dot(a, w_down, sizes)
        v_of_token = v[jnp.argsort(order)].reshape(T, K, -1)
        return jnp.einsum("tk,tkd->td", weight, v_of_token.astype(jnp.float32)).astype(x.dtype)

    return layer


def tokamax_layer(configuration: Configuration) -> LayerFunction:
    """`ragged_dot_layer` on tokamax's kernels, chosen as it chooses them by default."""
    return ragged_dot_layer(configuration, importlib.import_module("tokamax").ragged_dot)


def lax_layer(configuration: Configuration) -> LayerFunction:
    """`ragged_dot_layer` on JAX's own."""
    return ragged_dot_layer(configuration, lax.ragged_dot)


def plain_layer(configuration: Configuration) -> LayerFunction:
    """A layer that gives every token to every expert, with weight 0 where it was not routed to it.

    It shares no code with `jmoe`. Operands and results of matmuls are rounded to x's dtype; everything else, sums
    over experts and activations among it, is float32.
    """

    def layer(x: Array, w_up: Array, w_down: Array, logits: Array) -> Array:
        weight, expert = _route(logits, configuration.K)
        of_expert = jnp.zeros(logits.shape).at[jnp.arange(len(logits))[:, None], expert].set(weight)
        exact_x = x.astype(jnp.float32)  # so that the gradient of x is summed in float32

        def add(y: Array, parameters: tuple[Array, Array, Array]) -> tuple[Array, None]:
            w_up, w_down, weight = parameters
            h = jnp.dot(exact_x.astype(x.dtype), w_up, precision="highest")
            a = _activate(configuration, h.astype(jnp.float32)).astype(x.dtype)
            v = jnp.dot(a, w_down, precision="highest")
            return y + weight[:, None] * v.astype(jnp.float32), None

        y, _ = lax.scan(add, jnp.zeros_like(exact_x), (w_up, w_down, of_expert.T))
        return y.astype(x.dtype)

    return layer


class Program(NamedTuple):
    """What XLA is to compile.

    Attributes:
        function: The function.
        arguments: Their shapes and dtypes.
        options: XLA's.
        probe: XLA's, to compile with first, to see if it fits: autotuning what does not waits long for memory.
    """

    function: Callable[..., Any]
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    options: Mapping[str, Any] = {}
    probe: Mapping[str, Any] | None = None

    def compile(self) -> jax.stages.Compiled:
        """Compiles the function; raises a MemoryError if the probe shows that it cannot run."""
        lowered = jax.jit(self.function).lower(*self.arguments)
        if self.probe is not None:
            check_memory(lowered.compile(compiler_options=dict(self.probe)))
        return lowered.compile(compiler_options=dict(self.options))


class CompiledLayer:
    """Whatever is needed of a configuration, compiled by the threads of a pool, but for the dense matmul.

    That one is compiled when it is asked for: XLA chooses its kernel by running some, which takes a device that is
    otherwise idle.

    Args:
        configuration: The shapes.
        layer: The layer that is measured.
        pool: The threads.
        timed: Whether it will be run, and not only asked for its memory.
        ours: Whether it surely fits, and its rounding is compared with that of plain bfloat16.
    """

    def __init__(
        self,
        configuration: Configuration,
        layer: LayerFunction,
        pool: ThreadPoolExecutor,
        *,
        timed: bool = True,
        ours: bool = True,
    ):
        self.configuration, self.ours = configuration, ours
        programs = _programs(configuration, layer, probe=None if ours else NO_AUTOTUNING)
        if not timed:
            programs = {"both": programs["both"]}
        elif not ours:
            del programs["plain"], programs["plain_errors"]
        self._dense = programs.pop("dense", None)
        self._compiling: dict[str, Future[jax.stages.Compiled]] = {
            name: pool.submit(program.compile) for name, program in programs.items()
        }
        self._kept: Future[int] = pool.submit(kept_bytes, layer, _operand_shapes(configuration)[:-1])

    def __getitem__(self, name: str) -> jax.stages.Compiled:
        """Waits for a program; raises what compiling it raised."""
        return self._compiling[name].result()

    def compile_dense(self) -> jax.stages.Compiled:
        """Compiles one matmul of as many operations as the up-projection."""
        assert self._dense is not None
        return self._dense.compile()

    def memory(self) -> Record:
        """What lives between forward and backward, and what XLA plans for both, in MiB."""
        record: Record = {"backend": kernel_implementation()} if self.ours else {}
        record["kept_mib"] = self._kept.result() / _MIB
        plan = self["both"].memory_analysis()
        if plan is not None:
            record["peak_mib"] = plan.temp_size_in_bytes / _MIB
            record["output_mib"] = plan.output_size_in_bytes / _MIB
        return record


class JaxLayer:
    """A compiled layer with operands on JAX's first device.

    Args:
        compiled: The layer.
        seed: Of the operands.
    """

    def __init__(self, compiled: CompiledLayer, seed: int):
        self._compiled = compiled
        *operands, self._dense_lhs, self._dense_rhs = compiled["operands"](jnp.int32(seed))
        self._x, self._w_up, self._w_down, self._dy = operands
        self._dense = compiled.compile_dense()
        self._logits = None

    def route(self, logits: np.ndarray) -> None:
        """Takes the router's logits."""
        self._logits = jax.device_put(logits)

    def check(self) -> tuple[dict[str, float], dict[str, float] | None]:
        """Compares the very programs that are timed with float32, on the sampled tokens.

        All other tokens get a zero gradient of y, so that float32 needs the sampled ones only.
        """
        run = self._compiled
        expected = run["exact"](*self._both_operands)
        plain_errors = None
        if run.ours:
            plain = run["plain"](*self._both_operands)
            plain_errors = _by_name(run["plain_errors"](expected, plain))
        y = run["forward"](*self._operands)
        both = run["both"](*self._operands, run["on_sample_only"](self._dy))
        return _by_name(run["errors"](expected, y, both)), plain_errors

    def facts(self) -> Record:
        """Memory, and what the compiled layer runs beside XLA's own code."""
        return {"custom_calls": custom_calls(self._compiled["both"]), **self._compiled.memory()}

    def variants(self) -> dict[str, Variant]:
        """What to time."""
        run = self._compiled
        calls = {
            "forward": functools.partial(run["forward"], *self._operands),
            "both": functools.partial(run["both"], *self._both_operands),
            "dense": functools.partial(self._dense, self._dense_lhs, self._dense_rhs),
            "copy": functools.partial(run["copy"], self._w_up),
        }
        jax.block_until_ready([call() for call in calls.values()])  # nothing is slow for being the first time
        return {name: Variant(call, jax.block_until_ready) for name, call in calls.items()}

    @property
    def _operands(self) -> tuple[Array, ...]:
        assert self._logits is not None
        return self._x, self._w_up, self._w_down, self._logits

    @property
    def _both_operands(self) -> tuple[Array, ...]:
        return *self._operands, self._dy


def kept_bytes(layer: LayerFunction, operands: Sequence[jax.ShapeDtypeStruct]) -> int:
    """Bytes that the layer's pullback holds, beside the operands themselves."""

    def residuals(*operands: Array) -> list[Any]:
        return jax.tree.leaves(jax.vjp(layer, *operands)[1])

    jaxpr = jax.make_jaxpr(residuals)(*operands).jaxpr
    # By identity: a residual of an operand's shape is not the operand.
    kept = {id(var): var for var in jaxpr.outvars if var not in jaxpr.invars and not hasattr(var, "val")}
    shapes: list[Any] = [var.aval for var in kept.values()]
    return sum(shape.size * shape.dtype.itemsize for shape in shapes)


def _operand_shapes(configuration: Configuration) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Of x, w_up, w_down, logits and dy."""
    c, bf16 = configuration, jnp.bfloat16
    x = jax.ShapeDtypeStruct((c.T, c.D), bf16)
    w_up = jax.ShapeDtypeStruct((c.E, c.D, c.up_columns), bf16)
    w_down = jax.ShapeDtypeStruct((c.E, c.F, c.D), bf16)
    return x, w_up, w_down, jax.ShapeDtypeStruct((c.T, c.E), jnp.float32), x


def _programs(
    configuration: Configuration, layer: LayerFunction, *, probe: Mapping[str, Any] | None
) -> dict[str, Program]:
    c, bf16 = configuration, jnp.bfloat16
    operands = x, w_up, *_, dy = _operand_shapes(c)
    dense = jax.ShapeDtypeStruct((c.num_rows, c.D), bf16), jax.ShapeDtypeStruct((c.D, c.up_columns), bf16)
    both = functools.partial(_forward_and_backward, layer)
    exact = functools.partial(_on_sample, c, jnp.float32)
    plain = functools.partial(_on_sample, c, bf16)
    expected = jax.eval_shape(exact, *operands)
    results = jax.eval_shape(both, *operands)
    run_once = {**CUBLAS_OPTIONS, **NO_AUTOTUNING}
    return {
        "operands": Program(functools.partial(_draw_operands, c), (jax.ShapeDtypeStruct((), jnp.int32),)),
        "forward": Program(layer, operands[:-1], probe=probe),
        "both": Program(both, operands, probe=probe),
        "dense": Program(jnp.dot, dense, CUBLAS_OPTIONS),
        "copy": Program(jnp.copy, (w_up,)),
        "exact": Program(exact, operands, run_once),
        "plain": Program(plain, operands, run_once),
        "plain_errors": Program(_plain_errors, (expected, jax.eval_shape(plain, *operands))),
        "on_sample_only": Program(functools.partial(_on_sample_only, c), (dy,)),
        "errors": Program(functools.partial(_errors, c), (expected, x, results)),
    }


def _draw_operands(configuration: Configuration, seed: Array) -> tuple[Array, ...]:
    c = configuration
    x, w_up, w_down, _, dy = _operand_shapes(c)
    shapes = x.shape, w_up.shape, w_down.shape, dy.shape, (c.num_rows, c.D), (c.D, c.up_columns)
    scales = 1, c.D**-0.5, c.F**-0.5, 1, 1, 1  # pre-activations and outputs of experts about as large as x
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return tuple(
        jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(scale)
        for key, shape, scale in zip(keys, shapes, scales, strict=True)
    )


def _forward_and_backward(layer: LayerFunction, *operands: Array) -> tuple[Array, ...]:
    *inputs, dy = operands
    y, pull_back = jax.vjp(layer, *inputs)
    return y, *pull_back(dy)


def _on_sample(configuration: Configuration, dtype: Any, *operands: Array) -> tuple[Array, ...]:
    """The plain layer's forward and backward on the sampled tokens, in a dtype."""
    x, w_up, w_down, logits, dy = operands
    tokens = sample_tokens(configuration)
    weights = w_up.astype(dtype), w_down.astype(dtype)
    return _forward_and_backward(
        plain_layer(configuration), x[tokens].astype(dtype), *weights, logits[tokens], dy[tokens].astype(dtype)
    )


def _on_sample_only(configuration: Configuration, dy: Array) -> Array:
    tokens = sample_tokens(configuration)
    return jnp.zeros_like(dy).at[tokens].set(dy[tokens])


def _plain_errors(expected: tuple[Array, ...], actual: tuple[Array, ...]) -> list[Array]:
    y, *gradients = (_relative_error(*pair) for pair in zip(actual, expected, strict=True))
    return [y, y, *gradients]


def _errors(
    configuration: Configuration, expected: tuple[Array, ...], y: Array, both: tuple[Array, ...]
) -> list[Array]:
    tokens = sample_tokens(configuration)
    expected_y, *expected_gradients = expected
    y_with_backward, *gradients = both
    gradients_of_parameters = zip(gradients[1:3], expected_gradients[1:3], strict=True)
    return [
        _relative_error(y[tokens], expected_y),
        _relative_error(y_with_backward[tokens], expected_y),
        _relative_error(gradients[0], _elsewhere_zero(configuration, expected_gradients[0])),
        *(_relative_error(*pair) for pair in gradients_of_parameters),
        _relative_error(gradients[3], _elsewhere_zero(configuration, expected_gradients[3])),
    ]


def _elsewhere_zero(configuration: Configuration, of_sample: Array) -> Array:
    tokens = sample_tokens(configuration)
    return jnp.zeros((configuration.T, of_sample.shape[1]), of_sample.dtype).at[tokens].set(of_sample)


def _relative_error(actual: Array, expected: Array) -> Array:
    """The norm of the difference over that of `expected`, or itself where that is zero (logits, if K = 1)."""
    norm = jnp.linalg.norm(expected)
    difference = jnp.linalg.norm((actual.astype(jnp.float32) - expected).ravel())
    return difference / jnp.where(norm == 0, 1, norm)


def _by_name(errors: list[Array]) -> dict[str, float]:
    return {name: float(error) for name, error in zip(RESULTS, errors, strict=True)}


def _route(logits: Array, k: int) -> tuple[Array, Array]:
    chosen, expert = lax.top_k(logits, k)
    return jax.nn.softmax(chosen, axis=1), expert


def _activate(configuration: Configuration, h: Array) -> Array:
    if configuration.activation == "gelu":
        return jax.nn.gelu(h)
    gate, up = jnp.split(h, 2, axis=1)
    return jax.nn.silu(gate) * up
