"""The backward of an activation whose rows are weighted."""

from pallas_kernels.activation_gradient.api import activation_gradient

__all__ = ["activation_gradient"]
