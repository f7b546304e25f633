"""Attention, rotary angles and int8 rows as functions of tensors; no state, no modules."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from quantize.models.attention import apply_rope


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False
) -> Tensor:
    """Softmax attention of q [B, H, T, D] over k, v [B, KV, S, D] -> [B, H, T, D]; H a multiple of
    KV, no key copied.

    mask: bool (True = visible) or a float bias, broadcastable to [B, H, T, S]; it takes the place
        of `causal` (T == S).
    """
    b, heads, new, d = q.shape
    if (
        new == 1
        and heads != k.shape[1]
        and (mask is None or (mask.dim() == 4 and mask.shape[1] == 1))
    ):
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


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn pairs (i, i + D/2) of x [B, H, T, D] by `angles` [T, D/2] or [B, 1, T, D/2] (RoPE, arXiv
    2104.09864).
    """
    return apply_rope(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))


def rope_frequencies(
    head_dim: int, theta: float = 10000.0, device: torch.device | None = None
) -> Tensor:
    """Radians per position of each pair [D/2], fp32."""
    return theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / -head_dim)


def alibi_slopes(heads: int) -> Tensor:
    """Slopes [H] of Press et al. (arXiv 2108.12409), the interleaved rule for head counts that are
    no power of two.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    return torch.tensor(slopes, dtype=torch.float32)


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


def alibi_bias(slopes: Tensor, start: int, new: int, low: int, mask: Tensor | None) -> Tensor:
    """What scores of queries at start..start+new get for keys at low.. up to the last query: [H, T,
    S] or [B, H, T, S].

    slopes [H]; mask: bool, True = visible, broadcastable to the result; None: what is causal is
    visible.
    """
    queries = torch.arange(start, start + new, device=slopes.device)[:, None]
    keys = torch.arange(low, start + new, device=slopes.device)
    bias = slopes[:, None, None] * (keys - queries).to(slopes.dtype)
    return bias.masked_fill(~(keys <= queries if mask is None else mask), -math.inf)


def attention_with_sinks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    *,
    start: int,
    window: int,
    rope: Tensor | None,
    slopes: Tensor | None,
) -> Tensor:
    """Attention of q [B, H, T, D], at positions start.., over sinks [B, KV, N, D] and k, v [B, KV,
    S, D] that end with it.

    Under one softmax. A sink is never farther than the window reaches: with `rope` (radians per
    position [D/2]) queries are turned back to where they would see it from there, with `slopes`
    (ALiBi) its distance is cut.
    """
    b, heads, new, d = q.shape
    sinks = torch.arange(sink_k.shape[2], device=q.device)
    queries = torch.arange(start, start + new, device=q.device)
    keys = torch.arange(start + new - k.shape[2], start + new, device=q.device)
    seen = queries.clamp(max=len(sinks) + window - 1)  # where a query stands as the sinks see it
    far = q if rope is None else rotate(q, (seen - queries)[:, None] * rope.to(q.device))

    def scores(
        queries: Tensor, keys: Tensor
    ) -> Tensor:  # [B, H, T, D], [B, KV, S, D] -> [B, H, T, S]
        grouped = queries.reshape(b, keys.shape[1], -1, d) * d**-0.5
        return (grouped @ keys.transpose(-1, -2)).view(b, heads, new, -1)

    to_sinks, to_window = scores(far, sink_k), scores(q, k)
    if slopes is not None:
        slopes = slopes.to(q.device, q.dtype)[:, None, None]
        to_sinks = to_sinks + slopes * (sinks - seen[:, None])
        to_window = to_window + slopes * (keys - queries[:, None])
    hidden = (keys > queries[:, None]) | (keys <= queries[:, None] - window)
    to_sinks = to_sinks.masked_fill(sinks > queries[:, None], -math.inf)
    to_window = to_window.masked_fill(hidden, -math.inf)
    weights = torch.softmax(torch.cat((to_sinks, to_window), dim=-1), dim=-1)  # [B, H, T, N + S]
    weights = weights.view(b, k.shape[1], -1, weights.shape[-1])
    return (weights[..., : len(sinks)] @ sink_v + weights[..., len(sinks) :] @ v).view(
        b, heads, new, d
    )
