"""The models that the scripts train: a Llama-style decoder, a residual ConvNet and an MLP."""

from quantize.models.attention import (
    apply_rope,
    blocked_causal_attention,
    causal_attention,
    rope_table,
)
from quantize.models.config import ConvNetConfig, DecoderConfig, MLPConfig
from quantize.models.decoder import Attention, Cache, DecoderBlock, DecoderLM, FeedForward, RMSNorm
from quantize.models.images import MLP, ConvBlock, ConvNet

__all__ = [
    "MLP",
    "Attention",
    "Cache",
    "ConvBlock",
    "ConvNet",
    "ConvNetConfig",
    "DecoderBlock",
    "DecoderConfig",
    "DecoderLM",
    "FeedForward",
    "MLPConfig",
    "RMSNorm",
    "apply_rope",
    "blocked_causal_attention",
    "causal_attention",
    "rope_table",
]
