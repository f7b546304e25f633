"""Least squares with a ridge, on tensors alone: the weight with which a layer gives what it is to
give, from the moments of its inputs.

Every fit is held to a weight that is known already (the layer's own, or zero), so directions that
calibration never shows keep what they had.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# candidates of a fit's ridge, times the mean input power; the last leaves the weight as it was
RIDGES = (1e-7, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e3)
# taken where there is nothing to try the candidates on
PLAIN_RIDGE = 1e-2
# times the mean input power: what is added first to a moment without a factor and without a ridge
SMALLEST_RIDGE = 1e-12
# how strongly a compensated weight is held to the original where there is little data
CROSS_RIDGE = 1e-4


def least_squares(moment: Tensor, cross: Tensor, start: Tensor, ridge: float | Tensor) -> Tensor:
    """argmin over W [M, K] of E|y - W x|^2 + ridge * |W - start|^2.

    Args:
        moment: E[x x^T], [K, K]. With covariances here and in `cross`, W goes with a bias.
        cross: E[y x^T], [M, K].
        start: the weight that W is held to, [M, K].
        ridge: how strongly.
    """
    gap = torch.addmm(cross, start, moment, alpha=-1).T
    return start + torch.cholesky_solve(gap, factorized(moment, ridge)).T


def factorized(moment: Tensor, ridge: float | Tensor) -> Tensor:
    """Cholesky factor of the moment plus ridge * 1; where roundings leave a moment without one, the
    ridge grows tenfold until it has.
    """
    diagonal = moment.diagonal().clone()
    total, more = 0.0, float(ridge)
    try:  # the matrix itself has the ridge for as long: a copy would take as much room again
        while True:
            total += more
            moment.diagonal().copy_(diagonal + total)
            factor, failed = torch.linalg.cholesky_ex(moment)
            if not failed:
                return factor
            more = max(9 * total, SMALLEST_RIDGE * float(diagonal.mean()))
            if not 0 < more < math.inf:
                raise ValueError(f"a moment of shape {tuple(moment.shape)} is not finite")
    finally:
        moment.diagonal().copy_(diagonal)


def compensate(
    weight: Tensor,
    second_moment: Tensor,
    target_moment: Tensor,
    *,
    ridge: float = CROSS_RIDGE,
) -> Tensor:
    """The weight that, on the compressed model's inputs x, comes closest to what the layer is to
    give. Where x is what the original model's layer gets and that is W x, it is W.

    Args:
        weight: W, [M, K].
        second_moment: E[x x^T], [K, K].
        target_moment: E[y x^T], [M, K], y being what it is to give.
        ridge: how strongly it is held to W, times the mean input power.

    Returns:
        [M, K], float64.
    """
    weight, second_moment = weight.double(), second_moment.double()
    power = second_moment.diagonal().mean()
    scale = torch.where(power > torch.finfo(power.dtype).tiny, power, 1.0)  # of any size
    return least_squares(second_moment / scale, target_moment.double() / scale, weight, ridge)


def min_ridge(error: Callable[[float], float]) -> float:
    """The ridge of `RIDGES` whose error no neighbour's is below, searched from the middle down,
    then up.
    """
    errors = {}
    for place in range(len(RIDGES) // 2, -1, -1):
        errors[place] = error(RIDGES[place])
        if place + 1 in errors and errors[place] > errors[place + 1]:
            break
    best = min(errors, key=errors.__getitem__)
    while best == max(errors) and best + 1 < len(RIDGES):
        errors[best + 1] = error(RIDGES[best + 1])
        best = min(errors, key=errors.__getitem__)
    return RIDGES[best]
