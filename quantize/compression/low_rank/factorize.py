"""Walk a model, choose a rank for every linear and convolution, and put pairs of smaller layers in
their places.

With calibration, three things make the result far better than cutting the SVD of each weight
(`maths` has the formulas): the SVD is whitened by the moments of the layer's inputs and of the
gradients at its output; one global budget goes where the loss per parameter is highest; and layers
are done in the order in which they run, each fitted to what the original layer gave, from the
inputs that the already factorized layers give, so that errors are repaired downstream instead of
piling up. Layers that the budget leaves whole are fitted too, and a layer whose output is added to
a residual stream also takes back the error that the stream has there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from quantize import calibration as calibrate
from quantize import surgery
from quantize.compression.low_rank import budget as budgets
from quantize.compression.low_rank import maths, residuals
from quantize.compression.low_rank.candidates import check_weights, find_layers, reached
from quantize.compression.low_rank.notes import write_down
from quantize.nn import low_rank as pairs

# times the mean square of inputs: the variance up to which they count as constant (roundings:
# 1e-15)
NOISE = 1e-10


def factorize_low_rank(
    model: nn.Module,
    *,
    ratio: float | Mapping[str, float] | None = None,
    energy: float | Mapping[str, float] | None = None,
    rank: int | Mapping[str, int] | None = None,
    calibration: Iterable[Any] | None = None,
    skip: surgery.Skip = (),
    split: str = "auto",
    only_faster: bool | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    max_passes: int = 64,
    memory: int = 1 << 30,
    progress: Callable[[str], None] | None = None,
) -> nn.Module:
    """A copy of `model`, in eval mode, whose linears and convolutions are pairs of low rank where
    that is smaller.

    Give at most one budget (none: ratio=0.5); each may be a dict from module name or glob to value,
    and then only the layers it names are touched, each within its own value.
      ratio: fraction in (0, 1] of the layers' parameters that is kept. A number is one budget for
          all layers together; layers
        that matter more keep more, some all. 1 changes nothing.
      energy: fraction in (0, 1] of each layer's (whitened) squared singular values that is kept.
      rank: rank of each layer as given, at most min(in, out). Ranks from ratio and energy are
          rounded to multiples of 8 or 16.
    calibration: re-iterable batches as for `torch.export.export`. With it, layers that are kept
        whole, but come after one that
      is not, get new weights too. Without it each weight is cut by its plain SVD at the same ratio,
      which is much worse.
    skip: names, globs, types. Always skipped, with the reason in `summary(result)`: weights that
        other modules read or share,
      grouped convolutions, layers that no rank makes smaller.
    split: how k x k convolutions are cut: "channel" (k x k, then 1 x 1), "spatial" (k x 1, then 1 x
        k), or "auto", whichever
      loses less in no more parameters than the channel split of that rank.
    only_faster: factorize only where a pair is no slower by timing on this machine, on inputs
        shaped like the first batch's.
      Default: where there is calibration and the budget isn't given layer by layer (rank, a dict),
      for layers that take at least 0.1 ms. True: everywhere, also where only the time of a call
      counts. False: don't time. A number for ratio keeps the pairs of layers that aren't timed
      below 0.8 of their parameters, where they were no slower on the machines we had.
    loss: loss(output, batch), a scalar summed over rows, whose gradients weigh errors; default
        `calibration.fisher_loss`.
    max_passes: limit on calibration passes after the first; above it, layers share a pass. memory:
        bytes of second moments kept
      at a time. progress: called with a line for people before each piece of work, with the layers'
      names.

    Raises ValueError for a budget out of range, two budgets, no layer to act on, a ratio that no
    ranks reach, weights or calibration inputs that are not finite, and a result that doesn't run;
    TypeError for wrong types. A layer that no batch reaches is left, by name. Warns where little of
    the model was touched.
    """
    kind, value = budgets.read_budget(ratio, energy, rank)
    if split not in ("auto", "channel", "spatial"):
        raise ValueError(f"split is {split!r}; allowed: 'auto', 'channel', 'spatial'")
    if only_faster and calibration is None:
        raise ValueError(
            "only_faster=True needs calibration: timing needs the shapes of the layers' inputs"
        )
    say = progress or (lambda line: None)
    result = surgery.clone(model).eval()
    model = surgery.uncompiled(model)
    layers, skipped = find_layers(result, skip)
    values = budgets.per_layer(kind, value, layers, model)
    layers = {name: layers[name] for name in values}
    check_weights(layers)
    if any(tensor.is_inference() for tensor in model.parameters()):
        model = surgery.clone(model)  # made under inference_mode, it takes no gradients
    if calibration is not None:
        layers, idle = reached(model, calibration, layers)
        skipped.update(idle)
        values = {name: values[name] for name in layers}
    if kind == "ratio" and all(v == 1 for v in values.values()):
        ranks: dict[str, int | None] = dict.fromkeys(layers)
        moments: dict[str, torch.Tensor] = {}
    else:
        spectra, moments = _spectra(model, calibration, layers, loss, memory, say)
        by_layer = kind == "rank" or isinstance(value, Mapping)
        if only_faster is None and by_layer:
            only_faster = False
        free = kind == "ratio" and not by_layer
        allowed = budgets.allowed_ranks(
            model, calibration, layers, global_ratio=free, only_faster=only_faster
        )
        for name in [name for name in layers if not allowed[name]]:
            skipped[name] = "no rank is as fast on this machine"
            del layers[name]
        if not layers:
            raise ValueError(
                f"no pair is as fast as its layer on this machine ({len(values)} layers tried); "
                f"only_faster=False doesn't ask"
            )
        ranks = budgets.choose_ranks(
            kind, value, values, layers, spectra, allowed, weighted=calibration is not None
        )
    for name, r in ranks.items():
        if r is None:
            skipped[name] = (
                "kept whole: the budget is better spent elsewhere"
                if kind == "ratio"
                else "no gain at this rank"
            )
    if calibration is None:
        for name, r in ranks.items():
            if r is None:
                continue
            layer = layers[name]
            first, second, _, split_used = _factors(
                layer, pairs.matrix(layer), None, None, r, split
            )
            result = surgery.replace(
                result, {layer: pairs.pair(layer, first, second, layer.bias, split=split_used)}
            )
    else:
        ranks = {
            name: ranks.get(name) for name in values
        }  # also layers of which no pair is fast enough
        result = _fit(
            model, result, calibration, ranks, moments, loss, max_passes, split, skipped, say
        )
    surgery.round_stored(result)
    write_down(result, model, skipped, calibration, warn=not isinstance(value, Mapping))
    return result


# Calibration.


def _spectra(
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
    spectra, unweighted, kept = {}, [], {}
    keep = sum(pairs.matrix(layer).shape[0] ** 2 * 4 for layer in layers.values()) <= memory
    for chunk in _chunks(layers, memory):
        say(f"inputs and gradients of {', '.join(chunk)}")
        originals = {name: model.get_submodule(name) for name in chunk}
        statistics = calibrate.collect(model, batches, originals)
        gradients = _gradients(model, batches, originals, loss)
        for name in chunk:
            seen, weight = statistics.pop(name), pairs.matrix(layers[name])
            biased = layers[name].bias is not None
            moment = seen.covariance + _noise(seen) if biased else seen.second_moment
            gradient = _usable(gradients.pop(name, None))
            if gradient is None:
                unweighted.append(name)
            elif keep:
                kept[name] = gradient
            spectra[name] = maths.whitened_spectrum(weight, moment, gradient) * math.sqrt(
                seen.count
            )
    # A layer whose output the loss doesn't depend on has no loss to compare: it counts as much as
    # the median layer.
    norms = sorted(spectra[name].norm().item() for name in spectra if name not in unweighted) or [
        1.0
    ]
    for name in unweighted:
        spectra[name] = spectra[name] * (
            norms[len(norms) // 2] / spectra[name].norm().clamp_min(1e-300)
        )
    return spectra, kept


def _usable(gradient: torch.Tensor | None) -> torch.Tensor | None:
    ok = gradient is not None and torch.isfinite(gradient).all() and gradient.diagonal().sum() > 0
    return gradient if ok else None


def _chunks(layers: Mapping[str, nn.Module], memory: int) -> list[list[str]]:
    """Layers in order, in runs whose second moments fit in `memory` bytes (at least one layer
    each).
    """
    chunks: list[list[str]] = [[]]
    used = 0
    for name, layer in layers.items():
        size = sum(width**2 * 4 for width in pairs.matrix(layer).shape)
        if chunks[-1] and used + size > memory:
            chunks.append([])
            used = 0
        chunks[-1].append(name)
        used += size
    return chunks


def _fit(
    model: nn.Module,
    result: nn.Module,
    batches: Iterable[Any],
    ranks: Mapping[str, int | None],
    moments: Mapping[str, torch.Tensor],
    loss: Callable[[Any, Any], torch.Tensor] | None,
    max_passes: int,
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
    streams = calibrate.find_streams(model, batch, originals) if groups else set()
    once = all(count == 1 for count in calls.counts.values()) and not late
    groups = _merge(groups, max_passes)
    for number, group in enumerate(groups, 1):
        say(f"fitting {', '.join(group)} ({number}/{len(groups)})")
        seen = residuals.collect(
            result, model, batches, group, streams, calls=len(group) if once else None
        )
        lacking = {name: originals[name] for name in group if name not in moments and ranks[name]}
        gradients = {**moments, **_gradients(model, batches, lacking, loss)}
        for name in group:
            layer = result.get_submodule(name)
            if name in seen:
                result = _fit_layer(
                    result, layer, seen.pop(name), _usable(gradients.get(name)), ranks[name], split
                )
            elif ranks[name] is not None:
                skipped[name] = (
                    "the factorized model gives it no inputs in calibration, or none that are "
                    "finite"
                )
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
    if layer.bias is not None:  # takes up the means
        noise = _noise(seen)
        moment, cross, error = (
            seen.covariance + noise,
            seen.cross_covariance + noise,
            seen.error_covariance,
        )
    else:
        moment, cross, error = seen.second_moment, seen.cross_moment, seen.error_moment
    product = calibrate.compensate(weight, moment, cross, error)
    if rank is not None:
        first, second, product, split = _factors(layer, product, moment, gradient, rank, split)
    bias = None
    if layer.bias is not None:  # the mean of the outputs stays what it was
        bias = layer.bias.double() + weight @ seen.reference_mean - product @ seen.mean
        bias = bias if seen.error_mean is None else bias + seen.error_mean
    if rank is not None:
        return surgery.replace(result, {layer: pairs.pair(layer, first, second, bias, split=split)})
    stored = layer._parameters  # a 16-bit layer's weight reads in another dtype
    stored["weight"].copy_(
        product.T if pairs.is_transposed(layer) else product.reshape(layer.weight.shape)
    )
    if bias is not None:
        stored["bias"].copy_(bias)
    return result


def _noise(seen: calibrate.InputStatistics) -> torch.Tensor:
    """A covariance [K, K] below which differences between inputs are roundings: nothing is fitted
    to those.
    """
    power = seen.second_moment.diagonal().mean()
    return NOISE * power * torch.eye(len(seen.mean), dtype=torch.float64, device=power.device)


def _gradients(
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


def _factors(
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
    return (
        (*spatial, "spatial")
        if split == "spatial" or losses[1] < losses[0]
        else (first, second, product, "channel")
    )


def _merge(groups: list[list[str]], most: int) -> list[list[str]]:
    """At most `most` groups, by joining neighbours."""
    if most < 1:
        raise ValueError(f"max_passes={most} must be at least 1")
    size = math.ceil(len(groups) / most) if groups else 1
    return [
        [name for group in groups[i : i + size] for name in group]
        for i in range(0, len(groups), size)
    ]
