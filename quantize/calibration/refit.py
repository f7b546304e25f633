"""Least squares: the weight with which a layer gives what it is to give, from its present inputs.

Every fit is held to a weight that is known already (the layer's own, or zero), so directions that
calibration never shows keep what they had.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantize.calibration.patches import added, is_finite

# candidates of `Regression`, times the mean input power; the last leaves the weight as it was
RIDGES = (1e-7, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e3)
# taken where there is nothing to try the candidates on
PLAIN_RIDGE = 1e-2
# inputs up to which their moments are taken: a factorization takes the cube of them
WIDEST = 4096
# rows that are kept of more inputs
MOST_ROWS = 2048
# the candidates are compared by so many random mixtures of the outputs
MIXTURES = 128
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
    return start + torch.cholesky_solve(gap, _factor(moment, ridge)).T


def _factor(moment: Tensor, ridge: float | Tensor) -> Tensor:
    """Cholesky factor of the moment plus ridge * 1; where roundings leave a moment without one, the
    ridge grows tenfold until it has.
    """
    matrix, total, more = moment.clone(), 0.0, float(ridge)
    while True:
        matrix.diagonal().add_(more)
        total += more
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            return factor
        more = max(9 * total, SMALLEST_RIDGE * float(moment.diagonal().mean()))
        if not 0 < more < math.inf:
            raise ValueError(f"a moment of shape {tuple(moment.shape)} is not finite")


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


@dataclass
class Moments:
    """Sums over rows of inputs x [K] and targets y [M], both less a shift; float64."""

    count: int = 0
    x: Any = 0.0  # [K], sum of x
    y: Any = 0.0  # [M], sum of y
    outer: Any = 0.0  # [K, K], sum of x x^T
    cross: Any = 0.0  # [M, K], sum of y x^T

    def add(self, x: Tensor, y: Tensor) -> None:
        self.count += len(x)
        self.x = self.x + x.sum(0).double()
        self.y = self.y + y.sum(0).double()
        self.outer = added(self.outer, (x.T @ x).double())
        self.cross = added(self.cross, (y.T @ x).double())

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count,
            self.x + other.x,
            self.y + other.y,
            self.outer + other.outer,
            self.cross + other.cross,
        )

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        return self.x / self.count, self.y / self.count

    def second(self, *, centred: bool) -> tuple[Tensor, Tensor]:
        """E[x x^T] and E[y x^T]; covariances if `centred`."""
        outer, cross = self.outer / self.count, self.cross / self.count
        if not centred:
            return outer, cross
        x, y = self.means
        return outer - torch.outer(x, x), cross - torch.outer(y, x)


class Regression:
    """Ridge regression of targets y [M] on inputs x [K], given in parts.

    The ridge is the one of `RIDGES` that does best on either half of the rows when fitted on the
    other. While there are fewer rows than inputs the rows themselves are kept, and the fit is the
    same one in its dual form (`FewRows`). Past that they are summed; of more than `WIDEST` inputs,
    whose moments are too large, a part of the rows is kept instead.

    Args:
        bias: whether a constant is fitted too; it is held to nothing.
    """

    def __init__(self, *, bias: bool) -> None:
        self.bias = bias
        self.halves = (Moments(), Moments())
        self.shift: tuple[Tensor, Tensor] | None = None
        self.few: FewRows | None = FewRows()

    @property
    def count(self) -> int:
        """Rows that the fit is made of."""
        if self.few is not None:
            return self.few.count
        return self.halves[0].count + self.halves[1].count

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows x [N, K] and y [N, M]; the first half of them goes to one half of the data."""
        dtype = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(dtype), y.to(dtype)
        if self.bias:  # sums about the mean lose no digits to it
            self.shift = self.shift or (x.mean(0), y.mean(0))
            x, y = x - self.shift[0], y - self.shift[1]
        if self.few is None:
            self._sum(x, y)
            return
        self.few.add(x, y)
        if x.shape[1] > WIDEST:
            self.few.thin(MOST_ROWS)
        elif self.few.count >= x.shape[1]:
            for part in self.few.parts:
                self._sum(*part)
            self.few = None

    def _sum(self, x: Tensor, y: Tensor) -> None:
        middle = len(x) // 2
        self.halves[0].add(x[:middle], y[:middle])
        self.halves[1].add(x[middle:], y[middle:])

    def finite(self) -> bool:
        if self.few is not None:
            return self.few.finite()
        total = self.halves[0] + self.halves[1]
        return is_finite(total.outer) and is_finite(total.cross)

    def fit(self, start: Tensor) -> tuple[Tensor, Tensor | None]:
        """The weight [M, K], held to `start`, and the bias [M] if there is one; float64."""
        if self.few is not None:
            return self.few.fit(start.double(), self.shift)
        total = self.halves[0] + self.halves[1]
        start = start.double()
        power = max(self._power(total), 1e-12)
        ridge = self._best_ridge(start, power) * power
        weight = least_squares(*total.second(centred=self.bias), start, ridge)
        if not self.bias:
            return weight, None
        x, y = total.means
        if self.shift is not None:
            x, y = x + self.shift[0].double(), y + self.shift[1].double()
        return weight, y - weight @ x

    def _power(self, total: Moments) -> float:
        """The mean of x^2 over rows and inputs."""
        squares = total.outer.diagonal() / total.count
        if self.shift is not None:
            shift = self.shift[0].double()
            squares = squares + shift * (2 * total.means[0] + shift)
        return float(squares.mean())

    def _best_ridge(self, start: Tensor, power: float) -> float:
        first, second = self.halves
        if min(first.count, second.count) == 0:
            return PLAIN_RIDGE
        mix = _mixtures(len(start)).to(start.device)
        mixed = [self._mixed(half, mix) for half in self.halves]
        start = mix @ start

        def error(ridge: float) -> float:
            there = self._error(mixed[0], mixed[1], start, ridge * power)
            back = self._error(mixed[1], mixed[0], start, ridge * power)
            return there + back

        return min_ridge(error)

    def _mixed(self, moments: Moments, mix: Tensor) -> tuple[int, Tensor, Tensor, Tensor, Tensor]:
        outer, cross = moments.second(centred=self.bias)
        x, y = moments.means
        return moments.count, outer, mix @ cross, x, mix @ y

    def _error(self, known: tuple, unseen: tuple, start: Tensor, ridge: float) -> float:
        """Squared error over the rows of `unseen` of a fit on `known`, up to a constant."""
        _, outer, cross, x, y = known
        weight = least_squares(outer, cross, start, ridge)
        count, outer, cross, x_unseen, y_unseen = unseen
        error = ((weight @ outer) * weight).sum() - 2 * (weight * cross).sum()
        if self.bias:
            error = error + (y_unseen - y - weight @ (x_unseen - x)).square().sum()
        return count * float(error)


