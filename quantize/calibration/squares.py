"""The sum of products of rows with themselves, and the rows themselves while they are few."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantize.calibration.dual import THIN, Outer
from quantize.calibration.patches import MOST_NUMBERS, added, symmetric, upper_gram

OF_ITS_OWN = 0.5  # rows for each column
MANY = 512  # rows whose product takes far longer than adding it up


class Squares:
    """The sum of x x^T over rows x [K], times a factor each.

    Rows of batches of fewer than `OF_ITS_OWN` for each column wait until there are as many as
    columns: while there are fewer, all that is asked of them is cheaper from the rows themselves.
    After that only rows of small batches wait, since adding up a product takes as long as the
    product of some rows. Where a product has more than `MOST_NUMBERS`, rows wait for good, and past
    so many numbers, one of so many rows stands for the others.

    Args:
        patience: how many rows for each column wait, of any batches; None: as above.
    """

    def __init__(self, patience: float | None = None) -> None:
        self.patience = patience
        self.strips: list[Tensor] = []  # as `upper_gram` gives them
        self.waiting: list[tuple[Tensor, float]] = []  # rows, and how many each stands for
        self.every = 1  # one of so many waits

    def are_many(self, x: Tensor) -> bool:
        """Are rows [N, K] worth a product of their own?"""
        enough = OF_ITS_OWN * x.shape[1]
        if self.strips:
            return len(x) >= min(enough, MANY)
        narrow = x.shape[1] ** 2 <= MOST_NUMBERS
        return narrow and self.patience is None and len(x) >= enough

    def add(self, x: Tensor, times: float = 1.0) -> None:
        """Rows x [N, K]; they are kept, and nobody may write to them any more."""
        if times == 1.0 and self.are_many(x):
            self.add_product(upper_gram(x))
            return
        self.waiting.append(_thinned(x, times, self.every))
        width = x.shape[1]
        patience = self.patience if self.patience and not self.strips else 1.0
        if self.count < min(patience * width, MOST_NUMBERS / width):
            return
        if width**2 <= MOST_NUMBERS:
            self.flush()
        else:
            self._thin(MOST_NUMBERS // width)

    def _thin(self, most: int) -> None:
        """Keep every third row until there are at most so many."""
        while self.count > max(most, len(self.waiting)):
            self.every *= THIN
            self.waiting = [_thinned(part, each, THIN) for part, each in self.waiting]

    @property
    def count(self) -> int:
        """Of the rows that wait."""
        return sum(len(part) for part, _ in self.waiting)

    def add_product(self, product: list[Tensor], times: float = 1.0) -> None:
        """The product of rows with themselves, as `upper_gram` gives it."""
        totals = self.strips or [0.0] * len(product)
        pairs = zip(totals, product, strict=True)
        self.strips = [added(total, part, times) for total, part in pairs]

    def flush(self) -> None:
        """No row waits any longer."""
        if self.waiting:
            rows = torch.cat([part * each**0.5 for part, each in self.waiting])
            self.waiting = []
            self.add_product(upper_gram(rows))

    def whole(self, dtype: torch.dtype | None = None) -> Tensor:
        """The sum, [K, K]."""
        self.flush()
        return symmetric(self.strips, dtype)

    def diagonal(self) -> Tensor:
        """Of the sum, [K]."""
        total: Any = sum(each * part.square().sum(0) for part, each in self.waiting)
        if not self.strips:
            return total
        return torch.cat([strip.diagonal() for strip in self.strips]) + total

    def mean(self, count: int) -> Tensor | Outer:
        """The sum over `count`, [K, K]."""
        rows = self.rows(torch.zeros(()))
        return self.whole().div_(count) if rows is None else Outer(rows / count**0.5)

    def rows(self, offset: Tensor) -> Tensor | None:
        """All rows, each plus an offset [K], times the root of how many it stands for; float64.
        None where rows were summed up already.
        """
        if self.strips or not self.waiting:
            return None
        return torch.cat([(part.double() + offset) * each**0.5 for part, each in self.waiting])


def one_of(rows: Tensor, step: int) -> Tensor:
    """One of so many rows, in memory of its own."""
    return rows if step == 1 else rows[::step].clone()


def _thinned(rows: Tensor, each: float, step: int) -> tuple[Tensor, float]:
    """One of so many rows, and how many each of them stands for, if it was `each`."""
    kept = one_of(rows, step)
    return kept, each * len(rows) / len(kept)
