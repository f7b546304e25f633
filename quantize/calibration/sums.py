"""Sums over rows: of a layer's inputs, and of products with what stands beside each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from quantize.calibration.patches import added, exact, is_finite, symmetric, upper_gram

# gives the second moment of rows minus a shift, from both
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Squares:
    """The sum of x x^T over rows x [K], times a factor each.

    Rows of small batches wait until there are as many as columns: adding up a product costs as much
    as the product of many rows.
    """

    def __init__(self) -> None:
        self.upper: Any = 0.0  # [K, K], on and above the diagonal
        self.waiting: list[torch.Tensor] = []
        self.count = 0  # of the rows that wait

    def add(self, x: torch.Tensor, times: float = 1.0) -> None:
        """Rows x [N, K]."""
        if times == 1.0 and len(x) >= x.shape[1]:
            self.add_product(upper_gram(x))
            return
        self.waiting.append(x * times**0.5)
        self.count += len(x)
        if self.count >= x.shape[1]:
            self.flush()

    def add_product(self, product: torch.Tensor, times: float = 1.0) -> None:
        """The product of rows with themselves, as `upper_gram` gives it."""
        self.upper = added(self.upper, product, times)

    def flush(self) -> None:
        """No row waits any longer."""
        if self.waiting:
            rows = torch.cat(self.waiting)
            self.waiting, self.count = [], 0
            self.add_product(upper_gram(rows))

    def whole(self) -> torch.Tensor:
        """The sum, [K, K]."""
        self.flush()
        return symmetric(self.upper)

    def diagonal(self) -> torch.Tensor:
        self.flush()
        return self.upper.diagonal()


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
        x: torch.Tensor,
        count: int | None = None,
        *,
        outer: bool = True,
        product: Product | None = None,
    ) -> None:
        """Add rows x [N, K] as a sample of `count` rows (default: all of them).

        product: gives `upper_gram` of rows minus a shift, from both.
        """
        if x.numel() == 0:
            return
        x = exact(x)
        count = x.shape[0] if count is None else count
        times = count / x.shape[0]
        self.count += count
        magnitude = torch.maximum(x.amax(0), -x.amin(0))
        self.largest = torch.maximum(magnitude, torch.as_tensor(self.largest).to(magnitude))
        x = self.shifted(x)
        self.total = added(self.total, x.sum(0), times)
        if outer and (product is None or len(x) < x.shape[1]):
            self.squares.add(x, times)
        elif outer and product is not None:
            self.squares.add_product(product(x, self.shift), times)

    def shifted(self, x: torch.Tensor) -> torch.Tensor:
        """Rows x - shift, [N, K]."""
        if self.shift is None:
            self.shift = x.mean(0, dtype=torch.float64).to(x.dtype)
        return x - self.shift

    @property
    def finite(self) -> bool:
        """Were all rows finite?"""
        return is_finite(self.total)

    @property
    def from_shift(self) -> torch.Tensor:
        """E[x] - shift, [K], float64."""
        return self.total.double() / self.count

    @property
    def mean(self) -> torch.Tensor:
        """E[x], [K], float64."""
        return self.shift.double() + self.from_shift

    @property
    def covariance(self) -> torch.Tensor:
        """E[x x^T] - E[x] E[x]^T, [K, K], float64."""
        outer = self.squares.whole().double().div_(self.count)
        return outer.addr_(self.from_shift, self.from_shift, alpha=-1)

    @property
    def second_moment(self) -> torch.Tensor:
        """E[x x^T], [K, K], float64."""
        return self.covariance.addr_(self.mean, self.mean)

    @property
    def power(self) -> torch.Tensor:
        """E[x^2], [K], float64."""
        variance = self.squares.diagonal().double() / self.count - self.from_shift**2
        return variance + self.mean**2


@dataclass
class PairedStatistics(InputStatistics):
    """Inputs x [K] of a layer, and beside each row of them another row z [Z]."""

    other_shift: Any = None  # [Z]
    other_total: Any = 0.0  # [Z], sum of z - other_shift
    cross: Any = 0.0  # [Z, K], sum of (z - other_shift) (x - shift)^T

    def update_pair(
        self, x: torch.Tensor, z: torch.Tensor, products: Products | None = None
    ) -> None:
        """Add rows x [N, K] and z [N, Z].

        products: gives the second moment of rows x and their product with rows z.
        """
        if x.numel() == 0:
            return
        products = products or Products()
        self.update(x, product=products.square)
        x, z = self.shifted(exact(x)), exact(z)
        if self.other_shift is None:
            self.other_shift = z.mean(0, dtype=torch.float64).to(z.dtype)
        z = z - self.other_shift
        self.other_total = added(self.other_total, z.sum(0))
        self.cross = added(self.cross, products.cross(z, x, self.other_shift, self.shift))

    @property
    def other_mean(self) -> torch.Tensor:
        """E[z], [Z], float64."""
        return self.other_shift.double() + self.other_total.double() / self.count

    @property
    def cross_covariance(self) -> torch.Tensor:
        """E[z x^T] - E[z] E[x]^T, [Z, K], float64."""
        from_shift = self.other_total.double() / self.count
        return (self.cross.double() / self.count).addr_(from_shift, self.from_shift, alpha=-1)

    @property
    def cross_moment(self) -> torch.Tensor:
        """E[z x^T], [Z, K], float64."""
        return self.cross_covariance.addr_(self.other_mean, self.mean)


class Products:
    """Products of rows, computed once for layers that read the same tensors one after another."""

    def __init__(self) -> None:
        self.given: dict[str, tuple[torch.Tensor | None, int]] = {}  # with their versions
        self.shifts: dict[str, tuple[torch.Tensor, ...]] = {}
        self.products: dict[str, torch.Tensor] = {}

    def see(self, x: torch.Tensor, z: torch.Tensor | None = None) -> None:
        """The tensors whose rows come next: a layer's input, and what is paired with it."""
        if not self._same("x", x):
            self.products.clear()
        if not self._same("z", z):
            self.products.pop("cross", None)

    def _same(self, which: str, tensor: torch.Tensor | None) -> bool:
        """Is it the one that was given before, and known not to have changed?"""
        before, at = self.given.get(which, (None, -1))
        now = -1 if tensor is None or tensor.is_inference() else tensor._version
        self.given[which] = (tensor, now)
        return tensor is before and at == now and now >= 0

    def square(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """`upper_gram` of x, rows minus a shift."""
        return self._of("square", (shift,), lambda: upper_gram(x))

    def cross(self, z: torch.Tensor, x: torch.Tensor, *shifts: torch.Tensor) -> torch.Tensor:
        """z^T x, of rows minus their shifts."""
        dtype = torch.promote_types(x.dtype, z.dtype)
        return self._of("cross", shifts, lambda: z.T.to(dtype) @ x.to(dtype))

    def _of(
        self,
        kind: str,
        shifts: tuple[torch.Tensor, ...],
        product: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """The product of one kind with these shifts, known or computed now."""
        before = self.shifts.get(kind, ())
        same = len(before) == len(shifts) and all(map(torch.equal, before, shifts))
        if not (same and kind in self.products) or not self.given:
            self.shifts[kind], self.products[kind] = shifts, product()
        return self.products[kind]
