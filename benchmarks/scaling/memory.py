"""The deepest model of a shape that trains on one device, and on all of them."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.jax_matmuls import NO_AUTOTUNING
from benchmarks.record import Record, commit, describe_failure
from benchmarks.train_step import SETTINGS, Workload, peak_gib, planned_gib
from train.mesh import Placement, shardings_of
from train.step import TrainState, graph_of, init_state, make_train_step

_FIRST = 2, 4  # layers of the models whose plans tell what a layer takes
_ATTEMPTS = 4  # at a deeper one
_USABLE = 0.97  # of JAX's memory: there are holes between arrays, and a device that has too little keeps others waiting


class CompiledStep(NamedTuple):
    """A training step of some layers.

    Attributes:
        num_layers: Of the model.
        parameters: How many there are.
        planned_gib: What XLA plans for it on each device.
        run_twice: Does two steps; raises an ArithmeticError if the loss is not finite.
    """

    num_layers: int
    parameters: int
    planned_gib: float
    run_twice: Callable[[], None]


class DeepModel:
    """A training step of a model, whatever its number of layers.

    Args:
        workload: Whose number of layers does not count. Its layers are scanned, so that all compile equally fast.
        setting: As in `benchmarks.train_step`.
    """

    def __init__(self, workload: Workload, setting: str):
        self.workload, self._setting = dataclasses.replace(workload, scan_layers=True), setting
        self.placement = Placement(workload.mesh)

    def prepare(self, num_layers: int) -> CompiledStep:
        """Compiles the step of so many layers."""
        workload = dataclasses.replace(self.workload, num_layers=num_layers)
        with self.placement.active():
            model, optimizer, schedule = SETTINGS[self._setting](workload)
            shapes = self.placement.shapes(lambda: init_state(model, optimizer, 0))
            batch_sharding = self.placement.batch_sharding
            batch_shapes = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=batch_sharding),
                jax.eval_shape(lambda: workload.batch(model, 0)),
            )
            step = make_train_step(graph_of(model), optimizer, schedule, shardings=shardings_of(shapes))
            # Autotuning is most of compilation, and changes speed only.
            step = step.lower(shapes, batch_shapes).compile(compiler_options=dict(NO_AUTOTUNING))

        def run_twice() -> None:
            state = jax.jit(functools.partial(_waves, shapes), out_shardings=shardings_of(shapes))()
            batch = jax.jit(lambda: workload.batch(model, 0), out_shardings=batch_sharding)()
            for _ in range(2):
                state, metrics = step(state, batch)
                if not math.isfinite(loss := float(metrics["loss"])):
                    raise ArithmeticError(f"the loss of {num_layers} layers is {loss}")

        planned = planned_gib(step)
        if planned is None:
            raise RuntimeError("XLA does not say here what it plans")
        parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
        return CompiledStep(num_layers, parameters, planned, run_twice)


def measure_memory(workload: Workload, setting: str, *, limit_gib: float | None) -> Record:
    """Finds how many layers can be trained, by XLA's plans, and trains them for two steps.

    What a step takes grows by about the same with every layer, so that the plans of two models tell how many layers
    fit. Those are compiled, and their plan tells it better.

    Args:
        workload: The shape, batch and mesh.
        setting: As in `benchmarks.train_step`.
        limit_gib: What a device has; by default nearly all that JAX may take of it.
    """
    record: Record = {"setting": setting, **dataclasses.asdict(workload), "commit": commit()}
    del record["num_layers"], record["scan_layers"]
    started = time.monotonic()
    try:
        limit = record["limit_gib"] = limit_gib or _limit_gib()
        deep = DeepModel(workload, setting)
        record |= _train_deepest(deep, limit)
        record["peak_gib"] = peak_gib()
    except Exception as failure:
        record["failure"] = describe_failure(failure)
    record["seconds"] = time.monotonic() - started
    return record


def _train_deepest(deep: DeepModel, limit: float) -> Record:
    with ThreadPoolExecutor(len(_FIRST)) as pool:
        plans = {step.num_layers: step.planned_gib for step in pool.map(deep.prepare, _FIRST)}
    deepest, too_deep = None, {}  # of those that were tried
    for _ in range(_ATTEMPTS):
        guess = _fitting_layers(plans, limit)
        if too_deep:
            guess = min(guess, min(too_deep) - 1)
        if guess < 1 or (deepest and guess <= deepest.num_layers):
            break
        step = deep.prepare(guess)
        plans[guess] = step.planned_gib
        if step.planned_gib > limit:
            too_deep[guess] = f"planned {step.planned_gib:.2f} GiB"
            continue
        try:
            step.run_twice()
        except Exception as failure:
            too_deep[guess] = describe_failure(failure)
            if not too_deep[guess].startswith("out of memory"):
                raise
            continue
        deepest = step
    if deepest is None:
        raise MemoryError(f"nothing fits into {limit:.2f} GiB: plans in GiB by layers are {plans}; {too_deep}")
    return {
        "num_layers": deepest.num_layers,
        "parameters": deepest.parameters,
        "planned_gib": deepest.planned_gib,
        "plans": {str(layers): gib for layers, gib in sorted(plans.items())},
        "too_deep": {str(layers): reason for layers, reason in sorted(too_deep.items())},
    }


def _fitting_layers(plans: Mapping[int, float], limit: float) -> int:
    """Says how many layers fit, by the two models with most layers so far."""
    fewer, more = sorted(plans)[-2:]
    of_layer = (plans[more] - plans[fewer]) / (more - fewer)
    return more + math.floor((limit - plans[more]) / of_layer)


def _waves(shapes: TrainState) -> TrainState:
    """Makes a state whose arrays cost no memory beside themselves, as those of random numbers would."""

    def wave(shape: jax.ShapeDtypeStruct) -> jax.Array:
        place = sum(
            (0.7 + axis) * lax.broadcasted_iota(jnp.float32, shape.shape, axis) for axis in range(len(shape.shape))
        )
        return (0.02 * jnp.sin(jnp.asarray(place))).astype(shape.dtype)

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    return zeros._replace(params=jax.tree.map(wave, shapes.params))


def _limit_gib() -> float:
    stats = jax.devices()[0].memory_stats()
    if not stats:
        raise RuntimeError("this device does not say how much memory it has; give --memory-gib")
    return _USABLE * stats["bytes_limit"] / 2**30
