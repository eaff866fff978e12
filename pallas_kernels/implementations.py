"""The choice among the implementations of an operation."""

import logging
from typing import Literal, get_args

from pallas_kernels.device import has_hopper_gpu

Implementation = Literal["mosaic_gpu", "xla", "reference"]

_logger = logging.getLogger("pallas_kernels")
_logged_reasons: set[str] = set()


def choose_implementation(operation: str, asked: Implementation | None, why_unsupported: str | None) -> Implementation:
    """Chooses what runs: the one asked for, or else the fastest that can run here.

    Args:
        operation: its public name, for messages.
        asked: an implementation, or None.
        why_unsupported: which constraint of the Hopper kernel the operands break, if any.

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
    if why_unsupported is None:
        return "mosaic_gpu"
    if asked is None:
        # Once, not for each matmul of a gradient and each layer of a model.
        if why_unsupported not in _logged_reasons:
            _logged_reasons.add(why_unsupported)
            _logger.warning("%s runs on XLA, not on its Hopper kernel: %s", operation, why_unsupported)
        return "xla"
    raise ValueError(f'implementation "mosaic_gpu" cannot run this {operation}: {why_unsupported}')
