"""Layers with their experts split over devices, beside the same layer with as many tokens on one device."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

import jmoe
from benchmarks.jax_layers import LayerFunction, jmoe_layer
from benchmarks.jax_matmuls import kernel_implementation
from benchmarks.layers import CONFIGURATIONS, RESULTS, Configuration, RoutingName, draw_logits, judge
from benchmarks.record import Record, commit, describe_failure
from benchmarks.scaling.ragged import ragged_layer, rows_received
from benchmarks.timing import Variant, summarize, time_in_rounds
from jmoe.exchanges import ExchangeName, choose_exchange

EXCHANGES = tuple(name for name in get_args(ExchangeName) if name != "auto")
ONE_DEVICE = "one device"
RAGGED = "ragged_all_to_all"

_OPERATIONS = "forward", "both"


class Placement(NamedTuple):
    """Where the experts of a layer are.

    Attributes:
        name: In the record.
        order: The expert that stands at each place: the first E/n on the first device, and so on.
        fullest: The assignments of the fullest device over the mean.
        exchanges: What is measured with it.
        options: Of `jmoe.moe_mlp`.
    """

    name: str
    order: np.ndarray
    fullest: float
    exchanges: tuple[str, ...]
    options: Mapping[str, Any] = {}


def placements(expert_load: np.ndarray, num_devices: int, auto: str) -> list[Placement]:
    """Makes the placements that are measured: contiguous experts, and plans from the load. Only this knows of them.

    Args:
        expert_load: [E], the assignments of each expert.
        num_devices: n.
        auto: The exchange that "auto" takes; plans are measured with it.
    """
    of_devices = expert_load.reshape(num_devices, -1).sum(axis=1)
    fullest = float(of_devices.max() / of_devices.mean())
    # XLA's CPU has no ragged_all_to_all.
    exchanges = (*EXCHANGES, RAGGED) if jax.default_backend() == "gpu" else EXCHANGES
    found = [Placement("contiguous", np.arange(len(expert_load)), fullest, exchanges)]
    for replicas in (0, 1):
        plan = jmoe.plan_placement(expert_load, num_devices, replicas=replicas)
        name = "planned, with replicas" if plan.num_replicas else "planned"
        if name not in [placement.name for placement in found]:
            fullest = 1 / plan.balance(expert_load)
            found.append(Placement(name, np.array(plan.order), fullest, (auto,), {"expert_placement": plan}))
    return found


@functools.cache
def mesh_of_all() -> jax.sharding.Mesh:
    """All devices along one axis "expert"."""
    return jax.make_mesh((jax.device_count(),), ("expert",), axis_types=(AxisType.Auto,))


def exchanged_layer(configuration: Configuration, exchange: ExchangeName, options: Mapping[str, Any]) -> LayerFunction:
    """This project's layer, of the tokens and experts of all devices, with more options of `jmoe.moe_mlp`."""

    def layer(x: Array, w_up: Array, w_down: Array, logits: Array) -> Array:
        route = jax.shard_map(
            lambda logits: jmoe.route_top_k(logits, configuration.K),
            in_specs=PartitionSpec("expert"),
            out_specs=PartitionSpec("expert"),
            check_vma=False,
        )
        return jmoe.moe_mlp(
            x,
            w_up,
            w_down,
            route(logits),
            activation=configuration.activation,
            implementation=kernel_implementation(),
            exchange=exchange,
            **options,
        )

    return layer


def sharded_ragged_layer(configuration: Configuration, max_rows: int, **options: Any) -> LayerFunction:
    """`ragged_layer` of the tokens and experts of all devices."""
    spec = PartitionSpec("expert")
    return jax.shard_map(
        ragged_layer(configuration, max_rows, **options), in_specs=spec, out_specs=spec, check_vma=False
    )


