"""docs/features.md: every name of theirs has a row, and every name of ours exists."""

import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "features.md").read_text()
SECTIONS = {section.split("\n", 1)[0]: section for section in PAGE.split("\n## ")[1:]}
ROWS = [
    (title, *(cell.strip() for cell in line.strip("|").split(" | ", 1)))
    for title, section in SECTIONS.items()
    for line in section.splitlines()
    if line.startswith("| ") and not line.endswith("| here |")
]

THEIRS = {
    "MegaBlocks: `Arguments`": """
        hidden_size ffn_hidden_size num_layers bias return_bias activation_fn moe_num_experts moe_top_k
        moe_capacity_factor moe_normalize_expert_weights moe_loss_weight moe_jitter_eps moe_lbl_in_fp32
        moe_expert_model_parallelism expert_parallel_group pipeline_model_parallel_size
        num_layers_per_virtual_pipeline_stage memory_optimized_mlp mlp_type mlp_impl fp16 bf16 device init_method
        output_layer_init_method uniform_expert_assignment shared_expert fc_cls fc_kwargs remat_act_fn
        shared_expert_hidden_size shared_expert_weighted_sum moe_zloss_weight moe_zloss_in_fp32""",
    "MegaBlocks: layers": """
        dMoE MoE LearnedRouter ParallelDroplessMLP ParallelMLP batched_load_balancing_loss batched_router_zloss
        clear_load_balancing_loss clear_router_zloss""",
    "MegaBlocks: operations": """
        binned_gather binned_scatter exclusive_cumsum inclusive_cumsum gather histogram padded_gather padded_scatter
        repeat replicate round_up scatter sort sum topology""",
    "STK": """
        Matrix Matrix.data Matrix.row_indices Matrix.column_indices Matrix.offsets Matrix.offsets_t
        Matrix.block_offsets_t Matrix.column_indices_t Matrix.t Matrix.blocking Matrix.nnz ops.sdd ops.dsd ops.dds
        ops.ones_like ops.row_indices ops.sum ops.to_dense ops.to_sparse ops.mul random.dense_mask random.mask
        random.randn""",
    "ScatterMoE": """
        flatten_sort_count parallel_linear ParallelExperts ParallelLinear mlp.MLP mlp.GLUMLP
        kernels.ops.scatter2scatter kernels.ops.group_bwd_W kernels.ops.group kernels.single.single2scatter
        utils.replace_moe.replace_function examples/molora.py MoMHA,_of_the_paper""",
}
_NAME = re.compile(r"((?:jmoe|pallas_kernels|jax)(?:\.\w+)+)(?:\((\w+)=\))?")


def resolve(name: str, parameter: str | None) -> None:
    """Imports a dotted name, which may end in fields of a dataclass, and finds the parameter in its signature."""
    module, *attributes = name.split(".")
    value: Any = importlib.import_module(module)
    for attribute in attributes:
        if dataclasses.is_dataclass(value) and attribute in {field.name for field in dataclasses.fields(value)}:
            return
        if inspect.ismodule(value) and not hasattr(value, attribute):
            importlib.import_module(f"{value.__name__}.{attribute}")
        value = getattr(value, attribute)
    function = value.__init__ if inspect.isclass(value) else value
    assert parameter is None or parameter in inspect.signature(function).parameters


@pytest.mark.parametrize(("title", "theirs", "ours"), ROWS, ids=[f"{row[0][:4]}-{row[1]}" for row in ROWS])
def test_every_name_of_ours_in_the_table_exists(title, theirs, ours):
    code = re.findall(r"`([^`]+)`", ours)
    names = [_NAME.fullmatch(part) for part in code if re.search(r"\w\.\w|\(", part)]
    assert all(names), f"{ours} has a name that is not imported"
    assert names or ours.startswith("none"), f"{theirs} has no counterpart, and it is not said that there is none"
    for name in names:
        assert name is not None
        resolve(*name.groups())


@pytest.mark.parametrize("title", THEIRS)
def test_every_name_of_theirs_has_one_row(title):
    assert sorted(row[1].replace("`", "").replace(" ", "_") for row in ROWS if row[0] == title) == sorted(
        THEIRS[title].split()
    )
