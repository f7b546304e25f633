"""Walk a model, choose a rank for every linear and convolution, and put pairs of smaller layers in their places.

With calibration, three things make the result far better than cutting the SVD of each weight (`maths` has the formulas):
the SVD is whitened by the moments of the layer's inputs and of the gradients at its output; one global budget goes where the
loss per parameter is highest; and layers are done in the order in which they run, each fitted to what the original layer gave,
from the inputs that the already factorized layers give, so that errors are repaired downstream instead of piling up.
"""

from __future__ import annotations

import fnmatch
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from quantize import calibration as calibrate
from quantize import surgery
from quantize.low_rank import layers as pairs
from quantize.low_rank import maths

log = logging.getLogger(__name__)
Budget = float | int | Mapping[str, float | int]


def factorize_low_rank(
    model: nn.Module,
    *,
    ratio: float | Mapping[str, float] | None = None,
    energy: float | Mapping[str, float] | None = None,
    rank: int | Mapping[str, int] | None = None,
    calibration: Iterable[Any] | None = None,
    skip: surgery.Skip = (),
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    max_passes: int = 64,
    memory: int = 1 << 30,
) -> nn.Module:
    """A copy of `model`, in eval mode, whose linears and convolutions are pairs of low rank where that is smaller.

    Give at most one budget (none: ratio=0.5); each may be a dict from module name or glob to value, and then only the layers it
    names are touched, each within its own value.
      ratio: fraction in (0, 1] of the layers' parameters that is kept. A number is one budget for all layers together; layers
        that matter more keep more, some all. 1 changes nothing.
      energy: fraction in (0, 1] of each layer's (whitened) squared singular values that is kept.
      rank: rank of each layer as given, at most min(in, out). Ranks from ratio and energy are rounded to multiples of 8 or 16.
    calibration: re-iterable batches as for `torch.export.export` (16k rows are plenty). Without it each weight is cut by
      its plain SVD at the same ratio, which is much worse.
    skip: names, globs, types. Always skipped, with the reason in `summary(result)`: weights that other modules read or share,
      grouped convolutions, layers that no rank makes smaller.
    loss: loss(output, batch), a scalar summed over rows, whose gradients weigh errors; default `calibration.fisher_loss`.
    max_passes: limit on calibration passes after the first; above it, layers share a pass. memory: bytes of second moments kept
      at a time.

    Raises ValueError for a budget out of range, two budgets, no layer to act on, a ratio that no ranks reach, weights or
    calibration inputs that are not finite, and a layer that no batch reaches (naming it); TypeError for wrong types.
    """
    kind, value = _budget(ratio, energy, rank)
    result = surgery.clone(model).eval()
    layers, skipped = find_layers(result, skip)
    values = _per_layer(kind, value, layers, model)
    layers = {name: layers[name] for name in values}
    _check_weights(layers)
    if calibration is not None:
        calibrate.check_batches(calibration)
    if kind == "ratio" and all(v == 1 for v in values.values()):
        ranks: dict[str, int | None] = dict.fromkeys(layers)
        moments: dict[str, torch.Tensor] = {}
    else:
        spectra, moments = _spectra(model, calibration, layers, loss, memory)
        ranks = _ranks(kind, value, values, layers, spectra, weighted=calibration is not None)
    for name, r in ranks.items():
        if r is None:
            skipped[name] = "kept whole: the budget is better spent elsewhere" if kind == "ratio" else "no smaller at this rank"
    chosen = {name: r for name, r in ranks.items() if r is not None}
    if calibration is None:
        for name, r in chosen.items():
            first, second, _ = maths.whitened_svd(pairs.matrix(layers[name]), rank=r)
            result = surgery.replace(result, {layers[name]: pairs.pair(layers[name], first, second, layers[name].bias)})
    else:
        result = _fit(model, result, calibration, chosen, moments, loss, max_passes)
    for name, reason in skipped.items():
        log.info("%s: %s", name, reason)
    result.__dict__["low_rank_skipped"] = skipped
    return result


def summary(model: nn.Module) -> dict[str, str]:
    """What `factorize_low_rank` did, by module name: the rank of each pair, the reason for each layer left as it was."""
    done = {
        name: f"rank {m.rank} of {min(m.weight_shape()[0], math.prod(m.weight_shape()[1:]))}"
        for name, m in model.named_modules()
        if isinstance(m, pairs.Pair)
    }
    return {**done, **model.__dict__.get("low_rank_skipped", {})}


# Which layers.


def find_layers(model: nn.Module, skip: surgery.Skip) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Layers that can be factorized, by name, and the reasons for those that can't. ValueError if there are none."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(name)
    inside = {id(m) for owner in model.modules() if isinstance(owner, nn.MultiheadAttention) for m in owner.modules()}
    inside |= {id(m) for owner in model.modules() if isinstance(owner, pairs.Pair) for m in owner.children()}
    out = surgery.skip_filter(model, skip)
    found: dict[str, nn.Module] = {}
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        if pairs.linear_shape(module) is None and not isinstance(module, nn.Conv2d):
            continue
        obstacle = "skipped by name" if out(name, module) else _obstacle(module, name, users, id(module) in inside)
        if obstacle:
            reasons[name] = obstacle
        else:
            found[name] = module
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no layer to factorize: looked for nn.Linear, nn.Conv2d of one group and Conv1D; "
            f"left out: {reasons or 'none'}"
        )
    return found, reasons


