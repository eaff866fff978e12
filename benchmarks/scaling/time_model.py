"""How long a training step takes on many GPUs: a small model of computation and links.

docs/scaling.md has the formulas in words. Everything here is per device, in seconds, bytes and FLOP/s.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jmoe.activations import is_gated
from jmoe.models import TransformerConfig

_SLACK = 1.125  # of the exchanges' buffers, `jmoe.exchanges.Exchange.slack`
_BF16 = 2


class Link(NamedTuple):
    """What a collective reaches: bytes each device sends in a second, and seconds before the first arrives."""

    bandwidth: float
    latency: float


@dataclasses.dataclass(frozen=True)
class Network:
    """The links between GPUs.

    Attributes:
        in_node: Of each collective between the GPUs of a node; "" is that of any other.
        between_nodes: Of each GPU's share of the node's network.
        node_size: GPUs in a node.
    """

    in_node: Mapping[str, Link]
    between_nodes: Link
    node_size: int

    def seconds(self, collective: str, num_bytes: float, group: "Group") -> float:
        """Says how long a collective takes.

        Args:
            collective: As in `jax.lax`.
            num_bytes: What each device puts into it: its shard ("all_gather"), what it sends on ("ppermute"), or
                its whole array ("psum_scatter", "all_to_all", "psum").
            group: The devices.
        """
        g, m = group.size, group.in_node
        if g == 1 or not num_bytes:
            return 0.0
        inside = self.in_node.get(collective) or self.in_node[""]
        # What each device sends; and what it has to send to other nodes, where all that it sends to the devices of
        # one node goes there once, unless these want different things.
        sent, abroad = {
            "all_gather": (num_bytes * (g - 1), num_bytes * (g - m) / m),
            "psum_scatter": (num_bytes * (g - 1) / g, num_bytes * (g - m) / g / m),
            "psum": (2 * num_bytes * (g - 1) / g, 2 * num_bytes * (g - m) / g / m),
            "all_to_all": (num_bytes * (g - 1) / g, num_bytes * (g - m) / g),
            "ppermute": (num_bytes, num_bytes if g > m else 0),
        }[collective]
        steps = 1 if collective == "ppermute" else math.ceil(math.log2(g))
        latency = max(inside.latency, self.between_nodes.latency) if g > m else inside.latency
        within = sent / inside.bandwidth if m > 1 else 0.0
        return steps * latency + max(within, abroad / self.between_nodes.bandwidth)


class Group(NamedTuple):
    """Devices that take part in a collective: how many, and how many of them in one node."""

    size: int
    in_node: int


class Mesh(NamedTuple):
    """Sizes of the mesh axes; devices next to each other differ in expert, then in fsdp."""

    data: int
    fsdp: int
    expert: int

    @property
    def size(self) -> int:
        """All devices."""
        return self.data * self.fsdp * self.expert

    def group(self, node_size: int, *axes: str) -> Group:
        """The devices that differ in these axes only."""
        size, in_node, stride = 1, 1, 1
        for axis in ("expert", "fsdp", "data"):
            length = getattr(self, axis)
            if axis in axes:
                size *= length
                in_node *= min(length, max(node_size // stride, 1))
            stride *= length
        return Group(size, in_node)


@dataclasses.dataclass(frozen=True)
class Speeds:
    """What one device reaches, in FLOP/s, and in bytes read and written in a second.

    Attributes:
        forward: Of experts.
        backward: Of experts.
        other: Of the rest of the layers.
        dense: Of a large matmul, for the output projection.
        copy: For the optimizer.
    """

    forward: float
    backward: float
    other: float
    dense: float
    copy: float


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained.

    Attributes:
        model: The transformer, computed in bfloat16. Its `param_dtype` is that of moments too.
        batch_size: Sequences of each device.
        sequence_length: Tokens of each.
        imbalance: The fullest device's assignments over the mean, beyond what random routing does.
        overlap: The share of the backward in which gradients are reduced at no cost.
        activation_bytes: What each token keeps in each layer.
    """

    model: TransformerConfig
    batch_size: int
    sequence_length: int
    imbalance: float = 1.0
    overlap: float = 0.0
    activation_bytes: float = 0.0

    @property
    def num_tokens(self) -> int:
        """T, of each device."""
        return self.batch_size * self.sequence_length

    @property
    def num_moe_layers(self) -> int:
        """Layers that have experts."""
        return self.model.layer_kinds.count("moe")

    @property
    def expert_parameters(self) -> int:
        """Parameters of all experts."""
        m = self.model
        matrices = 3 if is_gated(m.activation) else 2
        return self.num_moe_layers * m.num_experts * matrices * m.embed_dim * m.expert_hidden_dim

    @property
    def expert_flops(self) -> float:
        """Operations of the experts for a device's tokens in one MoE layer, forward."""
        m = self.model
        return 2 * self.num_tokens * self.expert_parameters / self.num_moe_layers * m.top_k / m.num_experts

    @property
    def head_flops(self) -> float:
        """Operations of the output projection, forward and backward."""
        return 6 * self.num_tokens * self.model.vocab_size * self.model.embed_dim

    @property
    def other_flops(self) -> float:
        """Operations of all else, forward and backward."""
        total = self.num_tokens * self.model.flops_per_token(self.sequence_length)
        return total - 3 * self.num_moe_layers * self.expert_flops - self.head_flops

    @property
    def master_bytes(self) -> int:
        """Of one parameter as the optimizer has it, and of each of its moments."""
        return _BF16 if self.model.param_dtype == "bfloat16" else 4

    @property
    def state_bytes(self) -> int:
        """Of one parameter, its two moments and its gradient; and of the bfloat16 copy of a float32 one."""
        return 3 * self.master_bytes + _BF16 + (_BF16 if self.master_bytes == 4 else 0)

    def local_parameters(self, mesh: Mesh) -> float:
        """Parameters that each device keeps."""
        others = self.model.num_parameters - self.expert_parameters
        return (others + self.expert_parameters / mesh.expert) / mesh.fsdp

    def update_seconds(self, speeds: Speeds, mesh: Mesh) -> float:
        """Predicts the passes over parameters.

        AdamW reads a parameter, its bfloat16 gradient and two moments, and writes all but the gradient. Float32
        parameters are cast to bfloat16 once.
        """
        cast = 4 + _BF16 if self.master_bytes == 4 else 0
        return (6 * self.master_bytes + _BF16 + cast) * self.local_parameters(mesh) / speeds.copy


