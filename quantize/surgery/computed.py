"""Weights that a hook computes before each call from other parameters: torch's older weight_norm
and spectral_norm, and pruning masks.

They stand in an attribute, as they were at the last call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_KINDS = (WeightNorm, SpectralNorm, BasePruningMethod)


def computing_hooks(module: nn.Module) -> dict[int, str]:
    """The attributes that such hooks of `module` set, by the hooks' keys."""
    hooks = module._forward_pre_hooks.items()
    return {key: _attribute(hook) for key, hook in hooks if isinstance(hook, _KINDS)}


def _attribute(hook: Any) -> str:
    return getattr(hook, "name", None) or hook._tensor_name


@torch.no_grad()
def recompute_weights(model: nn.Module) -> None:
    """Compute them from the parameters as they are, in place, for who reads them between calls."""
    for module in model.modules():
        keys = computing_hooks(module)
        if not keys:
            continue
        training = module.training
        module.training = False  # where a spectral norm keeps its vectors
        for key in keys:
            module._forward_pre_hooks[key](module, ())
        module.training = training
