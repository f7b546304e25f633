"""Activation modules that an int8 linear layer can do the work of."""

from __future__ import annotations

import torch
from torch import nn

from quantize import surgery
from quantize.nn.elementary import ACTIVATIONS

_HOMES = ("torch.nn.modules.activation", "transformers.activations")
_CLOSE = 3e-6  # of values up to 12, which float32 rounds by 1e-6


def activation_of(module: nn.Module) -> str | None:
    """The name in `ACTIVATIONS` of what the module computes; None for any other module.

    Only modules of torch and transformers without tensors or hooks are asked. Which one it is, is
    told by what it computes.
    """
    if type(module).__module__ not in _HOMES or not surgery.is_plain(module, [type(module)]):
        return None
    if module._parameters or module._buffers or not _is_elementwise(module):
        return None
    x = torch.linspace(-12, 12, 4001, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        expected = module(x.clone())
    for name, function in ACTIVATIONS.items():
        if torch.allclose(function(x), expected, rtol=0, atol=_CLOSE):
            return name
    return None


def _is_elementwise(module: nn.Module) -> bool:
    """Is it of a kind that treats every number alike, without a limit that an example may miss?"""
    return type(module).__name__ in _ELEMENTWISE


_ELEMENTWISE = (
    "ReLU",
    "GELU",
    "SiLU",
    "Sigmoid",
    "GELUActivation",
    "GELUTanh",
    "NewGELUActivation",
    "FastGELUActivation",
    "AccurateGELUActivation",
    "SiLUActivation",
)
