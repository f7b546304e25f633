"""Regressions that are given in parts: what a layer is to give, on its present inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantize.calibration.dual import MOST_ROWS, FewRows
from quantize.calibration.patches import added, is_finite, upper_gram
from quantize.calibration.solve import PLAIN_RIDGE, factorized, least_squares, min_ridge
from quantize.calibration.squares import Squares

# inputs up to which their moments are taken: a factorization takes the cube of them
WIDEST = 4096  # of more, MOST_ROWS rows are kept
# the candidates are compared by so many random mixtures of the outputs
MIXTURES = 128


@dataclass
class Moments:
    """Sums over rows of inputs x [K] and targets y [M], both less a shift; float64."""

    count: int = 0
    x: Any = 0.0  # [K], sum of x
    y: Any = 0.0  # [M], sum of y
    cross: Any = 0.0  # [M, K], sum of y x^T
    squares: Squares = field(default_factory=Squares)  # of x

    def add(self, x: Tensor, y: Tensor) -> None:
        self.count += len(x)
        self.x = self.x + x.sum(0).double()
        self.y = self.y + y.sum(0).double()
        self.cross = added(self.cross, (y.T @ x).double())
        self.squares.add_product([strip.double() for strip in upper_gram(x)])

    def __add__(self, other: Moments) -> Moments:
        squares = Squares()
        for part in (self, other):
            squares.add_product(part.squares.strips)
        count, cross = self.count + other.count, self.cross + other.cross
        return Moments(count, self.x + other.x, self.y + other.y, cross, squares)

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        return self.x / self.count, self.y / self.count

    def second(self, *, centred: bool) -> tuple[Tensor, Tensor]:
        """E[x x^T] and E[y x^T]; covariances if `centred`."""
        outer, cross = self.squares.whole() / self.count, self.cross / self.count
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
        return is_finite(total.squares.diagonal()) and is_finite(total.cross)

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
        squares = total.squares.diagonal() / total.count
        if self.shift is not None:
            shift = self.shift[0].double()
            squares = squares + shift * (2 * total.means[0] + shift)
        return float(squares.mean())

    def _best_ridge(self, start: Tensor, power: float) -> float:
        if min(half.count for half in self.halves) == 0:
            return PLAIN_RIDGE
        mix = _mixtures(len(start)).to(start.device)
        start = mix @ start
        first, second = (self._mixed(half, mix, start) for half in self.halves)

        def error(ridge: float) -> float:
            there = self._error(first, second, ridge * power)
            back = self._error(second, first, ridge * power)
            return there + back

        return min_ridge(error)

    def _mixed(
        self, moments: Moments, mix: Tensor, start: Tensor
    ) -> tuple[int, Tensor, Tensor, Tensor, Tensor]:
        """Count, E[x x^T], E[z x^T], E[x] and E[z], of what `start` leaves of mixtures of the
        targets, z.
        """
        outer, cross = moments.second(centred=self.bias)
        x, y = moments.means
        left = torch.addmm(mix @ cross, start, outer, alpha=-1)
        return moments.count, outer, left, x, mix @ y - start @ x

    def _error(self, known: tuple, unseen: tuple, ridge: float) -> float:
        """Squared error over the rows of `unseen` of a fit on `known`, up to a constant."""
        _, outer, left, x, z = known
        change = torch.cholesky_solve(left.T, factorized(outer, ridge)).T
        count, outer, left, x_unseen, z_unseen = unseen
        error = ((change @ outer) * change).sum() - 2 * (change * left).sum()
        if self.bias:
            error = error + (z_unseen - z - change @ (x_unseen - x)).square().sum()
        return count * float(error)


def _mixtures(outputs: int) -> Tensor:
    """[MIXTURES, outputs], of expected Gram matrix 1; the identity where that is smaller."""
    if outputs <= MIXTURES:
        return torch.eye(outputs, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(MIXTURES, outputs, generator=generator, dtype=torch.float64)
    return mix / MIXTURES**0.5