class ScaledLayer:
    """A configuration, T tokens for each device, with its operands and compiled functions.

    Args:
        configuration: The shapes.
        seed: Of the operands.
    """

    def __init__(self, configuration: Configuration, seed: int):
        self.configuration = configuration
        self.num_devices = jax.device_count()
        self._split = NamedSharding(mesh_of_all(), PartitionSpec("expert"))
        self._one = jax.devices()[0]
        c, n = configuration, self.num_devices
        shapes = {
            "x": (n * c.T, c.D),
            "w_up": (c.E, c.D, c.up_columns),
            "w_down": (c.E, c.F, c.D),
            "dy": (n * c.T, c.D),
        }
        scales = {"w_up": c.D**-0.5, "w_down": c.F**-0.5}

        def draw(seed: Array) -> dict[str, Array]:
            keys = jax.random.split(jax.random.key(seed), len(shapes))
            return {
                name: jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(scales.get(name, 1))
                for key, (name, shape) in zip(keys, shapes.items(), strict=True)
            }

        self._operands = jax.jit(draw, out_shardings=self._split)(jnp.int32(seed))
        self._whole = [jax.device_put(self._operands.pop(name), self._one) for name in ("w_up", "w_down")]
        self._compiling: dict[tuple[str, str], dict[str, Future[jax.stages.Compiled]]] = {}
        self._compile({(ONE_DEVICE, ""): jmoe_layer(configuration)})

    def compile(self, placement: Placement, *, max_rows: int) -> None:
        """Compiles forward, and forward with backward, with each exchange of a placement.

        Args:
            placement: Where the experts are.
            max_rows: What the baseline has room for.
        """
        layers = {}
        for name in placement.exchanges:
            key = name, placement.name
            if name == RAGGED:
                layers[key] = sharded_ragged_layer(self.configuration, max_rows)
            elif placement.options or key not in self._compiling:
                layers[key] = exchanged_layer(self.configuration, name, placement.options)  # pyright: ignore[reportArgumentType]
        self._compile(layers)

    def peak_mib(self, key: tuple[str, str]) -> float | None:
        """What XLA plans for forward and backward on each device, beside operands and results."""
        plan = self._compiling[key]["both"].result().memory_analysis()
        return plan and plan.temp_size_in_bytes / 2**20

    def operands(self, logits: np.ndarray, order: np.ndarray | None) -> tuple[Array, ...]:
        """Returns x, w_up, w_down, logits and dy as they lie for a placement; None: the first T tokens, on one device.

        Args:
            logits: [n * T, E].
            order: As in `Placement`.
        """
        x, dy = self._operands["x"], self._operands["dy"]
        if order is None:
            return self._share(x, 0), *self._whole, self._share(logits, 0), self._share(dy, 0)
        weights = [jax.device_put(weight[order], self._split) for weight in self._whole]
        return x, *weights, jax.device_put(logits, self._split), dy

    def calls(self, key: tuple[str, str], operands: tuple[Array, ...]) -> dict[str, Callable[[], Any]]:
        """Returns what runs each operation with an exchange and a placement, or on one device.

        Raises what compiling it raised.
        """
        forward, both = (self._compiling[key][operation].result() for operation in _OPERATIONS)
        return {"forward": functools.partial(forward, *operands[:-1]), "both": functools.partial(both, *operands)}

    def expected(self, logits: np.ndarray) -> list[Array]:
        """Computes on one device, T tokens at a time, y and the gradients of x, w_up, w_down and the logits."""
        both = self._compiling[ONE_DEVICE, ""]["both"].result()
        of_tokens, of_weights = [], []
        for share in range(self.num_devices):
            x, dy, part = (self._share(array, share) for array in (self._operands["x"], self._operands["dy"], logits))
            y, dx, *dweights, dlogits = both(x, *self._whole, part, dy)
            of_tokens.append((y, dx, dlogits))
            of_weights.append([dweight.astype(jnp.float32) for dweight in dweights])
        y, dx, dlogits = (jnp.concatenate(parts) for parts in zip(*of_tokens, strict=True))
        dweights = [functools.reduce(jnp.add, parts) for parts in zip(*of_weights, strict=True)]
        return [y, dx, *dweights, dlogits]

    def errors(
        self, key: tuple[str, str], operands: tuple[Array, ...], order: np.ndarray, expected: list[Array]
    ) -> Record:
        """Compares what is computed with an exchange and a placement with what one device computes."""
        calls = self.calls(key, operands)
        y, y_both, dx, dw_up, dw_down, dlogits = jax.device_put((calls["forward"](), *calls["both"]()), self._one)
        back = np.argsort(order)
        actual = y, y_both, dx, dw_up[back], dw_down[back], dlogits
        pairs = zip(actual, [expected[0], *expected], strict=True)
        return {part: float(_relative_error(*pair)) for part, pair in zip(RESULTS, pairs, strict=True)}

    def _share(self, array: Any, share: int) -> Array:
        T = self.configuration.T
        return jax.device_put(array[share * T : (share + 1) * T], self._one)

    def _compile(self, layers: Mapping[tuple[str, str], LayerFunction]) -> None:
        with ThreadPoolExecutor(8) as pool:
            for key, layer in layers.items():
                programs = {name: functools.partial(self._program, layer, name, key) for name in _OPERATIONS}
                self._compiling[key] = {name: pool.submit(program) for name, program in programs.items()}

    def _program(self, layer: LayerFunction, operation: str, key: tuple[str, str]) -> jax.stages.Compiled:
        c, split = self.configuration, key[0] != ONE_DEVICE
        sharding = self._split if split else jax.sharding.SingleDeviceSharding(self._one)
        num_tokens = c.T * (self.num_devices if split else 1)
        x = jax.ShapeDtypeStruct((num_tokens, c.D), jnp.bfloat16, sharding=sharding)
        w_up, w_down = (jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=sharding) for w in self._whole)
        logits = jax.ShapeDtypeStruct((num_tokens, c.E), jnp.float32, sharding=sharding)

        def both(*operands: Array) -> tuple[Array, ...]:
            *inputs, dy = operands
            y, pull_back = jax.vjp(layer, *inputs)
            return y, *pull_back(dy)

        function, operands = {
            "forward": (layer, (x, w_up, w_down, logits)),
            "both": (both, (x, w_up, w_down, logits, x)),
        }[operation]
        if not split:
            return jax.jit(function).lower(*operands).compile()
        with jax.set_mesh(mesh_of_all()):
            lowered = jax.jit(function, out_shardings=sharding).lower(*operands)
        return lowered.compile()


