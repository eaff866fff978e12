"""The choice among the implementations of an operation."""

import logging
from typing import Literal, get_args

import jax

from pallas_kernels import hopper
from pallas_kernels.device import has_hopper_gpu

Implementation = Literal["mosaic_gpu", "xla", "reference"]

_logger = logging.getLogger("pallas_kernels")
_logged_reasons: set[str] = set()


def choose_implementation(
    operation: str,
    asked: Implementation | None,
    widths: tuple[int, ...],
    dtype: jax.typing.DTypeLike,
    out_dtype: jax.typing.DTypeLike,
    *,
    obstacle: str | None = None,
) -> Implementation:
    """Chooses what runs: the one asked for, or else the fastest that can run here.

    Args:
        operation: its public name, for messages.
        asked: an implementation, or None.
        widths: every matrix width among the operands.
        dtype: of the operands.
        out_dtype: of the result.
        obstacle: what else keeps the operation from its Hopper kernel, if anything does.

    Raises:
        ValueError: there is no such implementation, or it cannot run here, with the reason.
    """
    if asked is not None and asked not in get_args(Implementation):
        names = ", ".join(map(repr, get_args(Implementation)))
        raise ValueError(f"implementation is {asked!r}; it must be None or one of {names}.")
    if asked in ("xla", "reference"):
        return asked
    if not has_hopper_gpu():
        if asked is None:
            return "xla"
        raise ValueError('implementation "mosaic_gpu" needs a Hopper GPU; None picks what can run here.')
    reason = hopper.why_unsupported(widths, dtype, out_dtype) or obstacle
    if reason is None:
        return "mosaic_gpu"
    if asked is None:
        # Once, not for each matmul of a gradient and each layer of a model.
        if reason not in _logged_reasons:
            _logged_reasons.add(reason)
            _logger.warning("%s runs on XLA, not on its Hopper kernel: %s", operation, reason)
        return "xla"
    raise ValueError(f'implementation "mosaic_gpu" cannot run this {operation}: {reason}')
