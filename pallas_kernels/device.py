"""What the kernels need to know of the device that they are traced for."""

import jax


def _device():
    # An abstract device lets a machine without a GPU trace and lower for one.
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return abstract
    default = jax.config.jax_default_device
    return default if isinstance(default, jax.Device) else jax.local_devices(backend=default)[0]


def has_hopper_gpu() -> bool:
    """Says whether computations run by default on an NVIDIA GPU of compute capability 9.0 (H100, H200, GH200)."""
    device = _device()
    if device.platform not in ("gpu", "cuda"):
        return False
    capability = getattr(device, "compute_capability", None)
    return capability == "9.0" if capability else any(name in device.device_kind for name in ("H100", "H200"))


def device_kind() -> str:
    """Returns the name of the device that computations run on by default, such as "NVIDIA H100 80GB HBM3"."""
    return _device().device_kind


def num_sms() -> int:
    """Returns the number of streaming multiprocessors of the GPU that computations run on by default."""
    device = _device()
    count = device.num_cores if isinstance(device, jax.sharding.AbstractDevice) else device.core_count
    if count is None:
        raise ValueError(f"the device {device} does not say how many multiprocessors it has.")
    return count
