"""Weighted sums of rows chosen by number."""

from pallas_kernels.combine.api import combine

__all__ = ["combine"]
