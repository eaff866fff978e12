"""The MoE layers that are measured, their routings, and how a result is judged: the same for every framework."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, get_args

import numpy as np
from jaxtyping import Bool, Float, Float32, Int32

from benchmarks.record import Record, commit, describe_failure
from benchmarks.timing import Variant, summarize, time_in_rounds

RoutingName = Literal["random", "balanced", "zipf"]
ROUTINGS: tuple[RoutingName, ...] = get_args(RoutingName)

RESULTS = ("y", "y_with_backward", "x", "w_up", "w_down", "logits")
"""What is compared: y of the forward alone, y of forward and backward, and the gradients."""

ERROR_FACTOR, ERROR_SLACK = 1.2, 5e-4
"""A relative error may be that of plain bfloat16 times the factor, plus the slack."""
PEER_TOLERANCE = 2e-2
"""The relative error that is allowed to a peer, whose choices of what to round are its own."""

_NUM_SAMPLED = 512
_PREFERENCE = 20.0  # added to the logits of chosen experts: no normal value comes near it


@dataclasses.dataclass(frozen=True)
class Configuration:
    """An MoE layer in bfloat16: T tokens of width D, E experts of hidden width F, K of them for each token."""

    name: str
    T: int
    D: int
    F: int
    E: int
    K: int
    activation: Literal["swiglu", "gelu"] = "swiglu"

    @property
    def num_rows(self) -> int:
        """Routed rows, R."""
        return self.T * self.K

    @property
    def up_columns(self) -> int:
        """Columns of the up-projection."""
        return 2 * self.F if self.activation == "swiglu" else self.F

    @property
    def up_bytes(self) -> int:
        """Bytes of the up-projection's weights."""
        return 2 * self.E * self.D * self.up_columns

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.up_bytes + 2 * self.E * self.F * self.D

    @property
    def up_flops(self) -> int:
        """Floating-point operations of the up-projection."""
        return 2 * self.num_rows * self.D * self.up_columns

    def flops(self, operation: str) -> int:
        """Floating-point operations of the layer's matmuls: "forward", "backward" or "both"."""
        forward = self.up_flops + 2 * self.num_rows * self.F * self.D
        return {"forward": 1, "backward": 2, "both": 3}[operation] * forward


EXPERT_SWEEP = {
    configuration.name: configuration
    for configuration in (Configuration(f"E{E}", 32_768, 2048, 1024, E, 8) for E in (8, 16, 32, 64, 128, 256, 512))
}
"""The same operations, spread over ever more experts."""

CONFIGURATIONS = {
    configuration.name: configuration
    for configuration in (
        Configuration("olmoe", 32_768, 2048, 1024, 64, 8),
        Configuration("qwen3", 32_768, 2048, 768, 128, 8),
        Configuration("mixtral", 8192, 4096, 14_336, 8, 2),
        Configuration("7B_n256", 24_576, 1536, 256, 128, 8),
        Configuration("30B_n512", 32_768, 4096, 512, 128, 8),
        Configuration("120B_n2048", 32_768, 4096, 2048, 64, 4),
        Configuration("dMoE-XS", 65_536, 512, 2048, 64, 1, "gelu"),
        Configuration("dMoE-Small", 32_768, 768, 3072, 64, 1, "gelu"),
        Configuration("dMoE-Medium", 8192, 1024, 4096, 64, 1, "gelu"),
        *EXPERT_SWEEP.values(),
        Configuration("tiny", 256, 64, 64, 8, 2),
        Configuration("tiny-gelu", 256, 64, 128, 8, 1, "gelu"),
    )
}
_ELSEWHERE = ("tiny", "tiny-gelu")


def default_names(platform: str) -> list[str]:
    """What is measured if nothing else is asked for, on JAX's platform: "gpu" or another."""
    names = [name for name in CONFIGURATIONS if name not in EXPERT_SWEEP]
    return [name for name in names if (name in _ELSEWHERE) == (platform != "gpu")]


class Layer(Protocol):
    """One implementation of a configuration, with its operands on the device."""

    def route(self, logits: Float32[np.ndarray, "T E"]) -> None:
        """Takes the router's logits, for what follows."""
        ...

    def check(self) -> tuple[dict[str, float], dict[str, float] | None]:
        """Computes relative errors against float32, and those of a plain bfloat16 computation if there is one."""
        ...

    def facts(self) -> Record:
        """Tells what else belongs into the record: memory, versions, backends."""
        ...

    def variants(self) -> Mapping[str, Variant]:
        """What to time: "forward", "both", and "dense": one matmul of as many operations as the up-projection.

        And "copy" of the up-projection's weights, if the layer has it.
        """
        ...


def measure(
    layer: Layer,
    configuration: Configuration,
    routing: RoutingName,
    *,
    implementation: str,
    rounds: int,
    seed: int,
) -> Record:
    """Checks a layer under a routing, then times it; returns its record, with timings or what failed."""
    record = describe(configuration, implementation) | {"routing": routing}
    try:
        logits = draw_logits(configuration, routing, seed)
        sizes = group_sizes(configuration, logits)
        record |= {"largest_group": int(sizes.max()), "smallest_group": int(sizes.min())}
        layer.route(logits)
        errors, plain_errors = layer.check()
        record["relative_error"] = {name: _finite(error) for name, error in errors.items()}
        if plain_errors:
            record["plain_relative_error"] = {name: _finite(error) for name, error in plain_errors.items()}
        record |= layer.facts()
        judge(errors, plain_errors)
        seconds, failures = time_in_rounds(layer.variants(), rounds=rounds, seed=seed)
        if failures:
            raise RuntimeError("; ".join(f"{name}: {failure}" for name, failure in failures.items()))
        record |= summarize_layer(seconds, configuration)
    except Exception as failure:
        record["failure"] = describe_failure(failure)
    return record


