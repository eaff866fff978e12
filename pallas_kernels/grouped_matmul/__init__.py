"""Matmuls of groups of rows, each group with a matrix of its own."""

from pallas_kernels.grouped_matmul.api import grouped_matmul, grouped_weight_gradient

__all__ = ["grouped_matmul", "grouped_weight_gradient"]
