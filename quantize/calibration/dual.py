"""Moments and least squares of fewer rows than inputs, in the dual form: from the products of the
rows with each other, [N, N], in place of those of the inputs, [K, K].
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.calibration.patches import is_finite
from quantize.calibration.solve import PLAIN_RIDGE, factorized, min_ridge

MOST_ROWS = 2048  # that a least squares fit of few rows looks at
ENOUGH_ROWS = 512  # to guess in how many directions rows point
# one of so many rows is kept where there are too many; an even number would divide the widths of
# images, and keep their edges alone
THIN = 3


@dataclass
class Outer:
    """A moment [K, K] as the rows that it is made of: rows^T rows + floor * 1.

    Args:
        rows: [N, K], float64.
        floor: added on the diagonal.
    """

    rows: Tensor
    floor: float = 0.0

    @property
    def shape(self) -> tuple[int, int]:
        width = self.rows.shape[1]
        return width, width

    @property
    def power(self) -> Tensor:
        """The mean of the diagonal."""
        return self.rows.square().sum() / self.rows.shape[1] + self.floor

    @property
    def squares(self) -> Tensor:
        """The sum of the squared elements; of many rows, guessed from a part of them."""
        every = -(-len(self.rows) // ENOUGH_ROWS) | 1
        gram = (self.rows[::every] @ self.rows[::every].T).square()
        of_pairs = gram.sum() - gram.trace()
        of_rows = every * gram.trace() + every**2 * of_pairs
        by_floor = 2 * self.rows.square().sum() + self.floor * self.rows.shape[1]
        return of_rows + self.floor * by_floor

    def times(self, left: Tensor, ridge: float = 0.0) -> Tensor:
        """`left` [M, K] times the moment plus ridge * 1."""
        product = (left @ self.rows.T) @ self.rows
        return product.add_(left, alpha=self.floor + ridge)

    def inverse_rows(self) -> Tensor:
        """R [N, K] by which the inverse is (1 - R^T R) / floor (Woodbury); the floor is above
        zero.
        """
        factor = factorized(self.rows @ self.rows.T, self.floor)
        return torch.linalg.solve_triangular(factor, self.rows, upper=False)

    def whole(self) -> Tensor:
        """The matrix, [K, K]."""
        moment = self.rows.T @ self.rows
        moment.diagonal().add_(self.floor)
        return moment


def whole(moment: Tensor | Outer) -> Tensor:
    """A moment as a matrix, [K, K]."""
    return moment.whole() if isinstance(moment, Outer) else moment


def compensate_rows(
    weight: Tensor, moment: Outer, gap: Tensor, first: Tensor, *, centred: bool
) -> Tensor:
    """What `compensate` gives, from few rows, by the ridge that does best on those of either half
    when fitted on the other: so few can be met exactly by a weight that is wrong for all others.

    Args:
        weight: W, [M, K].
        moment: of the inputs x, one row of it each: [N, K].
        gap: what W leaves of each row's target, y - W x, over the root of N as those rows are,
            [N, M].
        first: the rows of the first half, [N], bool.
        centred: rows and gaps are less their means.

    Returns:
        [M, K], float64.
    """
    every = -(-len(gap) // MOST_ROWS) | 1  # one of so many rows, an odd number, stands for all
    rows, gap, first = moment.rows[::every] * every**0.5, gap[::every] * every**0.5, first[::every]
    power = moment.power
    scale = torch.where(power > torch.finfo(power.dtype).tiny, power, 1.0)
    gram = rows @ rows.T / scale
    gap = gap / scale
    count = len(gap)
    # of the rows themselves, which are not over the root of their number
    ridge = halved_ridge(gram * count, gap * count**0.5, first, 1.0, centred=centred)
    ridge = ridge / 2 + moment.floor / scale  # what holds half of the rows holds all of them
    if count > rows.shape[1]:
        cross = rows.T @ gap  # [K, M]
        factor = factorized(rows.T @ rows / scale, ridge)
        return weight + torch.cholesky_solve(cross, factor).T
    change = torch.cholesky_solve(gap, factorized(gram, ridge))  # [N, M]
    return weight + change.T @ rows


def first_halves(parts: Iterable[Tensor]) -> Tensor:
    """Which rows of these parts, one after another, are of the first half of their part, [N], bool;
    a middle row is so in every second part.
    """
    halves = []
    for place, part in enumerate(parts):
        middle = (len(part) + place % 2) // 2
        halves.append(torch.arange(len(part), device=part.device) < middle)
    return torch.cat(halves)


def halved_ridge(
    gram: Tensor, left: Tensor, first: Tensor, power: float, *, centred: bool
) -> float:
    """The one of `RIDGES` times `power` that leaves least of either half of the rows when fitted on
    the other.

    Args:
        gram: products of the rows with each other, X X^T, [N, N].
        left: what is to be fitted, [N, M].
        first: the rows of the first half, [N], bool.
        power: the mean input power.
        centred: a constant is fitted too.
    """
    second = ~first
    if not (first.any() and second.any()):
        return PLAIN_RIDGE * power
    there = _Dual(gram, left, first, second, centred=centred)
    back = _Dual(gram, left, second, first, centred=centred)
    return power * min_ridge(lambda r: there.error(r * power) + back.error(r * power))


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
        """Keep every third row until there are at most so many."""
        while self.count > max(most, len(self.parts)):
            self.parts = [(x[::THIN].clone(), y[::THIN].clone()) for x, y in self.parts]
            self.every *= THIN

    def finite(self) -> bool:
        return all(is_finite(x) and is_finite(y) for x, y in self.parts)

    def fit(
        self, start: Tensor, shift: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        """As `Regression.fit`; the rows are less `shift` where a bias is fitted too."""
        x = torch.cat([part for part, _ in self.parts])
        y = torch.cat([part for _, part in self.parts]).double()
        first = first_halves(part for part, _ in self.parts)
        gram = (x @ x.T).double()
        left = y - (x @ start.T.to(x.dtype)).double()  # [N, M]
        power = x.square().mean(dtype=torch.float64)
        if shift is not None:
            offset = shift[0].double()
            power = power + (offset * (2 * x.mean(0, dtype=torch.float64) + offset)).mean()
        power = max(float(power), 1e-12)
        ridge = halved_ridge(gram, left, first, power, centred=shift is not None)
        everything = torch.ones_like(first)
        dual = _Dual(gram, left, everything, everything, centred=shift is not None)
        change = dual.solve(ridge).T  # [M, N]
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
        return torch.cholesky_solve(self.target, factorized(self.own, len(self.own) * ridge))

    def error(self, ridge: float) -> float:
        """Squared error over the unseen rows."""
        return float((self.unseen - self.cross @ self.solve(ridge)).square().sum())
