"""Multi-head attention that knows how to use a `KVCache`, for one's own decoder."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from quantize.check import is_count
from quantize.run.kv_cache.cache import KVCache
from quantize.run.kv_cache.functions import (
    alibi_slopes,
    attention,
    rope_frequencies,
    rotate,
)


class CachedAttention(nn.Module):
    """Multi-head attention to put into one's own decoder: x [B, T, width] -> [B, T, width], with or
    without a cache the same.

    layer: its number in the model, from 0; all self-attention layers share one `KVCache`. kv_heads
        < heads: grouped queries.
    position: "rope", "alibi" or None. window: a query sees only the last `window` positions. cross:
    keys and values come from `memory` [B, S, memory_width] (an encoder's output) instead of x, and
    are computed once per cache; a cross-attention layer takes the number of the self-attention
    layer beside it.

    Raises ValueError, naming the argument, for values out of range.
    """

    rope: Tensor | None
    slopes: Tensor | None

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
        cross: bool = False,
        memory_width: int | None = None,
        bias: bool = False,
    ):
        super().__init__()
        kv_heads, head_dim = kv_heads or heads, head_dim or width // heads
        if not is_count(layer, 0) or heads % kv_heads or head_dim < 1:
            raise ValueError(
                f"layer {layer}, heads {heads}, kv_heads {kv_heads}, head_dim {head_dim}: heads "
                f"must be a multiple"
            )
        if position not in ("rope", "alibi", None) or (
            position == "rope" and head_dim % 2 and not cross
        ):
            raise ValueError(
                f"position is {position!r}; allowed: 'rope' (even head_dim, got {head_dim}), "
                f"'alibi', None"
            )
        if window is not None and (cross or not is_count(window)):
            raise ValueError(
                f"window is {window!r}; allowed: None or an integer >= 1, and None in "
                f"cross-attention"
            )
        self.layer, self.head_dim, self.window, self.cross = layer, head_dim, window, cross
        self.position, self.rope_theta = None if cross else position, rope_theta
        source = (memory_width or width) if cross else width
        self.q = nn.Linear(width, heads * head_dim, bias=bias)
        self.k = nn.Linear(source, kv_heads * head_dim, bias=bias)
        self.v = nn.Linear(source, kv_heads * head_dim, bias=bias)
        self.out = nn.Linear(heads * head_dim, width, bias=bias)
        self.register_buffer(
            "rope",
            rope_frequencies(head_dim, rope_theta) if self.position == "rope" else None,
            persistent=False,
        )
        self.register_buffer(
            "slopes", alibi_slopes(heads) if self.position == "alibi" else None, persistent=False
        )

    @property
    def cache_shape(self) -> tuple[int, int, int | None]:
        """KV heads, head width and window of this layer, as `KVCache.for_model` asks for them."""
        if self.cross:
            raise AttributeError("cross-attention takes no room in a cache before it runs")
        return self.k.out_features // self.head_dim, self.head_dim, self.window

    def rope_frequencies(self, device: torch.device | None = None) -> Tensor | None:
        """Radians per position [D/2]; computed, because a stored table would be rounded with the
        weights.
        """
        if self.position != "rope":
            return None
        return rope_frequencies(self.head_dim, self.rope_theta, device)

    def forward(
        self,
        x: Tensor,
        cache: KVCache | None = None,
        *,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """x: the tokens that follow what `cache` holds. memory_mask: bool [B, S], True where memory
        is real.

        With a cache, memory is read in its first pass only and may be left out later.
        """
        q = self._split(self.q(x))
        if self.cross:
            return self._join(self._attend_memory(q, cache, memory, memory_mask))
        k, v = self._split(self.k(x)), self._split(self.v(x))
        new = x.shape[1]
        positions = (
            torch.arange(new, device=x.device) if cache is None else cache.positions(new, x.device)
        )
        if self.position == "rope":
            frequencies = rope_frequencies(self.head_dim, self.rope_theta, x.device)
            angles = positions[..., None].float() * frequencies  # [T, D/2], or [B, T, D/2]
            angles = angles if angles.dim() == 2 else angles[:, None]
            q, k = rotate(q, angles), rotate(k, angles)
        if cache is not None:
            return self._join(cache.attend(self.layer, q, k, v, slopes=self.slopes))
        return self._join(attention(q, k, v, self._uncached_mask(positions, q.dtype), causal=True))

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)  # [B, H, T, D]

    def _join(self, x: Tensor) -> Tensor:
        return self.out(x.transpose(1, 2).flatten(2))

    def _uncached_mask(self, positions: Tensor, dtype: torch.dtype) -> Tensor | None:
        if self.slopes is None and (self.window is None or self.window >= len(positions)):
            return None
        distance = positions[:, None] - positions
        visible = distance >= 0
        if self.window is not None:
            visible &= distance < self.window
        if self.slopes is None:
            return visible
        bias = -self.slopes.to(dtype)[:, None, None] * distance.to(dtype)
        return bias.masked_fill(~visible, -math.inf)

    def _attend_memory(
        self, q: Tensor, cache: KVCache | None, memory: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        held = {} if cache is None else cache.memory(self.layer)
        if not held:
            if memory is None:
                raise ValueError(
                    f"cross-attention layer {self.layer} needs `memory`: nothing is cached yet"
                )
            held = {"k": self._split(self.k(memory)), "v": self._split(self.v(memory))}
            held |= {} if mask is None else {"mask": mask}
            if cache is not None:
                cache.remember(self.layer, **held)
        visible = held["mask"][:, None, None, :] if "mask" in held else None
        return attention(q, held["k"], held["v"], visible)