ONE = Mesh(1, 1, 1)


def fullest_device(num_tokens: int, top_k: int, num_experts: int, num_devices: int) -> float:
    """Estimates the assignments of the fullest of n devices over the mean, with random routing.

    A token has a hypergeometric number of experts on a device; the sum over the tokens of all devices is nearly normal.
    The largest of n normal values is about the quantile (n - 0.375) / (n + 0.25) (Blom 1958).

    Args:
        num_tokens: T, of each device.
        top_k: K.
        num_experts: E, split evenly.
        num_devices: n.
    """
    if num_devices == 1 or num_experts == 1:
        return 1.0
    share = 1 / num_devices
    variance = top_k * share * (1 - share) * (num_experts - top_k) / (num_experts - 1)
    largest = statistics.NormalDist().inv_cdf((num_devices - 0.375) / (num_devices + 0.25))
    return 1 + largest * math.sqrt(num_devices * num_tokens * variance) / (num_tokens * top_k)


def chunk(num_tokens: int, top_k: int, num_experts: int, num_devices: int) -> float:
    """Tokens that a device sends to another one in a round of the all-to-all: C of docs/expert-sharding.md."""
    elsewhere = num_experts - num_experts // num_devices
    wanted = 1 - math.comb(elsewhere, top_k) / math.comb(num_experts, top_k)
    return min(num_tokens, _SLACK * wanted * num_tokens)


