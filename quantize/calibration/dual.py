"""Moments and least squares of fewer rows than inputs, in the dual form: from the products of the
rows with each other, [N, N], in place of those of the inputs, [K, K].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.calibration.patches import is_finite
from quantize.calibration.solve import CROSS_RIDGE, PLAIN_RIDGE, factorized, min_ridge


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
        """The sum of the squared elements."""
        of_rows = (self.rows @ self.rows.T).square().sum()
        by_floor = 2 * self.rows.square().sum() + self.floor * self.rows.shape[1]
        return of_rows + self.floor * by_floor

    def times(self, left: Tensor, ridge: float = 0.0) -> Tensor:
        """`left` [M, K] times the moment plus ridge * 1."""
        product = (left @ self.rows.T) @ self.rows
        return product.add_(left, alpha=self.floor + ridge)

    def inverse(self) -> Tensor:
        """Of the matrix, [K, K], by the Woodbury identity; the floor is above zero."""
        factor = factorized(self.rows @ self.rows.T, self.floor)
        half = torch.linalg.solve_triangular(factor, self.rows, upper=False)  # [N, K]
        inverse = (half.T @ half).mul_(-1.0 / self.floor)
        inverse.diagonal().add_(1.0 / self.floor)
        return inverse

    def whole(self) -> Tensor:
        """The matrix, [K, K]."""
        moment = self.rows.T @ self.rows
        moment.diagonal().add_(self.floor)
        return moment


def whole(moment: Tensor | Outer) -> Tensor:
    """A moment as a matrix, [K, K]."""
    return moment.whole() if isinstance(moment, Outer) else moment


def is_finite_moment(moment: Tensor | Outer) -> bool:
    """Are all numbers of a moment finite?"""
    return is_finite(moment.rows if isinstance(moment, Outer) else moment)


def compensate_rows(weight: Tensor, moment: Outer, gap: Tensor) -> Tensor:
    """What `compensate` gives, from few rows.

    Args:
        weight: W, [M, K].
        moment: of the inputs x, one row of it each: [N, K].
        gap: what W leaves of each row's target, y - W x, over the root of N as those rows are,
            [N, M].

    Returns:
        [M, K], float64.
    """
    power = moment.power
    scale = torch.where(power > torch.finfo(power.dtype).tiny, power, 1.0)
    rows = moment.rows
    gram = factorized(rows @ rows.T / scale, CROSS_RIDGE + moment.floor / scale)
    change = torch.cholesky_solve(gap / scale, gram)  # [N, M]
    return weight + change.T @ rows


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
        return torch.cholesky_solve(self.target, factorized(self.own, len(self.own) * ridge))

    def error(self, ridge: float) -> float:
        """Squared error over the unseen rows."""
        return float((self.unseen - self.cross @ self.solve(ridge)).square().sum())
