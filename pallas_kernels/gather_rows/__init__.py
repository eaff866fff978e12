"""Copies of rows in another order, several of each."""

from pallas_kernels.gather_rows.api import gather_rows

__all__ = ["gather_rows"]
