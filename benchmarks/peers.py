"""Figures of other MoE layers, measured once by this project, beside which reports and plots show its own.

One H100 80GB HBM3, bfloat16, random routing; PyTorch 2.11 with CUDA 13.0, Triton 3.6, JAX 0.11.2. The router is not
timed except in SonicMoE. They come from other machines of that kind than the results do, so compare them roughly.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Tflops(NamedTuple):
    """TFLOP/s of a layer; None where only the others were measured."""

    forward: float
    backward: float | None
    both: float


class Mib(NamedTuple):
    """What a layer keeps from forward to backward, and its peak above inputs and parameters, in MiB."""

    kept: float
    peak: float


DEVICE = "NVIDIA H100 80GB HBM3"

LAYERS: Mapping[str, Mapping[str, Tflops]] = {
    # The paper's code; for mixtral the release 0.1.2 on the package index.
    "SonicMoE": {
        "olmoe": Tflops(558, 521, 533),
        "qwen3": Tflops(513, 509, 510),
        "mixtral": Tflops(564, 572, 569),
        "7B_n256": Tflops(285, 455, 380),
        "30B_n512": Tflops(501, 527, 518),
    },
    # On PyTorch's grouped_mm.
    "MegaBlocks, grouped": {
        "olmoe": Tflops(410, 434, 426),
        "qwen3": Tflops(366, 379, 375),
        "mixtral": Tflops(568, 595, 586),
        "7B_n256": Tflops(177, 206, 195),
        "30B_n512": Tflops(336, 344, 341),
        "120B_n2048": Tflops(491, 530, 516),
        "dMoE-XS": Tflops(250, 364, 316),
        "dMoE-Small": Tflops(266, 322, 301),
        "dMoE-Medium": Tflops(152, 168, 162),
    },
    "MegaBlocks, block-sparse": {
        "olmoe": Tflops(316, 320, 318),
        "qwen3": Tflops(283, 282, 282),
        "mixtral": Tflops(292, 355, 331),
        "7B_n256": Tflops(143, 161, 155),
        "30B_n512": Tflops(254, 260, 258),
        "120B_n2048": Tflops(369, 367, 368),
        "dMoE-XS": Tflops(145, 225, 190),
        "dMoE-Small": Tflops(125, 272, 195),
        "dMoE-Medium": Tflops(63, 149, 102),
    },
    "ScatterMoE": {
        "olmoe": Tflops(334, 335, 334),
        "qwen3": Tflops(296, 300, 299),
        "mixtral": Tflops(248, 394, 329),
        "7B_n256": Tflops(149, 199, 179),
        "30B_n512": Tflops(290, 289, 289),
        "120B_n2048": Tflops(353, 408, 388),
        "dMoE-XS": Tflops(119, 244, 181),
        "dMoE-Small": Tflops(126, 269, 195),
        "dMoE-Medium": Tflops(67, 130, 99),
    },
    "tokamax (JAX)": {
        "olmoe": Tflops(242, None, 128),
        "qwen3": Tflops(232, None, 113),
        "mixtral": Tflops(211, None, 188),
        "7B_n256": Tflops(167, None, 73),
        "30B_n512": Tflops(225, None, 102),
    },
}

MEMORY: Mapping[str, Mapping[str, Mib]] = {
    "SonicMoE": {
        "olmoe": Mib(1029, 3078),
        "qwen3": Mib(773, 3206),
        "7B_n256": Mib(196, 1205),
        "30B_n512": Mib(517, 4614),
    },
    "MegaBlocks, grouped": {
        "olmoe": Mib(4098, 5250),
        "qwen3": Mib(3586, 4739),
        "7B_n256": Mib(1538, 2186),
        "30B_n512": Mib(5122, 8195),
    },
    "ScatterMoE": {
        "olmoe": Mib(3076, 3973),
        "qwen3": Mib(2564, 3461),
        "7B_n256": Mib(963, 1227),
        "30B_n512": Mib(3076, 4613),
    },
}


class Step(NamedTuple):
    """A training step of OLMoE with 4 of its 16 layers, batch 4 x 4096, AdamW."""

    tokens_per_second: float
    peak_gib: float


# Hugging Face transformers 5.17, bfloat16, experts_implementation="grouped_mm", sdpa attention.
STEPS: Mapping[str, Step] = {
    "Hugging Face, eager": Step(86_984, 34.1),
    "Hugging Face, eager, gradient checkpointing": Step(69_265, 21.9),
    "Hugging Face, torch.compile": Step(132_820, 25.2),
}
