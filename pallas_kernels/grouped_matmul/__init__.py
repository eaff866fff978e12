"""Matmuls of groups of rows, each group with a matrix of its own."""

from pallas_kernels.grouped_matmul.api import Implementation, grouped_matmul, grouped_weight_gradient

__all__ = ["Implementation", "grouped_matmul", "grouped_weight_gradient"]