def describe(configuration: Configuration, implementation: str) -> Record:
    """Starts the record of a measurement."""
    shape = dataclasses.asdict(configuration)
    name = {"configuration": shape.pop("name")}
    return {**name, **shape, "implementation": implementation, "commit": commit()}


def judge(errors: Mapping[str, float], plain_errors: Mapping[str, float] | None) -> None:
    """Raises an ArithmeticError if an error is more than rounding explains."""
    for name, error in errors.items():
        limit = ERROR_FACTOR * plain_errors[name] + ERROR_SLACK if plain_errors else PEER_TOLERANCE
        if not error <= limit:  # also where it is NaN
            raise ArithmeticError(f"relative error {error:.2g} of {name}, more than {limit:.2g}")


def summarize_layer(seconds: Mapping[str, Sequence[float]], configuration: Configuration) -> Record:
    """Summarises the timings of "forward", "both" and "dense", and those of the backward as a difference.

    `ratio` is the TFLOP/s of each over that of the dense matmul, which was timed in the same rounds. A timing of
    "copy" gives the rate at which the device copies: bytes read and written in a second.
    """
    timings = dict(seconds)
    copies = timings.pop("copy", None)
    timings["backward"] = [both - forward for both, forward in zip(seconds["both"], seconds["forward"], strict=True)]
    dense = summarize(list(timings.pop("dense")), configuration.up_flops)
    summary: Record = {"dense": dense}
    for operation in ("forward", "backward", "both"):
        part = summarize(list(timings[operation]), configuration.flops(operation))
        summary[operation] = part | {"ratio": part["tflops"] / dense["tflops"]}
    if copies:
        summary["copy_gb_per_s"] = 2 * configuration.up_bytes / statistics.median(copies) / 1e9
    return summary


def draw_logits(configuration: Configuration, routing: RoutingName, seed: int) -> Float32[np.ndarray, "T E"]:
    """Draws the logits of a router.

    "random": independent normal values. "balanced": as "random", but each expert gets R / E assignments (give or
    take K where E does not divide T). "zipf": as "random", but the assignments of the expert of rank r are about
    in proportion to 1 / r; since a token goes to an expert once at most, experts that this would give more than T
    assignments get T, and the others the rest. Which expert has which rank is random.
    """
    draw = np.random.default_rng(seed)
    logits = draw.standard_normal((configuration.T, configuration.E), np.float32)
    if routing == "balanced":
        logits += _PREFERENCE * _choose_evenly(configuration, draw)
    elif routing == "zipf":
        rank = draw.permutation(configuration.E) + 1
        logits += _PREFERENCE * _choose_by_share(configuration, inclusion(1 / rank, configuration.K), draw)
    return logits


def inclusion(popularity: Float[np.ndarray, " E"], num_chosen: int) -> Float[np.ndarray, " E"]:
    """How probable each expert is among those chosen: in proportion to its popularity, but 1 at most."""
    descending = np.sort(popularity)[::-1]
    always, factor = 0, num_chosen / descending.sum()
    while factor * descending[always] > 1 and always < num_chosen - 1:
        always += 1  # one more that is always chosen; the others share the rest
        factor = (num_chosen - always) / descending[always:].sum()
    return np.minimum(1, factor * popularity)


def group_sizes(configuration: Configuration, logits: Float32[np.ndarray, "T E"]) -> Int32[np.ndarray, " E"]:
    """Counts the assignments of each expert."""
    E, K = configuration.E, configuration.K
    chosen = np.argpartition(logits, E - K, axis=1)[:, E - K :]
    return np.bincount(chosen.ravel(), minlength=E).astype(np.int32)


def sample_tokens(configuration: Configuration) -> Int32[np.ndarray, " S"]:
    """The tokens whose results are compared, the first and the last among them."""
    count = min(_NUM_SAMPLED, configuration.T)
    return np.linspace(0, configuration.T - 1, count).astype(np.int32)


def _choose_evenly(configuration: Configuration, draw: np.random.Generator) -> Bool[np.ndarray, "T E"]:
    """Puts the experts on a circle, in another order for each E tokens, which take K neighbours each."""
    T, E, K = configuration.T, configuration.E, configuration.K
    circles = draw.permuted(np.tile(np.arange(E), (math.ceil(T / E), 1)), axis=1)
    token = np.arange(T)[:, None]
    chosen = np.zeros((T, E), bool)
    chosen[token, circles[token // E, (token + np.arange(K)) % E]] = True
    return chosen


def _choose_by_share(
    configuration: Configuration, share: Float[np.ndarray, " E"], draw: np.random.Generator
) -> Bool[np.ndarray, "T E"]:
    """Draws K different experts for each token, each with its probability (systematic sampling).

    A token lays the experts end to end, each as long as its probability, in random order. Of points at distance 1
    from each other K lie on that line, and none of the experts is long enough to hold two.
    """
    T, E, K = configuration.T, configuration.E, configuration.K
    order = draw.permuted(np.tile(np.arange(E), (T, 1)), axis=1)
    bounds = np.concatenate([np.zeros((T, 1)), share[order].cumsum(axis=1)], axis=1)
    bounds[:, -1] = K  # but for rounding it is
    points_before = np.ceil(bounds - draw.random((T, 1)))
    chosen = np.zeros((T, E), bool)
    np.put_along_axis(chosen, order, np.diff(points_before, axis=1) > 0, axis=1)
    return chosen


def _finite(error: float) -> float | None:
    """JSON knows no NaN."""
    return error if math.isfinite(error) else None
