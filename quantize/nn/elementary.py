"""exp, and activations, on float32 tensors, one IEEE operation after the other.

Every library rounds its own exp and erf differently. These give the bits of compiled C++
(`native/elementary.h`) on every CPU; they are as exact as torch's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantize.native.tails import LIMIT, STEPS, TAILS


def exponential(x: Tensor) -> Tensor:
    """exp of float32 to 2e-7 of its size between -80 and 80, and no further."""
    x = x.clamp(-80.0, 80.0)
    n = (x * 1.44269504).round()
    r = x - n * 0.693359375 + n * 2.12194440e-4
    p = r * 1.9875691500e-4 + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    power = ((n.nan_to_num().to(torch.int32) + 127) << 23).view(torch.float32)
    return (p * r * r + r + 1.0) * power


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
    tail = powers[4]
    for coefficient in powers[3::-1]:
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
