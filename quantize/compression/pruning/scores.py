"""How much a unit matters: by the norm of its weights, or by what can't be rebuilt without it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantize.calibration import InputStatistics, Outer
from quantize.compression.pruning.cut import stored
from quantize.compression.pruning.groups import Group

# of the moments of gradients, times their mean diagonal: sums in float32
ROUNDING = 1e-6


def magnitude(model: nn.Module, group: Group, n: float) -> Tensor:
    """Ln norm over all weights that make a unit's channels, [units], as
    `torch.nn.utils.prune.ln_structured` has it.
    """
    parts = []
    for name, dim in group.outputs:
        place, _, local = name.rpartition(".")
        weight = stored(model.get_submodule(place), local).detach().movedim(dim, 0).double()
        places = group.places[name, dim].to(weight.device)
        parts.append(weight[places].flatten(1))
    return torch.linalg.vector_norm(torch.cat(parts, 1), n, dim=1).cpu()


@dataclass
class Reader:
    """A layer that sums over a group's channels: what scoring needs of it.

    A convolution of many taps may be given by whole channels: its taps stand among the rows of
    `weight`, as [out, taps, K] flattened, and `seen` has its channels in place of its patches.
    """

    weight: Tensor  # [out * taps, K]
    places: Tensor  # the columns that belong to each unit, [units, S]
    seen: InputStatistics  # of its inputs
    # E[g g^T] of the model's output by its outputs, [out, out]
    metric: Tensor | Outer | None = None


def reconstruction(
    readers: list[Reader], remove: int, ridge: float = 1e-3, rounds: int = 48
) -> tuple[Tensor, Tensor]:
    """Order in which to remove up to `remove` units, each time those whose loss costs least after a
    refit; and those costs.

    With H the second moment of a layer's inputs and W its weight, removing the inputs S and
    refitting the rest by least squares costs tr(W_S inv(inv(H)_SS) W_S^T) (optimal brain surgeon;
    for structures: ZipLM, Kurtic et al., arXiv 2302.04089). Errors of the layer's outputs count by
    the layer's `metric` where all readers have one (then costs can be compared between groups: they
    are squared changes of the model's output, summed over the rows seen), else relative to what the
    layer gives.

    Returns scores [units], less for what goes earlier, and the costs of removing 0, 1, ... `remove`
    units, [remove + 1].
    """
    known = all(reader.metric is not None for reader in readers)
    eliminations = [_elimination(reader, remove, ridge, known=known) for reader in readers]
    units = len(readers[0].places)
    score = torch.full((units,), math.inf, dtype=torch.float64)
    alive = torch.ones(units, dtype=torch.bool)
    step = max(1, math.ceil(remove / rounds))
    costs = [torch.zeros(1, dtype=torch.float64)]
    for done in range(0, remove, step):
        count = min(step, remove - done)
        order = torch.arange(count, dtype=torch.float64)
        cheapest = _total_cost(eliminations, alive).argsort()
        gone = cheapest[:count]
        score[gone] = done + order
        alive[gone] = False
        paid = sum(part.remove(gone) for part in eliminations)
        share = (order + 1) / count
        costs.append(costs[-1][-1] + max(paid, 0.0) * share)
    if alive.any():
        cost = _total_cost(eliminations, alive)[alive]
        score[alive] = remove + torch.where(cost.isfinite(), cost, 0.0)
    return score, torch.cat(costs)


def _total_cost(eliminations: list[Elimination], alive: Tensor) -> Tensor:
    """What each unit that is left would cost next, [units]; infinity for the others."""
    total = torch.full((len(alive),), math.inf, dtype=torch.float64)
    units = alive.nonzero().flatten()
    total[units] = sum(part.costs(units).cpu() for part in eliminations)
    return total


def _elimination(reader: Reader, remove: int, ridge: float, *, known: bool) -> Elimination:
    """The start of an elimination of up to `remove` units; output errors in the unit of costs."""
    seen, weight = reader.seen, reader.weight.double()
    floor = ridge * float(seen.power.mean()) + 1e-12
    moment = seen.moment(centred=False, floor=floor)
    if known:
        half = root(reader.metric)  # type: ignore[arg-type]  # known: the metric is there
        by_output = weight.reshape(half.shape[1], -1)  # [out, taps * K]
        weight = (half @ by_output).view(-1, weight.shape[1]) * seen.count**0.5
    else:
        given = moment.times(weight) if isinstance(moment, Outer) else weight @ moment
        size = (given * weight).sum()
        weight = weight / size.clamp(min=1e-30).sqrt()
    # those of no unit have done their part in the inverse
    columns = reader.places.flatten()
    if isinstance(moment, Outer):
        inverse = Inverse(moment.inverse_rows()[:, columns], 1.0 / moment.floor)
    else:
        whole = torch.cholesky_inverse(torch.linalg.cholesky(moment))
        inverse = whole[columns][:, columns].float()
    return Elimination(weight.T[columns].float(), inverse, len(reader.places), remove)


@dataclass
class Inverse:
    """The inverse of a moment of few rows, [K, K], computed where it is looked at.

    Args:
        rows: R, [N, K], float64: the inverse is size * (1 - R^T R), whose digits cancel.
        size: above zero.
    """

    rows: Tensor
    size: float

    def __getitem__(self, places: Tensor) -> Tensor:
        """The rows of the matrix at these places, float32 [places, K]."""
        found = (self.rows[:, places].T @ self.rows).neg_()
        found[torch.arange(len(places)), places] += 1
        return found.mul_(self.size).float()

    def blocks(self, units: int) -> Tensor:
        """The square blocks of equal size on the diagonal, [units, S, S]."""
        by_unit = self.rows.T.unflatten(0, (units, -1))  # [units, S, N]
        products = by_unit @ by_unit.mT
        one = torch.eye(len(products[0]), device=products.device)
        return (one - products) * self.size


class Elimination:
    """A layer's weight and the inverse second moment of its inputs while units of inputs go, each
    time with the rest refitted by least squares.

    Removing units is a block Cholesky factorization of the inverse, with the units that go next as
    pivots. It looks to the left: rows of the inverse are brought up to date when they become the
    pivot, and only the blocks on the diagonal always are. So it takes O(K n^2) for n columns
    removed, and the inverse is only read, of few rows only where they become the pivot. One
    factorization, in float64, gives the inverse; the elimination runs in float32, as the ridge
    bounds the condition of what it works on.

    Args:
        weight: [K, out], the columns of a unit side by side.
        inverse: [K, K].
        units: how many there are.
        most: how many of them may go.
    """

    def __init__(self, weight: Tensor, inverse: Tensor | Inverse, units: int, most: int) -> None:
        width = len(weight)  # K = units * size
        self.units, self.size = units, width // units
        self.inverse = inverse  # [K, K]
        self.weight = weight  # [K, out]
        self.factor = weight.new_empty(most * self.size, width)  # [columns removed, K]
        self.removed = 0  # rows of the factor in use
        if isinstance(inverse, Inverse):
            blocks = inverse.blocks(units)
        else:
            square = inverse.view(units, self.size, units, self.size)
            blocks = square.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        self.blocks = blocks.double()  # [units, S, S]

    def costs(self, units: Tensor) -> Tensor:
        """tr(W_u inv(inv(H)_uu) W_u^T) of each of these units, [units]."""
        blocks = self.blocks[units]  # [U, S, S]
        if self.size == 1:
            lengths = torch.linalg.vector_norm(self.weight, dim=1)[units]
            return lengths.double().square() / blocks[:, 0, 0]
        weights = self.weight.view(self.units, self.size, -1)[units]  # [U, S, out]
        grams = weights @ weights.mT  # [U, S, S]
        solved = torch.linalg.solve(blocks, grams.double())
        return solved.diagonal(dim1=1, dim2=2).sum(1)

    def remove(self, units: Tensor) -> float:
        """Remove units together, and return what that costs."""
        rows = units[:, None] * self.size + torch.arange(self.size)
        rows = rows.flatten()  # [R]
        factor = self.factor[: self.removed]
        pivot = self.inverse[rows]  # [R, K]
        pivot.addmm_(factor[:, rows].T, factor, alpha=-1)
        corner = torch.linalg.cholesky(pivot[:, rows].double())
        one = torch.eye(len(rows), dtype=corner.dtype, device=corner.device)
        # a product with the inverse takes far less time than solving for a few rows
        corner = torch.linalg.solve_triangular(corner, one, upper=False).float()
        panel = corner @ pivot  # [R, K]
        moved = corner @ self.weight[rows]  # [R, out]
        self.weight.addmm_(panel.T, moved, alpha=-1)
        removed = self.removed + len(rows)
        self.factor[self.removed : removed] = panel
        self.removed = removed
        by_unit = panel.T.reshape(self.units, self.size, -1)  # [units, S, R]
        grown = by_unit @ by_unit.mT
        self.blocks -= grown.double()
        return float(moved.double().square().sum())


def root(metric: Tensor | Outer) -> Tensor:
    """R with R^T R = `metric`, a positive semidefinite matrix up to roundings; costs don't depend
    on which R it is.
    """
    if isinstance(metric, Outer):
        return metric.rows
    metric = metric.double()
    above = metric.clone()
    above.diagonal().add_(ROUNDING * metric.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(above)
    if not failed:
        return factor.T
    values, vectors = torch.linalg.eigh(metric)
    lengths = values.clamp(min=0).sqrt()
    return (vectors * lengths).T
