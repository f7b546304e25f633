"""Run the user's batches through a model once and keep what the techniques need: per-layer input statistics.

A batch is what `torch.export.export` takes as example inputs: a tensor, a tuple of positional arguments, or a dict of keyword
arguments. Statistics are sums over rows, so memory is bounded by the width of a layer and not by the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def call(model: nn.Module, batch: Any) -> Any:
    """Run `model` on a batch: a tensor, a tuple of positional arguments or a dict of keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def check_batches(batches: Iterable[Any], name: str = "calibration") -> Iterable[Any]:
    """Return `batches`; TypeError for an iterator (it could be read only once), ValueError when there is no batch in it."""
    if isinstance(batches, (torch.Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise TypeError(f"{name} must be a sequence of batches, got {type(batches).__name__}; for one batch write [batch]")
    if iter(batches) is batches:
        raise TypeError(f"{name} must be re-iterable, got an iterator ({type(batches).__name__}); write list(...)")
    if next(iter(batches), None) is None:
        raise ValueError(f"{name} is empty: at least one batch is needed")
    return batches


def rows(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The vectors that `layer`'s weight multiplies, as [N, K].

    Linear: [..., K] flattened. Conv2d of one group: patches of [B, C, H, W], K = C * kernel height * kernel width.
    """
    if isinstance(layer, nn.Conv2d):
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=_PAD_MODES[layer.padding_mode])
            padding: Any = 0
        else:
            padding = layer.padding
        patches = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)  # [B, K, L]
        return patches.transpose(1, 2).reshape(-1, patches.shape[1])
    return x.reshape(-1, x.shape[-1])


_PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


@dataclass
class InputStatistics:
    """Sums over the rows a layer has seen; K is the layer's input width (see `rows`)."""

    count: int = 0
    total: torch.Tensor | float = 0.0  # [K]
    outer: torch.Tensor | float = 0.0  # [K, K], sum of x x^T
    largest: torch.Tensor | float = 0.0  # [K], max of |x|

    def update(self, x: torch.Tensor, *, outer: bool = True) -> None:
        """Add rows x: [N, K]."""
        x = x.detach().float()
        if x.numel() == 0:
            return
        self.count += x.shape[0]
        self.total = self.total + x.sum(0)
        if outer:
            self.outer = self.outer + x.T @ x
        magnitude = x.abs().amax(0)
        self.largest = torch.maximum(self.largest, magnitude) if torch.is_tensor(self.largest) else magnitude

    @property
    def mean(self) -> torch.Tensor:
        """E[x], [K]."""
        return self.total / self.count

    @property
    def second_moment(self) -> torch.Tensor:
        """E[x x^T], [K, K]."""
        return self.outer / self.count


@torch.no_grad()
def collect(
    model: nn.Module, batches: Iterable[Any], layers: Mapping[str, nn.Module], *, outer: bool = True
) -> dict[str, InputStatistics]:
    """Input statistics of each layer of `model` in `layers` (name to module) over all batches, in eval mode.

    Raises ValueError for empty batches, for a layer no batch reaches, and for inputs that are not finite (naming the layer).
    """
    check_batches(batches)
    statistics = {name: InputStatistics() for name in layers}

    def watch(name: str, layer: nn.Module):
        return layer.register_forward_pre_hook(
            lambda _, args, kwargs: statistics[name].update(
                rows(layer, args[0] if args else next(iter(kwargs.values()))), outer=outer
            ),
            with_kwargs=True,
        )

    modes = [(m, m.training) for m in model.modules()]
    hooks = [watch(name, layer) for name, layer in layers.items()]
    try:
        model.eval()
        for batch in batches:
            call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    for name, seen in statistics.items():
        if seen.count == 0:
            raise ValueError(f"calibration never reaches layer {name!r}: give batches that use it, or skip it")
        if not torch.isfinite(seen.largest).all():
            raise ValueError(f"calibration gives layer {name!r} inputs that are not finite")
    return statistics
