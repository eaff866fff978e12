"""The up-projection of expert MLPs: a grouped matmul with its activation."""

from pallas_kernels.up_projection.api import up_projection

__all__ = ["up_projection"]
