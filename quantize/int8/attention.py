"""Int8MultiheadAttention: what `nn.MultiheadAttention` computes, with its four projections in int8."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantize import surgery
from quantize.int8.linear import Int8Linear


@surgery.builder
class Int8MultiheadAttention(nn.Module):
    """In place of `nn.MultiheadAttention`: same arguments, shapes and results; `q`, `k`, `v` and `out` are `Int8Linear`s.

    Left out: `bias_k`, `bias_v` and `add_zero_attn` (a module that uses them is not converted).
    """

    in_proj_bias = None  # nn.TransformerEncoderLayer looks here, and then leaves its fused float path alone

    def __init__(self, *projections: nn.Module, heads: int, batch_first: bool, dropout: float) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = projections
        self.num_heads = heads
        self.batch_first, self.dropout = batch_first, dropout

    @classmethod
    def from_attention(cls, source: nn.MultiheadAttention) -> Int8MultiheadAttention:
        """Quantize the projections of `source`."""
        if source.in_proj_weight is not None:
            weights = source.in_proj_weight.chunk(3)
        else:
            weights = (source.q_proj_weight, source.k_proj_weight, source.v_proj_weight)
        biases = (None,) * 3 if source.in_proj_bias is None else source.in_proj_bias.chunk(3)
        parts = [Int8Linear.from_weight(w, b) for w, b in zip(weights, biases, strict=True)]
        out = Int8Linear.from_weight(source.out_proj.weight, source.out_proj.bias)
        settings = {"heads": source.num_heads, "batch_first": source.batch_first, "dropout": source.dropout}
        new = cls(*parts, out, **settings)
        surgery.record(new, "Int8MultiheadAttention", **settings)  # the projections' own records follow it
        return new

    @classmethod
    def rebuild(cls, module: nn.Module, heads: int, batch_first: bool, dropout: float) -> Int8MultiheadAttention:
        """A frame in place of `module`; the records of its projections fill it."""
        frame = [nn.Identity() for _ in range(4)]
        return cls(*frame, heads=heads, batch_first=batch_first, dropout=dropout).train(module.training)

    def contradiction(self) -> str | None:
        """See `surgery.contradiction`."""
        width = getattr(self.q, "out_features", None)
        if type(width) is not int:
            return f"its q is a {type(self.q).__name__}"
        if type(self.num_heads) is not int or self.num_heads < 1 or width % self.num_heads:
            return f"its num_heads={self.num_heads!r} doesn't divide the {width} outputs of q"
        return None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`. `is_causal` is only a hint there, beside the mask, and is not needed here."""
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True needs attn_mask, as in nn.MultiheadAttention")
        q, k, v = self.q(query), self.k(key), self.v(value)  # before any reshaping: the same tensor is quantized once
        batched = q.dim() == 3
        if not batched:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # [B, H, T, D]
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)  # [B, H, T, S]
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = y.transpose(1, 2).flatten(2)
        if batched and not self.batch_first:
            y = y.transpose(0, 1)
        if not batched:
            y, weights = y.squeeze(0), None if weights is None else weights.squeeze(0)
        return self.out(y), weights

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Both masks (bool: True is hidden; float: added) as one that is added to scores [B, H, T, S]."""
        masks = []
        if attn_mask is not None:  # [T, S] or [B * H, T, S]
            masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.view(q.shape[0], -1, *attn_mask.shape[-2:]))
        if padding is not None:  # [B, S] or [S]
            masks.append(padding.view(q.shape[0], 1, 1, k.shape[2]))
        added = [
            torch.zeros_like(m, dtype=q.dtype).masked_fill(m, float("-inf")) if m.dtype == torch.bool else m.to(q.dtype)
            for m in masks
        ]
        return None if not added else added[0] if len(added) == 1 else added[0] + added[1]
