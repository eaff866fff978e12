"""Block-sparse matrices and their products with dense ones."""

from pallas_kernels.block_sparse.api import dds, dsd, sdd
from pallas_kernels.block_sparse.matrix import BlockSparseMatrix
from pallas_kernels.block_sparse.topology import Topology, expert_topology

__all__ = ["BlockSparseMatrix", "Topology", "dds", "dsd", "expert_topology", "sdd"]
