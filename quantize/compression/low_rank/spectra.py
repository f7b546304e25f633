"""Whitened spectra of the original model's layers: what each loses at each rank, in one unit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from quantize import calibration as calibrate
from quantize.compression.low_rank import maths
from quantize.nn import low_rank as pairs

# times the mean square of inputs: the variance up to which they count as constant (roundings:
# 1e-15)
NOISE = 1e-10


def spectra(layers: Mapping[str, nn.Module], survey: calibrate.Survey | None) -> dict[str, Tensor]:
    """Whitened spectra of the original model's layers, in one unit of loss; of their weights alone
    where there is no survey of the model.
    """
    if survey is None:
        return {name: maths.whitened_spectrum(pairs.matrix(m)) for name, m in layers.items()}
    found: dict[str, Tensor] = {}
    unweighted: list[str] = []
    for name, layer in layers.items():
        seen, weight = survey.inputs(name), pairs.matrix(layer)
        centred = layer.bias is not None  # a bias takes up the means
        moment = seen.moment(centred=centred, floor=noise(seen, centred=centred))
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


def usable(gradient: Any) -> Any:
    """A moment of gradients, as a matrix where it isn't projected, if it says anything."""
    if gradient is None:
        return None
    if isinstance(gradient, calibrate.Projected):
        return gradient if gradient.power > 0 else None
    matrix = calibrate.whole(gradient)
    return matrix if matrix.diagonal().sum() > 0 else None


def noise(seen: calibrate.InputStatistics, *, centred: bool) -> float:
    """The variance of inputs below which differences are roundings: nothing is fitted to those.
    A layer without a bias is fitted to the means too, and these are none.
    """
    return NOISE * float(seen.power.mean()) if centred else 0.0
