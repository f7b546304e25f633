"""Attention and int8 rows as functions of tensors; no state, no modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False
) -> Tensor:
    """Softmax attention of q [B, H, T, D] over k, v [B, KV, S, D] -> [B, H, T, D]; H a multiple of
    KV, no key copied.

    mask: bool (True = visible), broadcastable to [B, H, T, S]; it takes the place of `causal`
        (T == S).
    """
    b, heads, new, d = q.shape
    if new == 1 and heads != k.shape[1]:
        # With one query per head, a group's queries can stand where positions do, and keys are read
        # once per group: over 30 layers of 4096 positions 16 ms instead of 21 with enable_gqa, in
        # bfloat16 16 instead of 165.
        return F.scaled_dot_product_attention(
            q.reshape(b, k.shape[1], -1, d), k, v, attn_mask=mask
        ).reshape(q.shape)
    causal = causal and mask is None
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=bool(heads != k.shape[1])
    )


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and one bf16 scale per row: x [..., D] -> int8 [..., D], bf16 [..., 1], with x
    close to values * scale.

    bf16 has fp32's range, so that neither tiny nor huge keys leave it; the values are rounded
    against the rounded scale.
    """
    scale = (x.abs().amax(-1, keepdim=True).float() / 126.5).clamp(min=1e-30).to(torch.bfloat16)
    return (x.float() / scale.float()).round_().clamp_(-127, 127).to(torch.int8), scale


def read(held: dict[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    """Keys or values that a cache holds (`name`: k or v), in `dtype`; int8 times its scale."""
    x = held[name].to(dtype)
    scale = held.get(f"{name}_scale")
    return x if scale is None else x * scale.to(dtype)


def attention_int8(q: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor) -> Tensor:
    """Attention of one query per head, q [B, H, 1, D], over int8 k, v [B, KV, S, D] with scales [B,
    KV, S, 1].

    The scales go onto scores and probabilities, which are D times smaller than keys and values.
    """
    b, heads, _, d = q.shape
    grouped = q.view(b, k.shape[1], -1, d) * d**-0.5  # [B, KV, H/KV, D]
    scores = grouped @ k.to(q.dtype).transpose(-1, -2) * k_scale.to(q.dtype).transpose(-1, -2)
    weights = torch.softmax(scores, dim=-1) * v_scale.to(q.dtype).transpose(-1, -2)
    return (weights @ v.to(q.dtype)).view(b, heads, 1, d)


def visible(queries: Tensor, keys: Tensor, *, window: int | None, pad: Tensor | None) -> Tensor:
    """Which keys a query sees: bool [T, S], or [B, 1, T, S] with `pad`.

    Args:
        queries: their positions, [T].
        keys: their positions, [S].
        window: a query sees only so many positions, itself included; None: all up to its own.
        pad: positions at the left of each row that nobody sees but they themselves, int64 [B].
    """
    queries = queries[:, None]
    mask = keys <= queries
    if window is not None:
        mask &= keys > queries - window
    if pad is not None:  # padding sees itself, so that no row of scores is empty
        mask = (mask & (keys >= pad[:, None, None, None])) | (keys == queries)
    return mask
