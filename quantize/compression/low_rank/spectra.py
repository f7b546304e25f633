"""Whitened spectra of the original model's layers: what each loses at each rank, in one unit."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from quantize import calibration as calibrate
from quantize.compression.low_rank import maths
from quantize.nn import low_rank as pairs

# times the mean square of inputs: the variance up to which they count as constant (roundings:
# 1e-15)
NOISE = 1e-10


def spectra(
    layers: Mapping[str, nn.Module], survey: calibrate.Survey | None
) -> dict[str, torch.Tensor]:
    """Whitened spectra of the original model's layers, in one unit of loss; of their weights alone
    where there is no survey of the model.
    """
    if survey is None:
        return {name: maths.whitened_spectrum(pairs.matrix(m)) for name, m in layers.items()}
    found: dict[str, torch.Tensor] = {}
    unweighted: list[str] = []
    for name, layer in layers.items():
        seen, weight = survey.inputs(name), pairs.matrix(layer)
        moment = _moment(seen, centred=layer.bias is not None)
        moment = maths.with_unseen(moment, seen.count)
        gradient = usable(survey.gradient(name))
        if gradient is None:
            unweighted.append(name)
        of_one_row = maths.whitened_spectrum(weight, moment, gradient)
        found[name] = of_one_row * math.sqrt(seen.count)
    # A layer whose output the loss doesn't depend on has no loss to compare: it counts as much as
    # the median layer.
    norms = sorted(found[name].norm().item() for name in found if name not in unweighted) or [1.0]
    median = norms[len(norms) // 2]
    for name in unweighted:
        found[name] = found[name] * (median / found[name].norm().clamp_min(1e-300))
    return found


def usable(gradient: torch.Tensor | None) -> torch.Tensor | None:
    """A moment of gradients, if it says anything."""
    return gradient if gradient is not None and gradient.diagonal().sum() > 0 else None


def _moment(seen: calibrate.InputStatistics, *, centred: bool) -> torch.Tensor:
    """The moment [K, K] that a weight is whitened by; a bias takes up the means."""
    if not centred:
        return seen.second_moment
    moment = seen.covariance
    moment.diagonal().add_(noise(seen))
    return moment


def noise(seen: calibrate.InputStatistics) -> float:
    """The variance of inputs below which differences are roundings: nothing is fitted to those."""
    return NOISE * float(seen.power.mean())