def layer_seconds(
    job: Job, speeds: Speeds, network: Network, group: Group, exchange: str, fullest: float
) -> dict[str, float]:
    """Predicts the experts of one MoE layer, forward and backward.

    Args:
        job: What is trained.
        speeds: Of one device.
        network: Of all.
        group: The devices along the expert axis.
        exchange: "gather", "ring" or "all_to_all"; with one device, any.
        fullest: The fullest device's assignments over the mean.

    Returns:
        "experts", and "exchange": what this adds, after what a ring hides behind the experts.
    """
    n, m = group.size, job.model
    passes = {"forward": fullest * job.expert_flops / speeds.forward}
    passes["backward"] = 2 * fullest * job.expert_flops / speeds.backward
    experts = sum(passes.values())
    if n == 1:
        return {"experts": experts, "exchange": 0.0}
    tokens = job.num_tokens * m.embed_dim * _BF16
    if exchange == "gather":
        way = network.seconds("all_gather", tokens, group) + network.seconds("psum_scatter", n * tokens, group)
        return {"experts": experts, "exchange": 2 * way}
    if exchange == "all_to_all":
        bytes_of_round = n * chunk(job.num_tokens, m.top_k, m.num_experts, n) * m.embed_dim * _BF16
        return {"experts": experts, "exchange": 5 * network.seconds("all_to_all", bytes_of_round, group)}
    exposed = 0.0
    # Forward the tokens travel, backward their gradients with them; behind these their outputs, or gradients, which
    # take as many steps, but begin one later: the last one hides behind nothing.
    for seconds, arrays in ((passes["forward"], 1), (passes["backward"], 2)):
        ahead = arrays * network.seconds("ppermute", tokens, group)
        behind = network.seconds("ppermute", tokens, group)
        of_shard = seconds / n
        exposed += max(0.0, ahead - of_shard) + (n - 2) * max(0.0, ahead + behind - of_shard) + behind
    return {"experts": experts, "exchange": exposed}


def step_seconds(job: Job, speeds: Speeds, network: Network, mesh: Mesh, exchange: str) -> dict[str, float]:
    """Predicts a training step, part by part."""
    m = job.model

    def over(*axes: str) -> Group:
        return mesh.group(network.node_size, *axes)

    fullest = job.imbalance * fullest_device(job.num_tokens, m.top_k, m.num_experts, mesh.expert)
    fullest = fullest if mesh.expert > 1 else 1.0
    layer = layer_seconds(job, speeds, network, over("expert"), exchange, fullest)
    parts = {name: job.num_moe_layers * seconds for name, seconds in layer.items()}
    parts["other"] = job.other_flops / speeds.other + job.head_flops / speeds.dense
    parts["update"] = job.update_seconds(speeds, mesh)
    # Weights travel as they are multiplied, and gradients too. They are gathered for the forward and for the backward.
    shard = _BF16 * job.local_parameters(mesh)
    parts["weights"] = 2 * network.seconds("all_gather", shard, over("fsdp"))
    experts = _BF16 * job.expert_parameters / mesh.expert / mesh.fsdp
    gradients = (
        network.seconds("psum_scatter", shard * mesh.fsdp, over("fsdp"))
        + network.seconds("psum", experts, over("data"))
        + network.seconds("psum", shard - experts, over("data", "expert"))
    )
    backward = 2 / 3 * (parts["experts"] + parts["other"])
    parts["gradients"] = max(0.0, gradients - job.overlap * backward)
    return parts


def step_gib(job: Job, mesh: Mesh, exchange: str) -> float:
    """Predicts the memory of a step: that of `Job.state_bytes`, activations, and the exchange's."""
    state = job.state_bytes * job.local_parameters(mesh)
    activations = job.activation_bytes * job.num_tokens * job.model.num_layers
    tokens = _BF16 * job.num_tokens * job.model.embed_dim
    n, m = mesh.expert, job.model
    of_exchange = {
        "gather": job.num_moe_layers * n * tokens + 2 * n * tokens,
        "ring": 4 * tokens,
        "all_to_all": 4 * n * chunk(job.num_tokens, m.top_k, m.num_experts, n) * m.embed_dim * _BF16,
    }
    return (state + activations + (of_exchange[exchange] if n > 1 else 0)) / 2**30


def meshes(num_devices: int, num_experts: int) -> Iterator[Mesh]:
    """Lists the meshes of so many devices whose expert axis divides the experts."""
    for expert in _divisors(math.gcd(num_devices, num_experts)):
        for fsdp in _divisors(num_devices // expert):
            yield Mesh(num_devices // expert // fsdp, fsdp, expert)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
