"""ProjectedAttention: what `nn.MultiheadAttention` computes, with its four projections as layers of
their own.

`projected` puts it in place. Torch's fused encoder layers read weights too: see `encoder`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantize import surgery
from quantize.nn.reading import WeightReading


@surgery.builder
class ProjectedAttention(nn.Module):
    """In place of `nn.MultiheadAttention`: same arguments, shapes and results; `q`, `k`, `v` and
    `out` are layers.

    Left out: `bias_k`, `bias_v` and `add_zero_attn` (a module that uses them is not converted).
    """

    q: Any  # the projections: linear layers, or what a technique put in their place
    k: Any
    v: Any
    out: Any

    def __init__(
        self, *projections: nn.Module, heads: int, batch_first: bool, dropout: float
    ) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = projections
        self.num_heads = heads
        self.batch_first, self.dropout = batch_first, dropout

    @classmethod
    def from_module(cls, source: nn.MultiheadAttention) -> ProjectedAttention:
        """The same function, with copies of the weights of `source`."""
        if source.in_proj_weight is not None:
            weights = source.in_proj_weight.chunk(3)
        else:
            weights = (source.q_proj_weight, source.k_proj_weight, source.v_proj_weight)
        biases = (None,) * 3 if source.in_proj_bias is None else source.in_proj_bias.chunk(3)
        settings = {
            "heads": source.num_heads,
            "batch_first": source.batch_first,
            "dropout": source.dropout,
        }
        new = cls.rebuild(source, **settings)
        for part, weight, bias in zip((new.q, new.k, new.v), weights, biases, strict=True):
            fill(part, weight, bias)
        fill(new.out, source.out_proj.weight, source.out_proj.bias)
        surgery.take_place(source, new)
        # the projections' own records follow it
        surgery.record(new, "ProjectedAttention", **settings)
        return new

    @classmethod
    def rebuild(
        cls, module: nn.Module, heads: int, batch_first: bool, dropout: float
    ) -> ProjectedAttention:
        """A frame in place of `module`, with empty projections; a file's tensors and the records of
        projections fill it.
        """
        if not isinstance(module, nn.MultiheadAttention):
            raise ValueError(f"expected an nn.MultiheadAttention, found a {type(module).__name__}")
        width, dtype = module.embed_dim, module.out_proj.weight.dtype
        bias = module.in_proj_bias is not None
        like = {"device": "meta", "dtype": dtype}
        parts = [nn.Linear(k, width, bias, **like) for k in (width, module.kdim, module.vdim)]
        out = nn.Linear(width, width, module.out_proj.bias is not None, **like)
        new = cls(*parts, out, heads=heads, batch_first=batch_first, dropout=dropout)
        return new.train(module.training)

    def contradiction(self) -> str | None:
        """See `surgery.contradiction`."""
        width = getattr(self.q, "out_features", None)
        if type(width) is not int:
            return f"its q is a {type(self.q).__name__}"
        if type(self.num_heads) is not int or self.num_heads < 1 or width % self.num_heads:
            return f"its num_heads={self.num_heads!r} doesn't divide the {width} outputs of q"
        return None

    @property
    def embed_dim(self) -> int:
        return self.q.out_features

    @property
    def head_dim(self) -> int:
        return self.q.out_features // self.num_heads

    @property
    def kdim(self) -> int:
        return self.k.in_features

    @property
    def vdim(self) -> int:
        return self.v.in_features

    @property
    def _qkv_same_embed_dim(self) -> bool:
        return self.kdim == self.vdim == self.embed_dim

    @property
    def out_proj(self) -> nn.Module:
        return self.out

    @property
    def in_proj_weight(self) -> Tensor | None:
        """Reads as the weights of q, k and v side by side, where they are of one width."""
        if not self._qkv_same_embed_dim:
            return None
        weight = self.q.weight
        shape = (3 * self.embed_dim, self.embed_dim)
        return WeightReading.described(
            lambda: self._side_by_side("weight"), shape, weight.dtype, weight.device
        )

    @property
    def in_proj_bias(self) -> Tensor | None:
        """Reads as the biases of q, k and v side by side."""
        bias = self.q.bias
        if bias is None:
            return None
        return WeightReading.described(
            lambda: self._side_by_side("bias"), (3 * len(bias),), bias.dtype, bias.device
        )

    def _side_by_side(self, name: str) -> Tensor:
        return torch.cat([getattr(part, name).clone() for part in (self.q, self.k, self.v)])

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
        """As `nn.MultiheadAttention.forward`. `is_causal` is only a hint there, beside the mask,
        and is not needed here.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True needs attn_mask, as in nn.MultiheadAttention")
        # before any reshaping: the same tensor is quantized once
        q, k, v = self.q(query), self.k(key), self.v(value)
        batched = q.dim() == 3
        if not batched:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        # [B, H, T, D]
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            scores = scores if mask is None else scores + mask
            weights = F.dropout(scores.softmax(-1), dropout)  # [B, H, T, S]
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

    def _mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor
    ) -> Tensor | None:
        """Both masks (bool: True is hidden; float: added) as one that is added to scores [B, H, T,
        S].
        """
        rows = q.shape[0]
        masks = []
        if attn_mask is not None:  # [T, S] or [B * H, T, S]
            alike = attn_mask.dim() == 2
            shaped = attn_mask if alike else attn_mask.view(rows, -1, *attn_mask.shape[-2:])
            masks.append(_as_added(shaped, q.dtype))
        if padding is not None:  # [B, S] or [S]
            masks.append(_as_added(padding.view(rows, 1, 1, k.shape[2]), q.dtype))
        return sum(masks[1:], start=masks[0]) if masks else None


def _as_added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask (bool: True is hidden; float: added) as one that is added to scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def fill(part: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Give an empty linear layer copies of a weight and a bias."""
    part.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if bias is not None:
        part.bias = nn.Parameter(bias.detach().clone(), requires_grad=weight.requires_grad)


def obstacle(module: nn.MultiheadAttention) -> str | None:
    """Why a module, whose forward is torch's, can't become a ProjectedAttention."""
    if module.bias_k is not None or module.add_zero_attn:
        return "bias_k, bias_v and add_zero_attn are not handled"
    last = module.out_proj
    if type(last).forward is not nn.Linear.forward or "weight" not in last._parameters:
        kind = type(last).__name__
        return f"its out_proj is a {kind} that computes its weight, or not a plain linear"
    inputs = ("in_proj_weight", "q_proj_weight")
    if all(module._parameters.get(key) is None for key in inputs):
        return "its weights are computed by a hook or a parametrization: make them permanent first"
    return None
