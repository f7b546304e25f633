"""Whitened spectra of the original model's layers: what each loses at each rank, in one unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from quantize import calibration as calibrate
from quantize.compression.low_rank import maths
from quantize.nn import low_rank as pairs

# times the mean square of inputs: the variance up to which they count as constant (roundings:
# 1e-15)
NOISE = 1e-10


def spectra(
    model: nn.Module,
    batches: Iterable[Any] | None,
    layers: Mapping[str, nn.Module],
    loss: Callable[[Any, Any], torch.Tensor] | None,
    memory: int,
    say: Callable[[str], None],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Whitened spectra of the original model's layers, in one unit of loss, and the gradient
    moments that fit in memory.
    """
    if batches is None:
        return {
            name: maths.whitened_spectrum(pairs.matrix(layer)) for name, layer in layers.items()
        }, {}
    found: dict[str, torch.Tensor] = {}
    unweighted: list[str] = []
    kept: dict[str, torch.Tensor] = {}
    outputs = [pairs.matrix(layer).shape[0] for layer in layers.values()]
    keep = sum(width**2 * 4 for width in outputs) <= memory
    for chunk in chunks(layers, memory):
        say(f"inputs and gradients of {', '.join(chunk)}")
        originals = {name: model.get_submodule(name) for name in chunk}
        statistics = calibrate.collect(model, batches, originals)
        moments = gradients(model, batches, originals, loss)
        for name in chunk:
            seen, weight = statistics.pop(name), pairs.matrix(layers[name])
            biased = layers[name].bias is not None
            moment = seen.covariance + noise(seen) if biased else seen.second_moment
            gradient = usable(moments.pop(name, None))
            if gradient is None:
                unweighted.append(name)
            elif keep:
                kept[name] = gradient
            of_one_row = maths.whitened_spectrum(weight, moment, gradient)
            found[name] = of_one_row * math.sqrt(seen.count)
    # A layer whose output the loss doesn't depend on has no loss to compare: it counts as much as
    # the median layer.
    norms = sorted(found[name].norm().item() for name in found if name not in unweighted) or [1.0]
    median = norms[len(norms) // 2]
    for name in unweighted:
        found[name] = found[name] * (median / found[name].norm().clamp_min(1e-300))
    return found, kept


def usable(gradient: torch.Tensor | None) -> torch.Tensor | None:
    ok = gradient is not None and torch.isfinite(gradient).all() and gradient.diagonal().sum() > 0
    return gradient if ok else None


def chunks(layers: Mapping[str, nn.Module], memory: int) -> list[list[str]]:
    """Layers in order, in runs whose second moments fit in `memory` bytes (at least one layer
    each).
    """
    runs: list[list[str]] = [[]]
    used = 0
    for name, layer in layers.items():
        size = sum(width**2 * 4 for width in pairs.matrix(layer).shape)
        if runs[-1] and used + size > memory:
            runs.append([])
            used = 0
        runs[-1].append(name)
        used += size
    return runs


def noise(seen: calibrate.InputStatistics) -> torch.Tensor:
    """A covariance [K, K] below which differences between inputs are roundings: nothing is fitted
    to those.
    """
    power = seen.second_moment.diagonal().mean()
    return NOISE * power * torch.eye(len(seen.mean), dtype=torch.float64, device=power.device)


def gradients(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Mapping[str, nn.Module],
    loss: Callable[[Any, Any], torch.Tensor] | None,
) -> dict[str, torch.Tensor]:
    if not layers:
        return {}
    if loss is None:
        return calibrate.gradients_if_any(model, batches, layers)
    return calibrate.collect_gradients(model, batches, layers, loss=loss)
