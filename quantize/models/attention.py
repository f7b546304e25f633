"""Rotary positions and causal attention, as functions of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def rope_frequencies(head_dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """Radians per position of each pair of dimensions, fp32 [D/2]."""
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    return 1.0 / theta ** (pairs / head_dim)


def rope_table(
    positions: Tensor, head_dim: int, theta: float, frequencies: Sequence[float] | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, fp32 (Su et al., arXiv 2104.09864).

    [T, D/2] for positions [T], [B, 1, T, D/2] for [B, T]. Computed on every pass, once for all
    layers: nothing to store, cast, move or outgrow. frequencies: radians per position [D/2], in
    place of those that follow from theta.
    """
    if frequencies is None:
        turns = rope_frequencies(head_dim, theta, positions.device)
    else:
        turns = torch.tensor(frequencies, device=positions.device, dtype=torch.float32)
    angles = positions.float()[..., None] * turns
    angles = angles if positions.ndim == 1 else angles[:, None]
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, H, T, D]: element i is paired with element i + D/2, as in the published Llama
    checkpoints.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, training: bool = False) -> Tensor:
    """Attention of q [B, H, T, D] over k, v [B, KV, T, D], each position seeing itself and what is
    before it.

    By blocks where that was faster on CPUs: in bfloat16, and with training=True (T up to 512) in
    any dtype, for its backward. A graph that leaves this process keeps torch's operator, which
    holds for every length.
    """
    t = q.shape[2]
    leaves = torch.jit.is_tracing() or torch.compiler.is_exporting()
    if (
        q.device.type == "cpu"
        and not leaves
        and (t <= 512 if training else q.dtype is torch.bfloat16 and t <= 1024)
    ):
        return blocked_causal_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def blocked_causal_attention(q: Tensor, k: Tensor, v: Tensor, block: int = 128) -> Tensor:
    """`causal_attention` by matrix products, `block` queries at a time, whose scores over the keys
    before them are in memory.

    On 2 cores, 8 x 8 heads, 256 positions, head width 64, bf16: 4.6 ms against 8.1 ms of torch's
    CPU kernel, which has no bf16 products to use; in fp32 8.7 against 8.4. Forward and backward of
    8 x 2 heads in bf16: 4.9 ms (6.0 in one block); 7.5 against 9.0 on one core with the scale and
    the mask added by the product.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    b, h, t, d = q.shape
    if torch.compiler.is_compiling():
        block = t  # no loop, which would be unrolled for this length only
    hidden = torch.full((min(block, t),) * 2, -math.inf, dtype=q.dtype, device=q.device).triu(1)
    q, k, v = (x.reshape(b * h, t, d) for x in (q, k, v))
    parts = []
    for start in range(0, t, block):
        end = min(start + block, t)
        mask = F.pad(hidden[: end - start, : end - start], (start, 0))
        keys = k[:, :end].transpose(1, 2)
        scores = torch.baddbmm(mask, q[:, start:end], keys, alpha=d**-0.5)
        parts.append(torch.bmm(scores.softmax(-1), v[:, :end]))
    return torch.cat(parts, 1).view(b, h, t, d)
