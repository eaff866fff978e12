"""Kernels for grouped matmuls on GPUs and what goes around them: arrays in, arrays out.

Nothing here knows of tokens, routers or meshes.
"""

from pallas_kernels import block_sparse
from pallas_kernels.activation_gradient import activation_gradient
from pallas_kernels.combine import combine
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_weight_gradient
from pallas_kernels.implementations import Implementation
from pallas_kernels.schedule import BlockSchedule, make_block_schedule
from pallas_kernels.top_k import top_k

__all__ = [
    "BlockSchedule",
    "Implementation",
    "activation_gradient",
    "block_sparse",
    "combine",
    "grouped_matmul",
    "grouped_weight_gradient",
    "make_block_schedule",
    "top_k",
]
