"""Sums over rows: of a layer's inputs, and of products with what stands beside each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantize.calibration.dual import Outer, first_halves
from quantize.calibration.patches import added, exact, is_finite, upper_gram
from quantize.calibration.squares import Squares, one_of

# gives the second moment of rows minus a shift, from both
Product = Callable[[Tensor, Tensor], list[Tensor]]
FEW = 2.0  # rows for each input up to which a fit may follow what no other rows have


@dataclass
class InputStatistics:
    """Sums over the rows a layer has seen; K is the layer's input width (see `rows`).

    Rows x are summed as x - shift, with the mean of the first ones as the shift: in inputs that
    hardly vary, sums of squares would leave nothing but rounding errors of the covariance.
    """

    count: int = 0
    shift: Any = None  # [K]; like all sums here, a tensor from the first update on
    total: Any = 0.0  # [K], sum of x - shift
    squares: Squares = field(default_factory=Squares)  # of x - shift
    largest: Any = 0.0  # [K], max of |x|

    def update(
        self,
        x: Tensor,
        count: int | None = None,
        *,
        outer: bool = True,
        product: Product | None = None,
    ) -> None:
        """Add rows x [N, K] as a sample of `count` rows (default: all of them).

        product: gives `upper_gram` of rows minus a shift, from both.
        """
        if x.numel():
            count = len(x) if count is None else count
            self._summed(x, count, outer=outer, product=product)

    def _summed(self, x: Tensor, count: int, *, outer: bool, product: Product | None) -> Tensor:
        """Add rows x [N, K], and return them less the shift, as `exact` gives them."""
        times = count / x.shape[0]
        self.count += count
        magnitude = torch.maximum(x.amax(0), -x.amin(0)).detach()
        x = exact(x, magnitude)
        self.largest = torch.maximum(magnitude.to(x), torch.as_tensor(self.largest).to(x))
        if self.shift is None:
            self.shift = x.mean(0, dtype=torch.float64).to(x.dtype)
        x = x - self.shift
        self.total = added(self.total, x.sum(0), times)
        if outer and (product is None or not self.squares.are_many(x)):
            self.squares.add(x, times)
        elif outer and product is not None:
            self.squares.add_product(product(x, self.shift), times)
        return x

    @property
    def finite(self) -> bool:
        """Were all rows finite?"""
        return is_finite(self.total)

    @property
    def from_shift(self) -> Tensor:
        """E[x] - shift, [K], float64."""
        return self.total.double() / self.count

    @property
    def mean(self) -> Tensor:
        """E[x], [K], float64."""
        return self.shift.double() + self.from_shift

    @property
    def covariance(self) -> Tensor:
        """E[x x^T] - E[x] E[x]^T, [K, K], float64."""
        outer = self.squares.whole(torch.float64).div_(self.count)
        return outer.addr_(self.from_shift, self.from_shift, alpha=-1)

    @property
    def second_moment(self) -> Tensor:
        """E[x x^T], [K, K], float64."""
        return self.covariance.addr_(self.mean, self.mean)

    def moment(self, *, centred: bool, floor: float = 0.0) -> Tensor | Outer:
        """E[x x^T], or the covariance, plus `floor` on the diagonal; [K, K], float64."""
        offset = -self.from_shift if centred else self.shift.double()
        rows = self.squares.rows(offset)
        if rows is not None:
            return Outer(rows / self.count**0.5, floor)
        moment = self.covariance if centred else self.second_moment
        moment.diagonal().add_(floor)
        return moment

    @property
    def variance(self) -> Tensor:
        """E[x^2] - E[x]^2, [K], float64."""
        return self.squares.diagonal().double() / self.count - self.from_shift**2

    @property
    def power(self) -> Tensor:
        """E[x^2], [K], float64."""
        return self.variance + self.mean**2


@dataclass
class PairedStatistics(InputStatistics):
    """Inputs x [K] of a layer, and beside each row of them another row z [Z].

    Up to `FEW` rows for each column they are kept as they are: a fit to so few is tried on halves.
    """

    squares: Squares = field(default_factory=lambda: Squares(FEW))
    other_shift: Any = None  # [Z]
    other_total: Any = 0.0  # [Z], sum of z - other_shift
    cross_total: Any = 0.0  # [Z, K], sum of (z - other_shift) (x - shift)^T of summed rows
    # x - shift, z - other_shift and how many rows each stands for, while the squares of all wait
    waiting: list[tuple[Tensor, Tensor, float]] = field(default_factory=list)
    every: int = 1  # one of so many rows waits

    def update_pair(self, x: Tensor, z: Tensor, products: Products | None = None) -> None:
        """Add rows x [N, K] and z [N, Z].

        products: gives the second moment of rows x and their product with rows z.
        """
        if x.numel() == 0:
            return
        products = products or Products()
        x = self._summed(x, len(x), outer=True, product=products.square)
        z = exact(z)
        if self.other_shift is None:
            self.other_shift = z.mean(0, dtype=torch.float64).to(z.dtype)
        z = z - self.other_shift
        self.other_total = added(self.other_total, z.sum(0))
        if not self.squares.strips:
            self._wait(z)
            return
        self._sum_waiting()
        shifts = (self.other_shift, self.shift)
        self.cross_total = added(self.cross_total, products.cross(z, x, *shifts))

    def _wait(self, z: Tensor) -> None:
        """Keep rows z beside the x that wait."""
        others = [other for _, other, _ in self.waiting] + [z[:: self.every]]
        step = self.squares.every // self.every
        self.every = self.squares.every
        pairs = zip(self.squares.waiting, others, strict=True)
        self.waiting = [(x, one_of(other, step), each) for (x, each), other in pairs]

    def _sum_waiting(self) -> None:
        for x, z, each in self.waiting:
            self.cross_total = added(self.cross_total, _cross(z, x), each)
        self.waiting = []

    def few_rows(self, *, centred: bool) -> tuple[Tensor, Tensor]:
        """All rows x [N, K] and z [N, Z], less their means if `centred`, times the root of the
        share of all rows that each stands for; float64. Only where `moment` gives an `Outer`.
        """
        offset, other_offset = self.shift.double(), self.other_shift.double()
        if centred:
            offset, other_offset = -self.from_shift, -self.other_from_shift
        shares = [(each / self.count) ** 0.5 for _, _, each in self.waiting]
        parts = list(zip(self.waiting, shares, strict=True))
        x = torch.cat([(x.double() + offset) * share for (x, _, _), share in parts])
        z = torch.cat([(z.double() + other_offset) * share for (_, z, _), share in parts])
        return x, z

    @property
    def first_half(self) -> Tensor:
        """Which of the few rows are of the first half of the data, [N], bool."""
        return first_halves(x for x, _, _ in self.waiting)

    @property
    def other_mean(self) -> Tensor:
        """E[z], [Z], float64."""
        return self.other_shift.double() + self.other_from_shift

    @property
    def other_from_shift(self) -> Tensor:
        """E[z] - other_shift, [Z], float64."""
        return self.other_total.double() / self.count

    @property
    def cross_covariance(self) -> Tensor:
        """E[z x^T] - E[z] E[x]^T, [Z, K], float64."""
        self._sum_waiting()
        cross = self.cross_total.double() / self.count
        return cross.addr_(self.other_from_shift, self.from_shift, alpha=-1)

    @property
    def cross_moment(self) -> Tensor:
        """E[z x^T], [Z, K], float64."""
        return self.cross_covariance.addr_(self.other_mean, self.mean)


class Products:
    """Products of rows, computed once for layers that read the same tensors one after another."""

    def __init__(self) -> None:
        self.given: dict[str, tuple[Tensor | None, int]] = {}  # with their versions
        self.shifts: dict[str, tuple[Tensor, ...]] = {}
        self.products: dict[str, Any] = {}

    def see(self, x: Tensor, z: Tensor | None = None) -> None:
        """The tensors whose rows come next: a layer's input, and what is paired with it."""
        if not self._same("x", x):
            self.products.clear()
        if not self._same("z", z):
            self.products.pop("cross", None)

    def _same(self, which: str, tensor: Tensor | None) -> bool:
        """Is it the one that was given before, and known not to have changed?"""
        before, at = self.given.get(which, (None, -1))
        now = -1 if tensor is None or tensor.is_inference() else tensor._version
        self.given[which] = (tensor, now)
        return tensor is before and at == now and now >= 0

    def square(self, x: Tensor, shift: Tensor) -> list[Tensor]:
        """`upper_gram` of x, rows minus a shift."""
        return self._of("square", (shift,), lambda: upper_gram(x))

    def cross(self, z: Tensor, x: Tensor, *shifts: Tensor) -> Tensor:
        """z^T x, of rows minus their shifts."""
        return self._of("cross", shifts, lambda: _cross(z, x))

    def _of(self, kind: str, shifts: tuple[Tensor, ...], product: Callable[[], Any]) -> Any:
        """The product of one kind with these shifts, known or computed now."""
        before = self.shifts.get(kind, ())
        same = len(before) == len(shifts) and all(map(torch.equal, before, shifts))
        if not (same and kind in self.products) or not self.given:
            self.shifts[kind], self.products[kind] = shifts, product()
        return self.products[kind]


def _cross(z: Tensor, x: Tensor) -> Tensor:
    """z^T x, [Z, K], of rows."""
    dtype = torch.promote_types(x.dtype, z.dtype)
    return z.T.to(dtype) @ x.to(dtype)
