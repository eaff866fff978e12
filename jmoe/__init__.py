"""Dropless Mixture-of-Experts for JAX: routing, dispatch, expert MLPs and the layer around them."""

from jmoe import exchanges, linen, routers
from jmoe.activations import Activation, Gated
from jmoe.capacity import limit_to_capacity
from jmoe.debug import debug_checks
from jmoe.dispatch import Dispatch, make_dispatch
from jmoe.lora import LoRAExperts
from jmoe.losses import (
    expert_load,
    load_balancing_loss,
    pooled_balancing_loss,
    router_z_loss,
    sequence_balancing_loss,
)
from jmoe.mlp import moe_mlp
from jmoe.moe import MoE
from jmoe.moe_aux import MoEAux
from jmoe.parallel_linear import ParallelLinear, parallel_linear
from jmoe.placement import ExpertPlacement, Replica
from jmoe.planning import plan_placement
from jmoe.reorder import reorder_experts
from jmoe.routing import Assignments, Routing, route_top_k
from jmoe.sharding import LOGICAL_AXIS_RULES, logical_axis_rules, named_sharding, partition_spec

__all__ = [
    "LOGICAL_AXIS_RULES",
    "Activation",
    "Assignments",
    "Dispatch",
    "ExpertPlacement",
    "Gated",
    "LoRAExperts",
    "MoE",
    "MoEAux",
    "ParallelLinear",
    "Replica",
    "Routing",
    "debug_checks",
    "exchanges",
    "expert_load",
    "limit_to_capacity",
    "linen",
    "load_balancing_loss",
    "logical_axis_rules",
    "make_dispatch",
    "moe_mlp",
    "named_sharding",
    "parallel_linear",
    "partition_spec",
    "plan_placement",
    "pooled_balancing_loss",
    "reorder_experts",
    "route_top_k",
    "router_z_loss",
    "routers",
    "sequence_balancing_loss",
]
