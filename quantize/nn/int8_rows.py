"""Weights and activations in 8 bits: scales by output channel, steps and zero points by row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quantize.nn import gptq

GROUP = 64  # columns whose rounding errors are spread at a time
CHUNK = 1 << 17  # activations quantized at a time, so that the steps find them in the cache
_SMALLEST = 1e-30  # step of a row of zeros


class Rows(NamedTuple):
    """Rows in 8 bits: x is about (q + shift) * step."""

    q: Tensor  # int8 [M, K]; 128 less than in `int8_kernels`' header
    step: Tensor  # float32 [M, 1]
    shift: Tensor  # int32 [M, 1]


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`[N, K]` of any float dtype to int8 `[N, K]` in -127..127 and one float32 scale per output
    channel, `[N]`.
    """
    weight = weight.detach().float()
    scale = weight.abs().amax(1) / 127
    q = (
        torch.where(scale[:, None] > 0, weight / scale[:, None], 0.0)
        .round_()
        .clamp_(-127, 127)
        .to(torch.int8)
    )
    return q.contiguous(), scale


def quantize_weight_for(weight: Tensor, second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """As `quantize_weight`, with a small error for inputs of this second moment [K, K] (`gptq`)."""
    weight = weight.detach().float()
    scale = quantize_weight(weight)[1].unsqueeze(1)
    step = torch.where(scale > 0, scale, 1.0)

    def nearest(column: Tensor) -> Tensor:
        return (column / step).round_().clamp_(-127, 127) * step

    dense = gptq.rounded(weight, second_moment, GROUP, lambda _: nearest)
    return (dense / step).round_().to(torch.int8), scale.squeeze(1)


def quantize_rows(x: Tensor) -> Rows:
    """`[M, K]` of a float dtype in 8 bits, as the header of `int8_kernels` says.

    A row with a NaN or an infinity gets a step of NaN: no output of it is finite.
    """
    x = x.float()
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    low, high = low.clamp_max(0), high.clamp_min(0)
    step = high * (1 / 255) - low * (1 / 255)
    step = (step + (step - step)).clamp_min(_SMALLEST)  # infinity becomes NaN
    inverse = step.reciprocal()
    shift = (low * inverse).round() + 128
    q = (x * inverse).round_().sub_(shift).clamp_(-128, 127).to(torch.int8)
    return Rows(q, step, shift.to(torch.int32))


def quantize_many_rows(x: Tensor) -> Rows:
    """`quantize_rows`, a cache-sized piece at a time."""
    step = max(16, CHUNK // x.shape[1])
    q, steps, shifts = zip(*map(quantize_rows, x.split(step)), strict=True)
    return Rows(torch.cat(q), torch.cat(steps), torch.cat(shifts))
