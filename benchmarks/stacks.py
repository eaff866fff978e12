"""Layers that run one after the other for few tokens, each with weights and a random routing of its own."""

import functools
import math
import statistics
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32

import jmoe
from benchmarks.jax_layers import plain_layer
from benchmarks.jax_matmuls import CUBLAS_OPTIONS, NO_AUTOTUNING, kernel_implementation
from benchmarks.layers import Configuration
from benchmarks.record import Record, custom_calls

MIN_LAYERS = 4
MAX_BYTES = 24 * 10**9
NUM_CHECKED = 16  # tokens
_ACTIVATION_RMS = {"swiglu": 0.6, "gelu": 0.65}  # of independent standard normal values


def draw_experts(configuration: Configuration, chosen_bytes: int, seed: int) -> list[Int32[np.ndarray, "T K"]]:
    """Draws the experts of each token for as many layers as it takes to choose weights of so many bytes.

    Raises:
        ValueError: All weights of these layers would be more than may be.
    """
    T, E, K = configuration.T, configuration.E, configuration.K
    draw = np.random.default_rng((seed, T))
    experts, reached = [], 0
    while len(experts) < MIN_LAYERS or reached < chosen_bytes:
        if (len(experts) + 1) * configuration.weight_bytes > MAX_BYTES:
            raise ValueError(
                f"{len(experts)} layers have {reached / 1e9:.2g} GB of chosen experts' weights; one more would need "
                f"more than {MAX_BYTES / 1e9:g} GB for all"
            )
        order = draw.permuted(np.tile(np.arange(E, dtype=np.int32), (T, 1)), axis=1)
        experts.append(order[:, :K])
        reached += _bytes_of(configuration, _num_distinct(experts[-1]))
    return experts


def draw_weights(configuration: Configuration, num_layers: int, seed: int) -> list[tuple[Array, Array]]:
    """Draws w_up and w_down of each layer on JAX's first device."""
    c = configuration
    down_scale = math.sqrt(c.K) / _ACTIVATION_RMS[c.activation] * c.F**-0.5  # of the mean of K independent outputs

    @jax.jit
    def draw(key: Array) -> tuple[Array, Array]:
        up_key, down_key = jax.random.split(key)
        w_up = jax.random.normal(up_key, (c.E, c.D, c.up_columns), jnp.bfloat16) * jnp.bfloat16(c.D**-0.5)
        w_down = jax.random.normal(down_key, (c.E, c.F, c.D), jnp.bfloat16) * jnp.bfloat16(down_scale)
        return w_up, w_down

    return [draw(key) for key in jax.random.split(jax.random.key(seed), num_layers)]


def run_layers(
    configuration: Configuration, x: Array, weights: Sequence[tuple[Array, Array]], routings: Sequence[jmoe.Routing]
) -> tuple[Array, Array]:
    """Runs layers one after the other; returns the outputs of the first and of the last."""

    # Behind a jit of its own the layer is lowered once, however often it is called: lowering kernels takes seconds.
    @jax.jit
    def layer(x: Array, w_up: Array, w_down: Array, routing: jmoe.Routing) -> Array:
        implementation = kernel_implementation()
        return jmoe.moe_mlp(
            x, w_up, w_down, routing, activation=configuration.activation, implementation=implementation
        )

    outputs = []
    for parameters, routing in zip(weights, routings, strict=True):
        # Without the barrier, XLA could sort the assignments of all layers at once. No model could, for its routers
        # need x.
        x, routing = lax.optimization_barrier((x, routing))
        x = layer(x, *parameters, routing)
        outputs.append(x)
    return outputs[0], outputs[-1]


