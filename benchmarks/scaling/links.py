"""How fast collectives move bytes between the devices of this host."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from benchmarks.record import Record, commit, describe_failure
from benchmarks.scaling.layer import mesh_of_all
from benchmarks.timing import Variant, summarize, time_in_rounds

_ROW = 1024  # elements of bfloat16


class Collective(NamedTuple):
    """A collective over n devices, of m rows on each.

    Attributes:
        run: What a device does with its rows [m, row].
        expected: The same of the rows of all devices, [n, m, row], as [n, ..., row].
        sent: Rows that each device sends, of n and m.
    """

    run: Callable[[Array], Array]
    expected: Callable[[np.ndarray], np.ndarray]
    sent: Callable[[int, int], float]


def _to_next(rows: Array) -> Array:
    n = lax.axis_size("expert")
    return lax.ppermute(rows, "expert", [(i, (i + 1) % n) for i in range(n)])


def _blocks(rows: np.ndarray) -> np.ndarray:
    """[from, to, rows of one pair, row]."""
    return rows.reshape(len(rows), len(rows), -1, rows.shape[-1])


COLLECTIVES: Mapping[str, Collective] = {
    "all_gather": Collective(
        lambda rows: lax.all_gather(rows, "expert", tiled=True),
        lambda rows: np.stack([rows.reshape(-1, rows.shape[-1])] * len(rows)),
        lambda n, m: (n - 1) * m,
    ),
    "psum_scatter": Collective(
        lambda rows: lax.psum_scatter(rows, "expert", tiled=True),
        lambda rows: _blocks(rows).sum(axis=0),
        lambda n, m: (n - 1) * m / n,
    ),
    "all_to_all": Collective(
        lambda rows: lax.all_to_all(rows, "expert", 0, 0, tiled=True),
        lambda rows: _blocks(rows).swapaxes(0, 1).reshape(rows.shape),
        lambda n, m: (n - 1) * m / n,
    ),
    "ppermute": Collective(_to_next, lambda rows: np.roll(rows, 1, axis=0), lambda _, m: m),
    "psum": Collective(
        lambda rows: lax.psum(rows, "expert"),
        lambda rows: np.stack([rows.sum(axis=0)] * len(rows)),
        lambda n, m: 2 * (n - 1) * m / n,
    ),
}


def default_mib(platform: str) -> list[float]:
    """The sizes of each device's array that are measured if no others are asked for."""
    return [0.0625, 1, 16, 128] if platform == "gpu" else [0.0625]


def measure_links(*, rounds: int, seed: int) -> list[Record]:
    """Times every collective, and checks what it does to the smallest array; returns the records."""
    mesh, n = mesh_of_all(), jax.device_count()
    split = NamedSharding(mesh, PartitionSpec("expert"))
    records: dict[tuple[str, float], Record] = {}
    variants: dict[tuple[str, float], Variant] = {}
    for mib in default_mib(jax.default_backend()):
        m = int(mib * 2**20) // (2 * _ROW)
        m -= m % n
        rows = jax.jit(functools.partial(_draw, n * m), out_shardings=split)()
        for name, collective in COLLECTIVES.items():
            key = name, mib
            bytes_sent = int(2 * _ROW * collective.sent(n, m))
            records[key] = {"collective": name, "mib": mib, "bytes_sent": bytes_sent}
            records[key] |= {"num_devices": n, "commit": commit()}
            try:
                run = jax.shard_map(
                    collective.run, mesh=mesh, in_specs=split.spec, out_specs=split.spec, check_vma=False
                )
                run = jax.jit(run).lower(rows).compile()
                if mib == min(default_mib(jax.default_backend())):
                    _check(collective, rows, run(rows), n)
                variants[key] = Variant(functools.partial(run, rows), jax.block_until_ready)
            except Exception as failure:
                records[key]["failure"] = describe_failure(failure)
    jax.block_until_ready([variant.run() for variant in variants.values()])
    seconds, failures = time_in_rounds(variants, rounds=rounds, seed=seed)
    for key, failure in failures.items():
        records[key]["failure"] = failure
    for key, of_rounds in seconds.items():
        timings = summarize(of_rounds, 0)
        del timings["tflops"]
        records[key] |= timings
        records[key]["gb_per_s"] = records[key]["bytes_sent"] / timings["ms_median"] / 1e6
    return list(records.values())


def _draw(num_rows: int) -> Array:
    """Small integers, whose sums over up to 8 devices bfloat16 has exactly; other ones in each device's rows."""
    return (lax.iota(jnp.int32, num_rows)[:, None] * 7 % 29 + lax.iota(jnp.int32, _ROW) % 3).astype(jnp.bfloat16)


def _check(collective: Collective, rows: Array, actual: Any, n: int) -> None:
    of_devices = np.asarray(rows, np.float32).reshape(n, -1, _ROW)
    expected = collective.expected(of_devices).reshape(-1, _ROW)
    if not np.array_equal(np.asarray(actual, np.float32), expected):
        raise ArithmeticError("the devices got other rows than they were sent")