@functools.cache
def _prepared(name: str, seed: int) -> ScaledLayer:
    """Keeps a layer, with what it has compiled, for the other routings."""
    return ScaledLayer(CONFIGURATIONS[name], seed)


def measure_layer(name: str, routing: RoutingName, *, rounds: int, seed: int) -> list[Record]:
    """Measures a configuration on one device and, with each exchange, on all devices; returns the records."""
    configuration = CONFIGURATIONS[name]
    layer = _prepared(name, seed)
    n = layer.num_devices
    logits = draw_logits(dataclasses.replace(configuration, T=n * configuration.T), routing, seed)
    expert_index = np.argpartition(logits, -configuration.K, axis=1)[:, -configuration.K :]
    load = np.bincount(expert_index.ravel(), minlength=configuration.E)
    auto = choose_exchange(n, configuration.K, 2 * configuration.T * configuration.D)
    shape = {key: getattr(configuration, key) for key in "TDFEK"}
    common: Record = {"configuration": name, **shape, "routing": routing, "num_devices": n, "commit": commit()}
    one = ONE_DEVICE, ""
    records: dict[tuple[str, str], Record] = {one: common | {"exchange": ONE_DEVICE}}
    variants = {(*one, operation): call for operation, call in layer.calls(one, layer.operands(logits, None)).items()}
    expected = layer.expected(logits)
    for placement in placements(load, n, auto):
        layer.compile(placement, max_rows=rows_received(expert_index, configuration.E, n))
        operands = layer.operands(logits, placement.order)
        for exchange in placement.exchanges:
            key = exchange, placement.name
            record = records[key] = common | {
                "exchange": exchange,
                "auto": exchange == auto,
                "placement": placement.name,
                "fullest_device": placement.fullest,
            }
            try:
                errors = layer.errors(key, operands, placement.order, expected)
                record |= {"relative_error": errors, "peak_mib": layer.peak_mib(key)}
                judge(errors, None)
                variants |= {(*key, operation): call for operation, call in layer.calls(key, operands).items()}
            except Exception as failure:
                record["failure"] = describe_failure(failure)
    del expected

    timed = {key: Variant(call, jax.block_until_ready) for key, call in variants.items()}
    jax.block_until_ready([call() for call in variants.values()])
    seconds, failures = time_in_rounds(timed, rounds=rounds, seed=seed)
    for (exchange, placement, operation), failure in failures.items():
        records[exchange, placement].setdefault("failure", f"{operation}: {failure}")
    for (exchange, placement, operation), of_rounds in seconds.items():
        record = records[exchange, placement]
        record[operation] = summarize(of_rounds, configuration.flops(operation))
        alone = seconds.get((*one, operation))
        if exchange != ONE_DEVICE and alone:
            record[operation]["of_one_device"] = float(np.median(alone) / np.median(of_rounds))
    return list(records.values())


@jax.jit
def _relative_error(actual: Array, expected: Array) -> Array:
    difference = actual.astype(jnp.float32) - expected.astype(jnp.float32)
    return jnp.linalg.norm(difference.ravel()) / jnp.linalg.norm(expected.astype(jnp.float32).ravel())
