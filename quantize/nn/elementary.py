"""exp, and activations, on float32 tensors, one IEEE operation after the other.

Every library rounds its own exp and erf differently. These give the bits of compiled C++
(`native/elementary.h`) on every CPU; they are as exact as torch's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantize.native.tails import LIMIT, STEPS, TAILS

# 2^(n / 16) for n from 0 to 15
_POWERS = (torch.arange(16, dtype=torch.float64, device="cpu") / 16).exp2().float()


def exponential(x: Tensor) -> Tensor:
    """exp of float32 between -80 and 80, and no further: to 1.1e-6 of its size, and to 2.2e-7
    between -4 and 4.
    """
    x = x.clamp(-80.0, 80.0)
    n = (x * 23.0831203).round()
    r = x - n * 0.0433216989
    p = (r * 0.166666672 + 0.5) * r * r + r
    whole = n.nan_to_num().to(torch.int32)
    power = _POWERS.to(x.device)[(whole & 15).long()]
    scale = (((whole >> 4) + 127) << 23).view(torch.float32)
    return (power + power * p) * scale


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    return (exponential(-x) + 1.0).reciprocal()


def tanh(x: Tensor) -> Tensor:
    """2 / (1 + exp(-2 x)) - 1."""
    return (exponential(x * -2.0) + 1.0).reciprocal() * 2.0 - 1.0


def gelu(x: Tensor) -> Tensor:
    """0.5 x (1 + erf(x / sqrt(2)))."""
    return _with_tail(x, TAILS["gelu"])


def gelu_tanh(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    return _with_tail(x, TAILS["gelu_tanh"])


def _with_tail(x: Tensor, tails: Tensor) -> Tensor:
    """relu(x) - |x| tail(|x|); see `native.tails`."""
    size = x.abs()
    within = torch.where(size < LIMIT, size, LIMIT)
    place = within * STEPS
    point = place.round()
    powers = tails.to(x.device)[:, point.long()].unbind()
    tail = powers[3]
    for coefficient in powers[2::-1]:
        tail = tail * (place - point) + coefficient
    return torch.where(x < 0, 0.0, x) - within * tail


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x))."""
    return x * sigmoid(x)


# By name.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": silu,
    "sigmoid": sigmoid,
}


def check_activation(name: str | None) -> None:
    """Raise ValueError for one from a file that there isn't."""
    if name is not None and name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r} is none of {', '.join(ACTIVATIONS)}")
