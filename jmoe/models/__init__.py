"""Decoder-only language models with Mixture-of-Experts layers."""

from jmoe.models.config import TransformerConfig
from jmoe.models.generate import generate
from jmoe.models.loss import LossAux, language_model_loss
from jmoe.models.mixture_of_attention import MixtureOfAttention
from jmoe.models.presets import PRESETS
from jmoe.models.transformer import Transformer

__all__ = [
    "PRESETS",
    "LossAux",
    "MixtureOfAttention",
    "Transformer",
    "TransformerConfig",
    "generate",
    "language_model_loss",
]