class Stack:
    """Some layers with their routing and input, which the threads of a pool compile into one function.

    Args:
        configuration: The shapes of a layer.
        weights: Of each layer.
        experts: Those that each token goes to, in each layer.
        pool: The threads.
        seed: Of the input.
    """

    def __init__(
        self,
        configuration: Configuration,
        weights: Sequence[tuple[Array, Array]],
        experts: Sequence[Int32[np.ndarray, "T K"]],
        pool: ThreadPoolExecutor,
        seed: int,
    ):
        c = self._configuration = configuration
        self._experts = experts
        x = np.random.default_rng((seed, c.T)).standard_normal((c.T, c.D), np.float32)
        share = jnp.full((c.T, c.K), 1 / c.K, jnp.float32)
        routings = [jmoe.Routing(jax.device_put(of_layer), share) for of_layer in experts]
        self._operands = jnp.asarray(x, jnp.bfloat16), weights, routings
        lowered = jax.jit(functools.partial(run_layers, configuration)).lower(*self._operands)
        self._compiling: Future[jax.stages.Compiled] = pool.submit(lowered.compile)

    def facts(self) -> Record:
        """Tells what the compiled function does."""
        distinct = [_num_distinct(of_layer) for of_layer in self._experts]
        return {
            "backend": kernel_implementation(),
            "custom_calls": custom_calls(self._compiling.result()),
            "layers": len(distinct),
            "experts": statistics.mean(distinct),
            "bytes": statistics.mean(_bytes_of(self._configuration, number) for number in distinct),
        }

    def check(self, plain: "Plain") -> tuple[float, float, float]:
        """Runs the layers.

        Returns:
            The relative error of the first layer's output, that of plain bfloat16, and the root mean square of the
            last layer's output.
        """
        c = self._configuration
        first, last = (np.asarray(output, np.float32) for output in self.start())
        # As many for any T, so that one compiled function serves them all: of few tokens some are taken repeatedly.
        tokens = np.linspace(0, c.T - 1, NUM_CHECKED).round().astype(np.int32)
        x, weights, _ = self._operands
        expected, rounded = plain(np.asarray(x)[tokens], *weights[0], self._experts[0][tokens])
        rms = float(np.sqrt(np.mean(last**2)))
        return _relative_error(first[tokens], expected), _relative_error(rounded, expected), rms

    def start(self) -> tuple[Array, Array]:
        """Starts the layers; returns the outputs of the first and of the last."""
        return self._compiling.result()(*self._operands)


class Plain:
    """A layer in plain JAX for the tokens that are checked, compiled by the threads of a pool.

    Args:
        configuration: The shapes of a layer.
        weights: Those of one, for their shapes.
        pool: The threads.
    """

    def __init__(self, configuration: Configuration, weights: tuple[Array, Array], pool: ThreadPoolExecutor):
        self._num_experts = configuration.E
        # It runs a few times only; and the roundings of bfloat16, which XLA may leave out, are what it is for.
        options = {**CUBLAS_OPTIONS, **NO_AUTOTUNING, "xla_allow_excess_precision": False}
        logits = jax.ShapeDtypeStruct((NUM_CHECKED, configuration.E), jnp.float32)
        self._compiling: list[Future[jax.stages.Compiled]] = []
        for dtype in (jnp.float32, jnp.bfloat16):
            x = jax.ShapeDtypeStruct((NUM_CHECKED, configuration.D), dtype)
            lowered = jax.jit(plain_layer(configuration)).lower(x, *weights, logits)
            self._compiling.append(pool.submit(lowered.compile, compiler_options=options))

    def __call__(
        self, x: np.ndarray, w_up: Array, w_down: Array, experts: Int32[np.ndarray, "S K"]
    ) -> list[Float32[np.ndarray, "S D"]]:
        """Computes y in float32, and in bfloat16."""
        # Of equal logits softmax makes equal weights.
        logits = np.full((len(x), self._num_experts), -np.inf, np.float32)
        np.put_along_axis(logits, experts, 0, axis=1)
        exact, rounded = (compiling.result() for compiling in self._compiling)
        outputs = exact(x.astype(np.float32), w_up, w_down, logits), rounded(x, w_up, w_down, logits)
        return [np.asarray(output, np.float32) for output in outputs]


def _relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def _num_distinct(experts: Int32[np.ndarray, "T K"]) -> int:
    return len(np.unique(experts))


def _bytes_of(configuration: Configuration, num_experts: int) -> int:
    return num_experts * (configuration.weight_bytes // configuration.E)
