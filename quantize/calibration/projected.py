"""Second moments of rows as far as one weight shows them. All that a whitened spectrum asks of the
moment S of a layer's wider side is W S W^T, and that is the moment of W x: a layer's outputs, or
the gradients at its inputs, which passes compute anyway.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantize.calibration.dual import Outer
from quantize.calibration.patches import added, exact, is_finite
from quantize.calibration.solve import SMALLEST_RIDGE, factorized
from quantize.calibration.squares import Squares
from quantize.calibration.sums import InputStatistics


@dataclass
class Projected:
    """The moment S [K, K] of rows x, known as that of W x for a weight W [M, K] with M < K.

    Args:
        weight: W, float64.
        seen: W S W^T, [M, M], float64.
        power: the mean of the diagonal of S.
    """

    weight: Tensor
    seen: Tensor
    power: float

    @property
    def shape(self) -> tuple[int, int]:
        width = self.weight.shape[1]
        return width, width

    def between(self, left: Tensor, ridge: float) -> Tensor:
        """left (S + ridge * 1) left^T, [N, N], of left [N, K], float64.

        What of `left` is no mixture of the rows of W lies in directions that W doesn't show: the
        power there counts as the mean one.
        """
        plain = left @ left.T
        if torch.equal(left, self.weight):
            return torch.add(self.seen, plain, alpha=ridge)
        gram = self.weight @ self.weight.T
        least = SMALLEST_RIDGE * float(gram.diagonal().mean())
        cross = self.weight @ left.T  # [M, N]
        mixed = torch.cholesky_solve(cross, factorized(gram, max(least, 1e-300)))
        beside = plain - mixed.T @ cross
        return mixed.T @ self.seen @ mixed + self.power * beside + ridge * plain


def is_finite_moment(moment: Tensor | Outer | Projected) -> bool:
    """Are all numbers of a moment finite?"""
    if isinstance(moment, Projected):
        return is_finite(moment.seen)
    return is_finite(moment.rows if isinstance(moment, Outer) else moment)


@dataclass
class ProjectedStatistics(InputStatistics):
    """Sums over inputs x [K] of a layer that makes fewer numbers W x [M] of each: past one row for
    each input, of second moments only those of W x. `largest` isn't kept.

    Args:
        weight: W, [M, K].
    """

    weight: Any = None
    squares: Squares = field(default_factory=lambda: Squares(1.0))
    rows: int = 0
    energy: float = 0.0  # sum of x^2
    outputs: InputStatistics = field(default_factory=InputStatistics)

    def update_both(self, x: Tensor, y: Tensor, count: int | None = None) -> None:
        """Add rows x [N, K] and W x of each, plus a constant, [N, M], as a sample of `count`."""
        if not x.numel():
            return
        x = exact(x)
        count = len(x) if count is None else count
        times = count / len(x)
        self.rows += len(x)
        self.energy += times * float(x.norm()) ** 2
        self.outputs.update(y, count)
        if self.rows < x.shape[1]:
            self._summed(x, count, outer=True, product=None)
            return
        self.squares = Squares(1.0)
        self.count += count
        if self.shift is None:
            self.shift = torch.zeros_like(x[0])
        self.total = added(self.total, x.sum(0) - len(x) * self.shift, times)

    @property
    def power(self) -> Tensor:
        """E[x^2], the mean over the inputs, float64."""
        return torch.tensor(self.energy / (self.count * self.weight.shape[1]), dtype=torch.float64)

    def moment(self, *, centred: bool, floor: float = 0.0) -> Any:
        """As `InputStatistics.moment`; of many rows, projected."""
        if self.squares.waiting:
            return super().moment(centred=centred, floor=floor)
        weight = self.weight.double()
        seen = self.outputs.covariance.addmm_(weight, weight.T, alpha=floor)
        power = float(self.power)
        if centred:
            power = max(0.0, power - float(self.mean.square().mean()))
        else:
            mean = weight @ self.mean
            seen.addr_(mean, mean)
        return Projected(weight, seen, power + floor)
