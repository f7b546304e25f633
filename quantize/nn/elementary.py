"""exp, erf and the activations made of them, on float32 tensors, one IEEE operation after the
other.

Every library rounds its own exp and erf differently. These give the bits of compiled C++
(`native/elementary.h`) on every CPU; they are as exact as torch's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


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


def error_function(x: Tensor) -> Tensor:
    """erf of float32 to 5e-7, by polynomials in x^2 as in XLA and Eigen, never above 1."""
    x = x.clamp(-3.8325069, 3.8325069)
    s = x * x
    p = s * 2.2905066e-4 + 3.4082910e-3
    p = p * s + 5.0955696e-2
    p = p * s + 1.8520832e-1
    p = p * s + 1.1283791
    q = s * -1.1791603e-7 + 2.3547966e-5
    q = q * s + 1.0179626e-3
    q = q * s + 1.4070470e-2
    q = q * s + 1.1098505e-1
    q = q * s + 4.9746925e-1
    q = q * s + 1.0
    return (x * p / q).clamp(-1.0, 1.0)


def gelu(x: Tensor) -> Tensor:
    """0.5 x (1 + erf(x / sqrt(2)))."""
    return x * 0.5 * (error_function(x * 0.70710678) + 1.0)


def gelu_tanh(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    return x * sigmoid((x * x * 0.071354816 + 1.5957691) * x)


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x))."""
    return x * sigmoid(x)


# By name, in the order of `Activation` in native/elementary.h after NONE.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": silu,
}
