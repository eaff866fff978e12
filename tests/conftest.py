"""Test set-up: run-time checks of array annotations, eight virtual CPU devices, compiled programs that all processes
share, the `gpu` marker, shared fixtures."""

import collections
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the machine: a thread pool as wide as the machine for each would only make them wait for
    # each other.
    os.environ["XLA_FLAGS"] += " --xla_cpu_multi_thread_eigen=false"
# Mosaic GPU's interpreter runs each warpgroup as a task of XLA's thread pool, where it waits for the others.
# The pool has a thread for each core unless this says otherwise; with fewer than warpgroups they would wait
# for ever.
os.environ.setdefault("NPROC", "16")
if shutil.which("nvidia-smi"):
    # The references' products are to be right, not fast, and XLA would time dozens of kernels for each.
    os.environ["XLA_FLAGS"] += " --xla_gpu_autotune_level=0"
else:
    # Most programs here run for milliseconds: optimizing them would be most of the time. On a GPU the tests are
    # to see the programs that users run.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
    # And compiling them is most of what is left, so each is compiled once by the session's processes, which are this
    # one (it goes first, and takes the folder away at its end), its workers, and the programs that tests start.
    if "PYTEST_XDIST_WORKER" not in os.environ:
        _programs = tempfile.TemporaryDirectory(prefix="jmoe-tests-programs-", ignore_cleanup_errors=True)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# JAX does not write its files in one go: who reads half of one is warned, and compiles the program itself.
os.environ["PYTHONWARNINGS"] = "ignore:Error reading persistent compilation cache entry"
# What somebody measured on this machine is not to change what the tests see.
os.environ["PALLAS_KERNELS_TUNING"] = os.devnull + ".none"

import jax
import jaxtyping
import numpy as np
import pytest

if importlib.util.find_spec("beartype"):  # a borrowed GPU machine may lack it
    jaxtyping.install_import_hook(["pallas_kernels", "jmoe", "train"], "beartype.beartype")


def _has_hopper_gpu() -> bool:
    try:
        devices = jax.devices("gpu")
    except RuntimeError:
        return False
    return devices[0].compute_capability == "9.0"


def pytest_addoption(parser):
    text = "of each test's parameter sets (of its sample, if it has one) run the first and every N-th one after it"
    parser.addoption("--thin", type=int, default=1, metavar="N", help=text)


@pytest.hookimpl(tryfirst=True)  # before tests are selected by their markers
def pytest_collection_modifyitems(config, items):
    """Marks what samples leave out as `exhaustive`; skips tests marked `gpu` where there is no Hopper GPU."""
    seen = collections.Counter()
    for item in items:
        sample = item.get_closest_marker("sample")
        step = config.getoption("thin") * (sample.args[0] if sample else 1)
        if seen[item.location[0], item.originalname] % step:
            item.add_marker("exhaustive")
        seen[item.location[0], item.originalname] += 1
    if not any(item.get_closest_marker("gpu") for item in items) or _has_hopper_gpu():
        return
    skip = pytest.mark.skip(reason="needs a Hopper GPU (compute capability 9.0)")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture
def relative_error():
    """The norm of the difference over the norm of the expected array."""

    def error(actual, expected):
        actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
        assert actual.shape == expected.shape
        norm = np.linalg.norm(expected)
        return np.linalg.norm(actual - expected) / (norm if norm else 1)

    return error


@pytest.fixture
def environment():
    """The environment of a program that runs on the CPU, and in which a warning is an error."""
    warnings = {"PYTHONWARNINGS": f"error,{os.environ['PYTHONWARNINGS']}"}  # the last one that fits counts
    return os.environ | warnings | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])}


@pytest.fixture
def without_annotation_checks():
    """Lets arguments that contradict their annotations reach the function, as they do outside the tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def h100():
    """A context that traces for an H100 of `num_sms` multiprocessors, whatever the machine has."""

    def describe(num_sms=132):
        device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=num_sms)
        return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))

    return describe


@pytest.fixture
def lower_for_cuda(h100):
    """Lowers a function of arrays of these shapes and dtypes for an H100, and returns the program's text."""

    def lower(function, *arrays):
        with h100():
            traced = jax.jit(function).trace(*(jax.ShapeDtypeStruct(*array) for array in arrays))
            return traced.lower(lowering_platforms=("cuda",)).as_text()

    return lower
