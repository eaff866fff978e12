"""Kernels for grouped matmuls on GPUs: arrays in, arrays out; nothing here knows of tokens, routers or meshes."""

from pallas_kernels.grouped_matmul import grouped_matmul, grouped_weight_gradient
from pallas_kernels.implementations import Implementation
from pallas_kernels.schedule import BlockSchedule, make_block_schedule

__all__ = [
    "BlockSchedule",
    "Implementation",
    "grouped_matmul",
    "grouped_weight_gradient",
    "make_block_schedule",
]