class FewRows:
    """Ridge regression in its dual form: it factorizes the Gram matrix of the rows, [N, N].

    The weight is start + R^T inv(X X^T + N ridge) X, with R [N, M] what `start` leaves of the
    targets (Saunders et al., ICML 1998): what `least_squares` gives of the moments of the rows.
    """

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor]] = []
        self.every = 1  # one of so many rows is kept

    @property
    def count(self) -> int:
        return sum(len(x) for x, _ in self.parts)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows x [N, K] and y [N, M]."""
        self.parts.append((x[:: self.every].clone(), y[:: self.every].clone()))

    def thin(self, most: int) -> None:
        """Keep every second row until there are at most so many."""
        while self.count > max(most, len(self.parts)):
            self.parts = [(x[::2].clone(), y[::2].clone()) for x, y in self.parts]
            self.every *= 2

    def finite(self) -> bool:
        return all(is_finite(x) and is_finite(y) for x, y in self.parts)

    def fit(
        self, start: Tensor, shift: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        """As `Regression.fit`; the rows are less `shift` where a bias is fitted too."""
        x = torch.cat([part for part, _ in self.parts])
        y = torch.cat([part for _, part in self.parts]).double()
        first = torch.cat([torch.arange(len(part)) < len(part) // 2 for part, _ in self.parts])
        gram = (x @ x.T).double()
        left = y - (x @ start.T.to(x.dtype)).double()  # [N, M]
        power = x.square().mean(dtype=torch.float64)
        if shift is not None:
            offset = shift[0].double()
            power = power + (offset * (2 * x.mean(0, dtype=torch.float64) + offset)).mean()
        power = max(float(power), 1e-12)
        halves = (first.to(x.device), ~first.to(x.device))
        ridge = PLAIN_RIDGE
        if all(half.any() for half in halves):
            there = _Dual(gram, left, *halves, centred=shift is not None)
            back = _Dual(gram, left, *halves[::-1], centred=shift is not None)
            ridge = min_ridge(lambda r: there.error(r * power) + back.error(r * power))
        everything = torch.ones_like(halves[0])
        dual = _Dual(gram, left, everything, everything, centred=shift is not None)
        change = dual.solve(ridge * power).T  # [M, N]
        # where means are taken off, the change of each output sums to zero over the rows
        weight = start + (change.to(x.dtype) @ x).double()
        if shift is None:
            return weight, None
        x_mean, y_mean = x.mean(0, dtype=torch.float64), y.mean(0)
        return weight, y_mean + shift[1].double() - weight @ (x_mean + shift[0].double())


class _Dual:
    """What a fit on some rows leaves of the targets of others, from the Gram matrix alone.

    Args:
        gram: X X^T, [N, N]. left: what the start leaves of the targets, [N, M].
        known: rows that are fitted, [N], bool. unseen: those whose error is asked for.
        centred: rows and targets count less their means over the known rows.
    """

    def __init__(
        self, gram: Tensor, left: Tensor, known: Tensor, unseen: Tensor, *, centred: bool
    ) -> None:
        self.own, self.cross = gram[known][:, known], gram[unseen][:, known]
        self.target, self.unseen = left[known], left[unseen]
        if centred:
            mean = self.own.mean(0)  # of the products of known rows
            self.cross = self.cross - mean - self.cross.mean(1, keepdim=True) + mean.mean()
            self.own = self.own - mean - mean[:, None] + mean.mean()
            self.unseen = self.unseen - self.target.mean(0)
            self.target = self.target - self.target.mean(0)

    def solve(self, ridge: float) -> Tensor:
        """Coefficients of the known rows, [N, M]."""
        return torch.cholesky_solve(self.target, _factor(self.own, len(self.own) * ridge))

    def error(self, ridge: float) -> float:
        """Squared error over the unseen rows."""
        return float((self.unseen - self.cross @ self.solve(ridge)).square().sum())


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


def _mixtures(outputs: int) -> Tensor:
    """[MIXTURES, outputs], of expected Gram matrix 1; the identity where that is smaller."""
    if outputs <= MIXTURES:
        return torch.eye(outputs, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(MIXTURES, outputs, generator=generator, dtype=torch.float64)
    return mix / MIXTURES**0.5
