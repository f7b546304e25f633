"""Multi-head attention that knows how to use a `KVCache`, for one's own decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantize import check
from quantize.models import Attention, DecoderConfig
from quantize.models.attention import apply_rope, rope_table
from quantize.run.kv_cache.cache import KVCache


class CachedAttention(Attention):
    """Multi-head attention to put into one's own decoder: x [B, T, width] -> [B, T, width], with or
    without a cache the same.

    layer: its number in the model, from 0; all layers share one `KVCache`. kv_heads < heads:
        grouped queries. head_dim: even.
    position: "rope", or None. window: a query sees only the last `window` positions.

    Raises ValueError, naming the argument, for values out of range.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        layer: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        position: str | None = "rope",
        rope_theta: float = 10000.0,
        window: int | None = None,
        bias: bool = False,
    ):
        check.count("layer", layer, 0)
        check.one_of("position", position, ("rope", None))
        sizes = {"width": width, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        moves = {"rope_theta": rope_theta, "window": window, "qkv_bias": bias}
        super().__init__(DecoderConfig(**sizes, **moves), layer)
        if bias:
            self.out = nn.Linear(self.out.in_features, width)
        self.position, self.rope_theta = position, rope_theta

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """x: the tokens that follow what `cache` holds."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (layer(x).view(heads).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.position == "rope":
            new = x.shape[1]
            alone = torch.arange(new, device=x.device)
            positions = alone if cache is None else cache.positions(new, x.device)
            cos, sin = rope_table(positions, self.head_dim, self.rope_theta)
            cos, sin = cos.to(x.dtype), sin.to(x.dtype)
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        return self.out(self.attend(q, k, v, cache).transpose(1, 2).flatten(2))
