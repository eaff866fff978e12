"""The k largest entries of each row."""

from pallas_kernels.top_k.api import top_k

__all__ = ["top_k"]
