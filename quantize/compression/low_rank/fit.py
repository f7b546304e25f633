"""Factorize layers in the order in which they run, each fitted to what the original layer gave,
from the inputs that the already factorized layers give.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from quantize import calibration as calibrate
from quantize import surgery
from quantize.compression.low_rank import maths, residuals
from quantize.compression.low_rank.spatial import spatial_factors
from quantize.compression.low_rank.spectra import noise, usable
from quantize.nn import low_rank as pairs
from quantize.nn import write_weight
from quantize.saying import Say

MOST_STEPS = 64  # of the walk through the layers; above it, layers share one


def fit(
    result: nn.Module,
    survey: calibrate.Survey,
    ranks: Mapping[str, int | None],
    left: dict[str, str],
    say: Say,
) -> nn.Module:
    """Fit the layers `ranks` of `result`, a shell of the original, in the order in which they run,
    each on the inputs that the done ones give.

    Layers of no rank stay whole, and before the first one of a rank as they are.
    """
    model, batches = survey.model, survey.batches
    groups = _merged(_groups(survey.look.first, ranks))
    if not groups:
        return result
    order = list(itertools.chain.from_iterable(groups))
    first = next(iter(calibrate.of_original(batches)))
    survey.forget(name for name in order if ranks[name] is None)
    survey.plan([name for name in order if ranks[name] is not None], inputs=False)
    streams = calibrate.find_streams(model, first, order)
    walk = calibrate.Walk(model, batches, order, look=survey.look)
    pace = calibrate.Pace(len(groups))
    for group in groups:
        say(pace.next(f"fitting {', '.join(group)}"))
        seen = residuals.collect(walk, result, model, group, streams)
        for name in group:
            rank = ranks[name]
            if name in seen:
                layer = result.get_submodule(name)
                gradient = None if rank is None else usable(survey.gradient(name))
                result = _fit_layer(result, layer, seen.pop(name), gradient, rank)
            elif rank is not None:
                left[name] = (
                    "the factorized model gives it no inputs in calibration, or none that are "
                    "finite"
                )
        walk.finish(group)
        survey.forget(group)
    return result


def _groups(first: calibrate.Calls, ranks: Mapping[str, int | None]) -> list[list[str]]:
    """The layers by what they read, in the order in which they run, from the first one that gets a
    rank on.
    """
    groups = [[name for name in group if name in ranks] for group in first.groups]
    groups.append([name for name in ranks if name not in first.counts])  # run in later batches only
    groups = [group for group in groups if group]
    ranked = [any(ranks[name] is not None for name in group) for group in groups]
    return groups[ranked.index(True) :] if any(ranked) else []


@torch.no_grad()
def _fit_layer(
    result: nn.Module,
    layer: nn.Module,
    seen: residuals.Seen,
    gradient: Any,
    rank: int | None,
) -> nn.Module:
    """`result` with a layer fitted to what it is to give: as a pair of a rank, or whole."""
    weight = pairs.matrix(layer).double()
    own_bias: Any = layer.bias
    centred = own_bias is not None  # a bias takes up the means
    floor = noise(seen, centred=centred)
    fitted, moment = seen.fit(weight, centred=centred, floor=floor)
    pair = None
    if rank is not None:
        weighing = maths.with_unseen(moment, seen.count)
        first, second, fitted, used = factors(layer, fitted, weighing, gradient, rank)
        pair = partial(pairs.pair, layer, first, second, split=used)
    bias = None
    if centred:
        bias = seen.target_mean(weight, own_bias.double()) - fitted @ seen.mean
    if pair is not None:
        return surgery.replace(result, {layer: pair(bias)})
    for name, parameter in list(layer.named_parameters(recurse=False)):
        layer._parameters[name] = copy.deepcopy(parameter)  # its own, not another layer's too
    write_weight(layer, fitted, bias)
    return result


def factors(
    layer: nn.Module,
    weight: torch.Tensor,
    moment: torch.Tensor | calibrate.Outer | None,
    gradient: Any,
    rank: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, str]:
    """Weights of the two layers, their product as a matrix [M, K], and the split that was used: of
    a k x k convolution "spatial" (k x 1, then 1 x k) where that loses less, in no more parameters,
    than "channel" (k x k, then 1 x 1).
    """
    m, k = weight.shape
    cut = maths.whitened_svd(weight, moment, gradient, rank=rank)
    first, second = cut.first, cut.second
    product = second @ first
    if not isinstance(layer, nn.Conv2d) or 1 in layer.kernel_size:
        return first, second, product, "channel"
    kernel = weight.reshape(layer.weight.shape)
    tall, wide = layer.in_channels * kernel.shape[2], m * kernel.shape[3]
    same_size = min(rank * (m + k) // (tall + wide), tall, wide)
    same_size = max(1, same_size // 4 * 4 or same_size)
    spatial = spatial_factors(kernel, moment, gradient, rank=same_size)
    if maths.weighted_error(weight - spatial[2], moment, gradient) < cut.loss:
        return *spatial, "spatial"
    return first, second, product, "channel"


def _merged(groups: list[list[str]]) -> list[list[str]]:
    """At most `MOST_STEPS` groups, by joining neighbours."""
    size = max(1, math.ceil(len(groups) / MOST_STEPS))
    starts = range(0, len(groups), size)
    return [list(itertools.chain.from_iterable(groups[i : i + size])) for i in starts]
