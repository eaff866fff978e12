"""An MoE layer on the kernels of ScatterMoE (arXiv 2403.08245), which the package fms-acceleration-moe ships."""

import functools
import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

from benchmarks.layers import Configuration
from benchmarks.torch_layers import TorchFunction, activate, route


def load_scattermoe() -> types.ModuleType:
    """Imports the functions on the kernels.

    Raises:
        ImportError: There is no such package, or it lacks something.
    """
    spec = importlib.util.find_spec("fms_acceleration_moe")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'fms_acceleration_moe'")
    # Around the kernels the package imports a framework for fine-tuning, which they do not need.
    folder = str(Path(spec.submodule_search_locations[0]) / "utils" / "scattermoe_utils")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("khd.kernels.ops")


def scattermoe_layer(torch: types.ModuleType, configuration: Configuration) -> TorchFunction:
    """Two of its linear layers: x is gathered by the first, and the second scatters and sums what the experts made.

    Between the two, rows stay sorted by expert, as in ScatterMoE's own MLP.
    """
    c, scattermoe = configuration, load_scattermoe()

    def layer(x: Any, w_up: Any, w_down: Any, logits: Any) -> Any:
        weight, sorted_expert, order = route(c, logits)
        blocks, ends = scattermoe.padded_block_indices(sorted_expert, c.E)
        linear = functools.partial(
            scattermoe.scattered_experts,
            sorted_expert_idxs=sorted_expert,
            sorted_scattered_idxs=order,
            padded_block_idxs=blocks,
            expert_offsets=ends,
        )
        h = linear(x, w_up, c.K, grouped_out=True)  # [R, H]
        return linear(activate(torch, c, h), w_down, 1, gates=weight, grouped_in=True)

    return TorchFunction(layer)
