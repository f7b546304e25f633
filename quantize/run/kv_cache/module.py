"""Multi-head attention that knows how to use a `KVCache`, for one's own decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantize.check import is_count
from quantize.models.attention import apply_rope, rope_table
from quantize.run.kv_cache.cache import KVCache
from quantize.run.kv_cache.functions import attention, visible


class CachedAttention(nn.Module):
    """Multi-head attention to put into one's own decoder: x [B, T, width] -> [B, T, width], with or
    without a cache the same.

    layer: its number in the model, from 0; all layers share one `KVCache`. kv_heads < heads:
        grouped queries.
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
        super().__init__()
        kv_heads, head_dim = kv_heads or heads, head_dim or width // heads
        if not is_count(layer, 0) or heads % kv_heads or head_dim < 1:
            raise ValueError(
                f"layer {layer}, heads {heads}, kv_heads {kv_heads}, head_dim {head_dim}: heads "
                f"must be a multiple"
            )
        if position not in ("rope", None) or (position == "rope" and head_dim % 2):
            raise ValueError(
                f"position is {position!r}; allowed: 'rope' (even head_dim, got {head_dim}), None"
            )
        if window is not None and not is_count(window):
            raise ValueError(f"window is {window!r}; allowed: None or an integer >= 1")
        self.layer, self.head_dim, self.window = layer, head_dim, window
        self.position, self.rope_theta = position, rope_theta
        self.q = nn.Linear(width, heads * head_dim, bias=bias)
        self.k = nn.Linear(width, kv_heads * head_dim, bias=bias)
        self.v = nn.Linear(width, kv_heads * head_dim, bias=bias)
        self.out = nn.Linear(heads * head_dim, width, bias=bias)

    @property
    def cache_shape(self) -> tuple[int, int, int | None]:
        """KV heads, head width and window of this layer, as `KVCache.for_model` asks for them."""
        return self.k.out_features // self.head_dim, self.head_dim, self.window

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """x: the tokens that follow what `cache` holds."""
        q, k, v = (self._split(layer(x)) for layer in (self.q, self.k, self.v))
        new = x.shape[1]
        positions = (
            torch.arange(new, device=x.device) if cache is None else cache.positions(new, x.device)
        )
        if self.position == "rope":
            cos, sin = rope_table(positions, self.head_dim, self.rope_theta)
            cos, sin = cos.to(x.dtype), sin.to(x.dtype)
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            return self._join(cache.attend(self.layer, q, k, v))
        mask = None
        if self.window is not None and self.window < new:
            mask = visible(positions, positions, window=self.window, pad=None)
        return self._join(attention(q, k, v, mask, causal=True))

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)  # [B, H, T, D]

    def _join(self, x: Tensor) -> Tensor:
        return self.out(x.transpose(1, 2).flatten(2))
