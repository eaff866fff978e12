"""The shape of a decoder-only Mixture-of-Experts transformer, as plain values."""

import dataclasses
from typing import Literal, NamedTuple, get_args, no_type_check

from jmoe import block_sparse
from jmoe.activations import GatedActivation, PlainActivation, is_gated
from jmoe.exchanges import ExchangeName
from jmoe.local_mlp import MLPImplementation
from jmoe.routing import Score, ScoreOrder

DType = Literal["float32", "bfloat16", "float16"]
QKNorm = Literal["none", "head", "full"]
Remat = Literal["none", "dots", "full"]
AttentionImplementation = Literal["auto", "cudnn", "xla"]
MoEImplementation = Literal["auto", MLPImplementation]
LayerKind = Literal["dense", "moe"]
LoadBalancing = Literal["layer", "sequence", "model"]


class LayerGroup(NamedTuple):
    """A unit of consecutive layers that repeats.

    Attributes:
        unit: The kind of each layer of the unit.
        repeats: How many units follow each other.
    """

    unit: tuple[LayerKind, ...]
    repeats: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Describes a decoder-only transformer whose MLPs are dense or Mixture-of-Experts.

    The first `first_dense_layers` layers are dense; of those that follow, every `moe_every`-th is a MoE layer
    (`decoder_sparse_step` of Hugging Face's Qwen models). So by default every layer is MoE, `moe_every=2`
    alternates dense, MoE, dense, MoE, and `num_experts=0` makes every layer dense.

    Attributes:
        vocab_size: Number of token ids.
        num_layers: Number of layers (attention and MLP each).
        embed_dim: Model width D.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; each is shared by `num_heads / num_kv_heads` query heads.
        head_dim: Width of one head; `num_heads * head_dim` need not be D.
        num_experts: Experts E of a MoE layer, or 0 for a dense model.
        top_k: Experts K that each token is sent to.
        expert_hidden_dim: Hidden width F of one expert.
        shared_hidden_dim: Hidden width of the shared expert that every token passes through; 0 for none.
        hidden_dim: Hidden width of a dense layer's MLP; needed only where the pattern has dense layers.
        first_dense_layers: Number of dense layers before the pattern of MoE layers starts.
        moe_every: One MoE layer in every so many layers.
        capacity_factor: c, if each expert is to take at most `ceil(c * T * K / E)` assignments of a batch's T tokens
            and the rest is to be dropped, also in generation; 0 drops none.
        activation: Of all MLPs: gated ("swiglu", "geglu", "reglu") or plain ("gelu", "relu", "relu_squared",
            "silu").
        qk_norm: RMSNorm of queries and keys before RoPE: "none", over each "head" (Qwen3), or over the "full"
            width of all heads together (OLMoE).
        rope_theta: Base of the rotary position embedding's wavelengths.
        norm_eps: Added to the mean square in every RMSNorm.
        tie_embeddings: Whether the output projection is the input embedding.
        max_sequence_length: Longest sequence the model accepts, in tokens.
        router_score: How router logits become scores: "softmax", "sigmoid" or "sqrt_softplus".
        router_score_order: Whether scores are taken "before_top_k" or "after_top_k".
        router_normalize: Whether a token's K routing weights are divided by their sum.
        router_scale: Factor on the routing weights.
        router_bias_update_rate: What a training step moves an expert's selection bias by, which makes up for its
            load (DeepSeek-V3, where it is 0.001); 0 for routers without such biases. It is
            `Transformer.update_biases` that moves them.
        load_balancing: What is to be balanced by itself: the tokens of each "layer", of each "sequence" of each
            layer, or of all layers of the "model" together.
        load_balancing_coef: Weight of the load-balancing loss, which is 1 at perfect balance.
        router_z_coef: Weight of the router z-loss.
        dtype: Compute dtype. Norms, softmax, router and losses stay in float32 whatever it is.
        param_dtype: Dtype of the parameters (the master weights).
        remat: What each layer keeps for the backward pass, which recomputes the rest: with "none" all that it
            needs, with "dots" the results of plain matrix products, with "full" only the layer's input.
        scan_layers: Whether layers that repeat run as one compiled body, scanned, with their parameters stacked.
            Otherwise each has parameters of its own and is compiled by itself: no weights and gradients are copied
            from and to the stacks, and compilation takes longer with every layer.
        attention_implementation: "cudnn" (NVIDIA GPUs, bfloat16 or float16), "xla", or "auto": cuDNN where it
            can run.
        moe_implementation: `implementation` of every MoE layer: "mosaic_gpu", "xla", "reference",
            "block_sparse" (with an `expert_hidden_dim` that is a multiple of 64), or "auto" for the best that can run.
        moe_exchange: How tokens get to the experts of other devices on a mesh with an expert axis: "gather", "ring",
            "all_to_all", or "auto" for what the sizes suggest.
        loss_chunk_size: Tokens whose logits over the vocabulary exist at one time in the loss.

    Example:
        >>> import dataclasses
        >>> from jmoe.models import PRESETS
        >>> config = dataclasses.replace(PRESETS["olmoe_1b_7b"], num_layers=4)
        >>> config.num_parameters, config.num_active_parameters
        (1884325888, 475039744)
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    top_k: int
    expert_hidden_dim: int
    shared_hidden_dim: int = 0
    hidden_dim: int = 0
    first_dense_layers: int = 0
    moe_every: int = 1
    capacity_factor: float = 0.0
    activation: GatedActivation | PlainActivation = "swiglu"
    qk_norm: QKNorm = "none"
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    max_sequence_length: int = 4096
    router_score: Score = "softmax"
    router_score_order: ScoreOrder = "before_top_k"
    router_normalize: bool = True
    router_scale: float = 1.0
    router_bias_update_rate: float = 0.0
    load_balancing: LoadBalancing = "layer"
    load_balancing_coef: float = 0.01
    router_z_coef: float = 0.001
    dtype: DType = "bfloat16"
    param_dtype: DType = "float32"
    remat: Remat = "none"
    scan_layers: bool = True
    attention_implementation: AttentionImplementation = "auto"
    moe_implementation: MoEImplementation = "auto"
    moe_exchange: ExchangeName = "auto"
    loss_chunk_size: int = 2048

    def __post_init__(self):
        """Checks that the fields fit together."""
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in _FROM_ZERO:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in _FROM_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.router_bias_update_rate and self.router_score_order != "before_top_k":
            raise ValueError(
                "router_score_order must be before_top_k with a router_bias_update_rate, got "
                f"{self.router_score_order!r} and {self.router_bias_update_rate}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, since RoPE rotates pairs, got {self.head_dim}")
        if self.num_experts and self.first_dense_layers >= self.num_layers:
            raise ValueError(
                f"first_dense_layers must be less than num_layers = {self.num_layers}, got "
                f"{self.first_dense_layers}; for a dense model set num_experts to 0"
            )
        if self.num_experts and (self.num_layers - self.first_dense_layers) % self.moe_every:
            raise ValueError(
                "num_layers - first_dense_layers must be a multiple of moe_every, got "
                f"{self.num_layers} - {self.first_dense_layers} and {self.moe_every}"
            )
        if self.num_experts and not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k must be from 1 to num_experts = {self.num_experts}, got {self.top_k}")
        for kind, name in (("moe", "expert_hidden_dim"), ("dense", "hidden_dim")):
            if kind in self.layer_kinds and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 in a model with {kind} layers, got {getattr(self, name)}")
        if self.num_experts and self.moe_implementation == "block_sparse":
            block_sparse.check_hidden_sizes("expert_hidden_dim", (self.expert_hidden_dim,))

    @property
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """The layers in order, as groups of a repeated unit: what the model scans over, if it does."""
        num_dense = self.first_dense_layers if self.num_experts else self.num_layers
        groups = (LayerGroup(("dense",), num_dense),) if num_dense else ()
        if self.num_experts:
            unit: tuple[LayerKind, ...] = ("dense",) * (self.moe_every - 1) + ("moe",)
            groups += (LayerGroup(unit, (self.num_layers - num_dense) // self.moe_every),)
        if self.scan_layers:
            return groups
        return tuple(LayerGroup(group.unit, 1) for group in groups for _ in range(group.repeats))

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer, in order."""
        return tuple(kind for group in self.layer_groups for kind in group.unit * group.repeats)

    @property
    def num_parameters(self) -> int:
        """Number of parameters, embeddings included."""
        return self._count_parameters(self.num_experts)

    @property
    def num_active_parameters(self) -> int:
        """Number of parameters that one token uses, embeddings included: K of the E experts count."""
        return self._count_parameters(self.top_k)

    def _count_parameters(self, experts: int) -> int:
        norms = self.embed_dim * (2 * self.num_layers + 1)
        qk_norms = {
            "none": 0,
            "head": 2 * self.head_dim,
            "full": (self.num_heads + self.num_kv_heads) * self.head_dim,
        }[self.qk_norm]
        embeddings = (1 if self.tie_embeddings else 2) * self.vocab_size * self.embed_dim
        return embeddings + norms + self.num_layers * qk_norms + self._count_layer_weights(experts)

    def _count_layer_weights(self, experts: int) -> int:
        """Counts the entries of all layers' matrices, with so many experts in each MoE layer."""
        attention = 2 * self.embed_dim * (self.num_heads + self.num_kv_heads) * self.head_dim
        matrices = 3 if is_gated(self.activation) else 2
        mlp = {
            "dense": matrices * self.embed_dim * self.hidden_dim,
            "moe": self.embed_dim * self.num_experts
            + matrices * self.embed_dim * (experts * self.expert_hidden_dim + self.shared_hidden_dim),
        }
        return sum(attention + mlp[kind] for kind in self.layer_kinds)

    def flops_per_token(self, sequence_length: int) -> int:
        """Computes the floating-point operations of one training step, forward and backward, for each token.

        Six for each entry of each matrix that a token is multiplied with (the output projection included, the
        input embedding not), plus `6 * S * num_heads * head_dim` a layer for causal attention: half of the
        S * S scores, where PaLM (arXiv 2204.02311, appendix B) counts all. Recomputation is not counted.

        Args:
            sequence_length: Tokens S of one sequence.

        Returns:
            Operations for each token.
        """
        weights = self._count_layer_weights(self.top_k) + self.vocab_size * self.embed_dim
        return 6 * weights + 6 * self.num_layers * sequence_length * self.num_heads * self.head_dim


# An unknown choice gets the ValueError above, type checking or not. Marking the class instead would hide its
# fields' types from those who read them, such as command lines.
no_type_check(TransformerConfig.__init__)

_CHOICES = {
    "activation": get_args(GatedActivation) + get_args(PlainActivation),
    "qk_norm": get_args(QKNorm),
    "router_score": get_args(Score),
    "router_score_order": get_args(ScoreOrder),
    "load_balancing": get_args(LoadBalancing),
    "dtype": get_args(DType),
    "param_dtype": get_args(DType),
    "remat": get_args(Remat),
    "attention_implementation": get_args(AttentionImplementation),
    "moe_implementation": get_args(MoEImplementation),
    "moe_exchange": get_args(ExchangeName),
}
_FROM_ZERO = (
    "num_experts",
    "expert_hidden_dim",
    "shared_hidden_dim",
    "hidden_dim",
    "first_dense_layers",
    "router_bias_update_rate",
    "capacity_factor",
)
_FROM_ONE = (
    "vocab_size",
    "num_layers",
    "embed_dim",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "moe_every",
    "max_sequence_length",
    "loss_chunk_size",
)