def _obstacle(module: nn.Module, name: str, users: Mapping[int, Sequence[str]], inside: bool) -> str | None:
    weight = module._parameters.get("weight")
    if inside:
        return "its owner reads the weight directly"
    if weight is None:
        return "its weight isn't a plain parameter"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "it has no shape yet: run the model once"
    if not pairs.is_transposed(module) and type(module).forward not in (nn.Linear.forward, nn.Conv2d.forward):
        return f"{type(module).__name__} computes in its own way"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return f"a convolution of {module.groups} groups"
    others = [user for user in users[id(weight)] if user != name]
    if others:
        return f"shares its weight with {others[0]!r}"
    if not maths.candidate_ranks(*pairs.matrix(module).shape, 1):
        return "no rank makes it smaller"
    return None


# Budgets.


def _budget(ratio: Any, energy: Any, rank: Any) -> tuple[str, Any]:
    given = {k: v for k, v in (("ratio", ratio), ("energy", energy), ("rank", rank)) if v is not None}
    if len(given) > 1:
        raise ValueError(f"give one budget, not {' and '.join(f'{k}={v!r}' for k, v in given.items())}")
    kind, value = next(iter(given.items()), ("ratio", 0.5))
    for v in value.values() if isinstance(value, Mapping) else (value,):
        wanted = int if kind == "rank" else (int, float)
        if isinstance(v, bool) or not isinstance(v, wanted):
            raise TypeError(f"{kind} must be {'an int' if kind == 'rank' else 'a number'} or a dict of them, got {v!r}")
        if not (v >= 1 if kind == "rank" else 0 < v <= 1):
            raise ValueError(f"{kind}={v!r} is outside {'[1, width of the layer]' if kind == 'rank' else '(0, 1]'}")
    return kind, value


def _per_layer(kind: str, value: Budget, layers: Mapping[str, nn.Module], model: nn.Module) -> dict[str, float | int]:
    """The value for each layer that has one; the first matching entry of a dict counts, exact names before globs."""
    if not isinstance(value, Mapping):
        values = dict.fromkeys(layers, value)
    else:
        for pattern in value:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in layers):
                raise ValueError(
                    f"{kind} names {pattern!r}, which is no layer of {type(model).__name__} that can be factorized"
                )
        values = {}
        for name in layers:
            pattern = name if name in value else next((p for p in value if fnmatch.fnmatchcase(name, p)), None)
            if pattern is not None:
                values[name] = value[pattern]
    if kind == "rank":
        for name, r in values.items():
            width = min(pairs.matrix(layers[name]).shape)
            if r > width:
                raise ValueError(f"rank={r} is above the rank {width} of layer {name!r}; give a dict, or skip the layer")
    return values


