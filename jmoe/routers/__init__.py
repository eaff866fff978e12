"""Routers: which experts tokens go to, one family a file.

A routing function is called as `route(logits[T, E], ..., mask=None)` and returns a `jmoe.Routing`, or
`jmoe.Assignments` where the number of experts per token varies; `jmoe.route_top_k` is the plainest. A `Router` is
a module with the parameters and the state of one, called with tokens; it returns the routing and the logits.
`jmoe.MoE(router=...)` takes either, also of one's own.
"""

from jmoe.routers.bias_corrected import BiasCorrectedRouter, SelectionBias, updated_bias
from jmoe.routers.expert_choice import route_expert_choice
from jmoe.routers.group_limited import route_group_limited
from jmoe.routers.hash import HashRouter, HashTable, balanced_hash_table, random_hash_table, route_hash
from jmoe.routers.hyper import HyperNetwork, HyperRouter
from jmoe.routers.linear import LinearRouter, LogitsRouter
from jmoe.routers.relu import L1Coefficient, ReLURouter, relu_density, relu_l1_loss, route_relu
from jmoe.routers.router import Route, Router
from jmoe.routers.sparsemixer import route_sparsemixer
from jmoe.routers.token_rounding import route_token_rounding
from jmoe.routers.uniform import route_uniform
from jmoe.routers.zero_experts import split_zero_experts

__all__ = [
    "BiasCorrectedRouter",
    "HashRouter",
    "HashTable",
    "HyperNetwork",
    "HyperRouter",
    "L1Coefficient",
    "LinearRouter",
    "LogitsRouter",
    "ReLURouter",
    "Route",
    "Router",
    "SelectionBias",
    "balanced_hash_table",
    "random_hash_table",
    "relu_density",
    "relu_l1_loss",
    "route_expert_choice",
    "route_group_limited",
    "route_hash",
    "route_relu",
    "route_sparsemixer",
    "route_token_rounding",
    "route_uniform",
    "split_zero_experts",
    "updated_bias",
]
