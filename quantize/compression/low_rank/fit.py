"""Factorize layers in the order in which they run, each fitted to what the original layer gave,
from the inputs that the already factorized layers give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from quantize import calibration as calibrate
from quantize import surgery
from quantize.compression.low_rank import maths, residuals
from quantize.compression.low_rank.spectra import chunks, gradients, noise, usable
from quantize.nn import low_rank as pairs


class GradientMoments:
    """Second moments of gradients at layers' outputs, for as many layers at a time as fit in
    memory.

    Args:
        known: moments that are there already.
        layers: of the original model, in the order in which they are taken.
        collect: gives the moments of some layers.
        memory: bytes.
    """

    def __init__(
        self,
        known: Mapping[str, torch.Tensor],
        layers: Mapping[str, nn.Module],
        collect: Callable[[Mapping[str, nn.Module]], Mapping[str, torch.Tensor]],
        memory: int,
    ) -> None:
        self.known = dict(known)
        self.layers = {name: layer for name, layer in layers.items() if name not in known}
        self.collect = collect
        self.chunks = chunks(self.layers, memory)

    def take(self, name: str) -> torch.Tensor | None:
        """The moment of one layer, [M, M], which is then forgotten; None where there is none."""
        while name in self.layers:
            chunk = self.chunks.pop(0)
            self.known.update(self.collect({key: self.layers.pop(key) for key in chunk}))
        return usable(self.known.pop(name, None))


def fit(
    model: nn.Module,
    result: nn.Module,
    batches: Iterable[Any],
    ranks: Mapping[str, int | None],
    moments: Mapping[str, torch.Tensor],
    *,
    loss: Callable[[Any, Any], torch.Tensor] | None,
    max_passes: int,
    memory: int,
    split: str,
    skipped: dict[str, str],
    say: Callable[[str], None],
) -> nn.Module:
    """Fit the layers `ranks` of `result` in the order in which they run, each on the inputs that
    the done ones give.

    Layers of no rank stay whole, and before the first one of a rank as they are.
    """
    originals = {name: model.get_submodule(name) for name in ranks}
    batch = next(iter(batches))
    calls = calibrate.trace_calls(model, batch, originals)
    late = [name for name in ranks if name not in calls.counts]  # run in later batches only
    groups = [*calls.groups, *([late] if late else [])]
    while groups and all(ranks[name] is None for name in groups[0]):
        del groups[0]
    if not groups:
        return result
    streams = calibrate.find_streams(model, batch, originals)
    groups = merge(groups, max_passes)
    order = [name for group in groups for name in group]
    cut = {name: originals[name] for name in order if ranks[name] is not None}
    gradient_moments = GradientMoments(
        moments, cut, lambda layers: gradients(model, batches, layers, loss), memory
    )
    walk = calibrate.Walk(model, batches, order)
    pace = calibrate.Pace(len(groups))
    for group in groups:
        say(pace.next(f"fitting {', '.join(group)}"))
        seen = residuals.collect(walk, result, model, group, streams)
        for name in group:
            gradient = gradient_moments.take(name)
            if name in seen:
                layer = result.get_submodule(name)
                result = _fit_layer(result, layer, seen.pop(name), gradient, ranks[name], split)
            elif ranks[name] is not None:
                skipped[name] = (
                    "the factorized model gives it no inputs in calibration, or none that are "
                    "finite"
                )
        walk.finish(group)
    return result


@torch.no_grad()
def _fit_layer(
    result: nn.Module,
    layer: nn.Module,
    seen: residuals.Seen,
    gradient: torch.Tensor | None,
    rank: int | None,
    split: str,
) -> nn.Module:
    weight = pairs.matrix(layer).double()
    own_bias: Any = layer.bias
    if own_bias is None:
        moment, cross, error = seen.second_moment, seen.cross_moment, seen.error_moment
    else:  # takes up the means
        floor = noise(seen)
        moment, cross = seen.covariance + floor, seen.cross_covariance + floor
        error = seen.error_covariance
    product = calibrate.compensate(weight, moment, cross, error)
    if rank is not None:
        first, second, product, split = factors(layer, product, moment, gradient, rank, split)
    bias = None
    if own_bias is not None:  # the mean of the outputs stays what it was
        bias = own_bias.double() + weight @ seen.reference_mean - product @ seen.mean
        bias = bias if seen.error_mean is None else bias + seen.error_mean
    if rank is not None:
        return surgery.replace(result, {layer: pairs.pair(layer, first, second, bias, split=split)})
    stored: Any = layer._parameters  # a 16-bit layer's weight reads in another dtype
    stored["weight"].copy_(
        product.T if pairs.is_transposed(layer) else product.reshape(stored["weight"].shape)
    )
    if bias is not None:
        stored["bias"].copy_(bias)
    return result


def factors(
    layer: nn.Module,
    weight: torch.Tensor,
    moment: torch.Tensor | None,
    gradient: torch.Tensor | None,
    rank: int,
    split: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, str]:
    """Weights of the two layers, their product as a matrix [M, K], and the split that was used."""
    m, k = weight.shape
    first, second, _ = maths.whitened_svd(weight, moment, gradient, rank=rank)
    product = second @ first
    if not isinstance(layer, nn.Conv2d) or 1 in layer.kernel_size or split == "channel":
        return first, second, product, "channel"
    kernel = weight.reshape(layer.weight.shape)
    tall, wide = layer.in_channels * kernel.shape[2], m * kernel.shape[3]
    same_size = min(rank * (m + k) // (tall + wide), tall, wide)
    same_size = max(1, same_size // 4 * 4 or same_size)
    spatial = maths.spatial_factors(kernel, moment, gradient, rank=same_size)
    losses = [maths.weighted_error(weight - p, moment, gradient) for p in (product, spatial[2])]
    if split == "spatial" or losses[1] < losses[0]:
        return *spatial, "spatial"
    return first, second, product, "channel"


def merge(groups: list[list[str]], most: int) -> list[list[str]]:
    """At most `most` groups, by joining neighbours."""
    if most < 1:
        raise ValueError(f"max_passes={most} must be at least 1")
    size = math.ceil(len(groups) / most)
    merged = []
    for start in range(0, len(groups), size):
        merged.append([])
        for group in groups[start : start + size]:
            merged[-1].extend(group)
    return merged
