"""Test set-up: run-time checking of the array annotations, eight virtual CPU devices, and the `gpu` marker."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the machine: one thread pool each as wide as the machine would only make them wait for each other.
    os.environ["XLA_FLAGS"] += " --xla_cpu_multi_thread_eigen=false"

import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook(["pallas_kernels", "jmoe", "train"], "beartype.beartype")


def _has_hopper_gpu() -> bool:
    try:
        devices = jax.devices("gpu")
    except RuntimeError:
        return False
    return devices[0].compute_capability == "9.0"


def pytest_collection_modifyitems(items):
    """Skips tests marked `gpu` where there is no Hopper GPU."""
    if not any(item.get_closest_marker("gpu") for item in items) or _has_hopper_gpu():
        return
    skip = pytest.mark.skip(reason="needs a Hopper GPU (compute capability 9.0)")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