def _check_weights(layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        if not torch.isfinite(layer.weight).all():
            raise ValueError(f"layer {name!r} has weights that are not finite")


def rank_unit(shape: tuple[int, int]) -> int:
    """Ranks are multiples of this: what vector units like, as far as the layer's width leaves a choice."""
    narrow = min(shape)
    return 16 if narrow >= 512 else 8 if narrow >= 64 else 4 if narrow >= 32 else 1


def _ranks(
    kind: str,
    value: Budget,
    values: Mapping[str, float | int],
    layers: Mapping[str, nn.Module],
    spectra: Mapping[str, torch.Tensor],
    *,
    weighted: bool,
) -> dict[str, int | None]:
    """Rank per layer; None where the layer stays as it is."""
    shapes = {name: tuple(pairs.matrix(layer).shape) for name, layer in layers.items()}
    if kind == "ratio" and weighted and not isinstance(value, Mapping):
        return _global_ranks(float(value), shapes, spectra)
    ranks: dict[str, int | None] = {}
    for name, (m, k) in shapes.items():
        v = values[name]
        if kind == "rank":
            r = int(v)
        elif kind == "energy":
            unit = rank_unit((m, k))
            r = math.ceil(maths.rank_for_energy(spectra[name], v) / unit) * unit
        else:
            r = math.floor(v * m * k / (m + k) + 1e-9)
            unit = rank_unit((m, k))
            r = max(r // unit * unit, min(r, unit)) if v < 1 else min(m, k)
            if r < 1:
                raise ValueError(
                    f"ratio={v} leaves nothing of layer {name!r} ({m} x {k}): rank 1 keeps {(m + k) / (m * k):.3f}"
                )
        ranks[name] = r if r * (m + k) < m * k else None
    return ranks


def _global_ranks(
    ratio: float, shapes: Mapping[str, tuple[int, int]], spectra: Mapping[str, torch.Tensor]
) -> dict[str, int | None]:
    total = sum(m * k for m, k in shapes.values())
    budget = math.floor(ratio * total + 1e-9)
    for fine in (False, True):  # ranks below the unit only where the budget can't be met otherwise
        options = {
            name: maths.choices(
                spectra[name],
                shape,
                (not fine and maths.candidate_ranks(*shape, rank_unit(shape))) or maths.candidate_ranks(*shape, 1),
            )
            for name, shape in shapes.items()
        }
        least = sum(choice[0].parameters for choice in options.values())
        if least <= budget:
            return maths.allocate(options, budget)
    raise ValueError(f"ratio={ratio} can't be reached: rank 1 everywhere keeps {least / total:.3f} of the parameters")


# Calibration.


def _spectra(
    model: nn.Module,
    batches: Iterable[Any] | None,
    layers: Mapping[str, nn.Module],
    loss: Callable[[Any, Any], torch.Tensor] | None,
    memory: int,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Whitened spectra of the original model's layers, in one unit of loss, and the gradient moments that fit in memory."""
    if batches is None:
        return {name: maths.whitened_spectrum(pairs.matrix(layer)) for name, layer in layers.items()}, {}
    spectra, unweighted, kept = {}, [], {}
    keep = sum(pairs.matrix(layer).shape[0] ** 2 * 4 for layer in layers.values()) <= memory
    for chunk in _chunks(layers, memory):
        originals = {name: model.get_submodule(name) for name in chunk}
        statistics = calibrate.collect(model, batches, originals)
        gradients = calibrate.collect_gradients(model, batches, originals, loss=loss)
        for name in chunk:
            seen, weight = statistics.pop(name), pairs.matrix(layers[name])
            moment = seen.second_moment
            if layers[name].bias is not None:
                moment = maths.centred(moment, seen.mean, seen.mean)
            gradient = _usable(gradients.pop(name, None))
            if gradient is None:
                unweighted.append(name)
            elif keep:
                kept[name] = gradient
            spectra[name] = maths.whitened_spectrum(weight, moment, gradient) * math.sqrt(seen.count)
    # A layer whose output the loss doesn't depend on has no loss to compare: it counts as much as the median layer.
    norms = sorted(spectra[name].norm().item() for name in spectra if name not in unweighted) or [1.0]
    for name in unweighted:
        spectra[name] = spectra[name] * (norms[len(norms) // 2] / spectra[name].norm().clamp_min(1e-300))
    return spectra, kept


def _usable(gradient: torch.Tensor | None) -> torch.Tensor | None:
    ok = gradient is not None and torch.isfinite(gradient).all() and gradient.diagonal().sum() > 0
    return gradient if ok else None


def _chunks(layers: Mapping[str, nn.Module], memory: int) -> list[list[str]]:
    """Layers in order, in runs whose second moments fit in `memory` bytes (at least one layer each)."""
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
    ranks: Mapping[str, int],
    moments: Mapping[str, torch.Tensor],
    loss: Callable[[Any, Any], torch.Tensor] | None,
    max_passes: int,
) -> nn.Module:
    """Factorize the layers `ranks` of `result` in the order in which they run, each on the inputs that the done ones give."""
    originals = {name: model.get_submodule(name) for name in ranks}
    calls = calibrate.trace_calls(model, next(iter(batches)), originals)
    groups = _merge(calls.groups, max_passes)
    late = [name for name in ranks if name not in calls.counts]  # run in later batches only
    once = all(count == 1 for count in calls.counts.values()) and not late
    for group in [*groups, *([late] if late else [])]:
        statistics = calibrate.collect_paired(result, model, batches, group, last=group[-1] if once else None)
        lacking = {name: originals[name] for name in group if name not in moments}
        gradients = {**moments, **(calibrate.collect_gradients(model, batches, lacking, loss=loss) if lacking else {})}
        for name in group:
            layer = result.get_submodule(name)
            new = _fit_layer(layer, statistics.pop(name), _usable(gradients.get(name)), ranks[name])
            result = surgery.replace(result, {layer: new})
    return result


def _fit_layer(layer: nn.Module, seen: calibrate.PairedStatistics, gradient: torch.Tensor | None, rank: int) -> pairs.Pair:
    weight = pairs.matrix(layer).double()
    moment, cross = seen.second_moment, seen.cross_moment
    if layer.bias is not None:
        moment = maths.centred(moment, seen.mean, seen.mean)
        cross = maths.centred(cross, seen.reference_mean, seen.mean)
    target = maths.compensate(weight, moment, cross)
    first, second, _ = maths.whitened_svd(target, moment, gradient, rank=rank)
    bias = None
    if layer.bias is not None:  # the mean of the outputs stays what it was
        bias = layer.bias.double() + weight @ seen.reference_mean.double() - second @ (first @ seen.mean.double())
    return pairs.pair(layer, first, second, bias)


def _merge(groups: list[list[str]], most: int) -> list[list[str]]:
    """At most `most` groups, by joining neighbours."""
    if most < 1:
        raise ValueError(f"max_passes={most} must be at least 1")
    size = math.ceil(len(groups) / most) if groups else 1
    return [[name for group in groups[i : i + size] for name in group] for i in range(0, len(groups), size)]
