"""The mathematics of low-rank factorization, on tensors alone, in float64.

A layer computes y = W x + b, with W [M, K]. Its inputs have the second moment S = E[x x^T] [K, K];
the gradients of what the model is for, with respect to y, have the second moment G = E[g g^T] [M,
M]. Replacing W by W' costs about

    loss = E[(g . (W - W') x)^2] ~ ||R^T (W - W') L||_F^2     with S = L L^T, G = R R^T

(independence of g and x as in K-FAC, Martens & Grosse, arXiv 1503.05671; with G = 1 it is the
squared error of the outputs: DRONE, Chen et al., NeurIPS 2021; SVD-LLM, Wang et al., arXiv
2403.07378). The best W' of rank r is the SVD of R^T W L cut at r and un-whitened, and its loss is
the sum of the squared singular values that were cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantize.calibration import Outer, Projected, is_finite, whole

Moment = Tensor | Outer  # of inputs, [K, K]
Shown = Moment | Projected  # of inputs, or of gradients, [M, M]
INPUT_RIDGE = 1e-6  # times the mean of the diagonal; keeps rank-deficient moments invertible
GRADIENT_RIDGE = 1e-2  # larger: a direction that moved no output in calibration may still matter


class Factors(NamedTuple):
    """W' = second @ first."""

    first: Tensor  # [r, K]
    second: Tensor  # [M, r]
    # [min(M, K)], singular values of the whitened weight, falling
    spectrum: Tensor

    @property
    def loss(self) -> float:
        """Of the cut: the squared singular values that are gone."""
        return self.spectrum[len(self.first) :].square().sum().item()


def cholesky(moment: Tensor, ridge: float) -> Tensor:
    """Lower triangular L [K, K] in float64, L L^T = moment + ridge * mean(diagonal) * 1, for any
    moment [K, K] of real data.

    The ridge grows tenfold until the factor exists (rank-deficient or tiny moments). Raises
    ValueError if not finite.
    """
    moment = moment.double()
    _check_finite(moment)
    scale = _scale(moment)
    moment = moment / scale
    eye = torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    while True:
        factor, failed = torch.linalg.cholesky_ex(moment + ridge * eye)
        if not failed:
            return factor * scale.sqrt()
        ridge = max(10 * ridge, 1e-12)


def with_unseen(moment: Any, count: int) -> Any:
    """The moment [K, K] of `count` rows of inputs, with some energy in all directions where there
    are fewer rows than inputs.

    Directions that few rows never show must not look free of charge: a layer would lose them, and
    answer well on calibration only. A new row has about e / (count + e) of its energy there, where
    e is the number of directions that share the energy of the known ones.
    """
    k = moment.shape[0]
    if count >= k or isinstance(moment, Projected):  # projected ones are of enough rows
        return moment
    if isinstance(moment, Outer):
        power, squares = k * moment.power, moment.squares
    else:
        power, squares = moment.diagonal().sum(), moment.square().sum()
    if power <= 0:
        return moment
    directions = power.square() / squares
    hidden = directions / (count + directions)
    more = (1 - count / k) * hidden * power / k
    if isinstance(moment, Outer):
        return Outer(moment.rows, moment.floor + float(more))
    moment = moment.clone()
    moment.diagonal().add_(more)
    return moment


def _scale(moment: Tensor) -> Tensor:
    """Mean of the diagonal, or 1 for a moment of nothing but zeros."""
    mean = moment.double().diagonal().mean()
    return torch.where(mean > torch.finfo(torch.float64).tiny, mean, 1.0)


def whitened_svd(
    weight: Tensor,
    second_moment: Shown | None = None,
    gradient_moment: Shown | None = None,
    *,
    rank: int | None = None,
    ridge: float = INPUT_RIDGE,
    gradient_ridge: float = GRADIENT_RIDGE,
) -> Factors:
    """Best factors of weight [M, K] under second_moment [K, K] of its inputs and gradient_moment
    [M, M] at its outputs.

    Without moments: the plain SVD. rank None: full rank, which reproduces the weight. The two
    factors' norms are balanced component by component. All results are float64. Raises ValueError
    for shapes that don't fit, a rank outside [1, min(M, K)], or values that are not finite.
    """
    m, k = weight.shape
    for name, moment, width in (
        ("second_moment", second_moment, k),
        ("gradient_moment", gradient_moment, m),
    ):
        if moment is not None and moment.shape != (width, width):
            raise ValueError(
                f"{name} has shape {tuple(moment.shape)}, the weight {tuple(weight.shape)} "
                f"needs {(width, width)}"
            )
    if not is_finite(weight):
        raise ValueError(f"weight of shape {tuple(weight.shape)} is not finite")
    rank = min(m, k) if rank is None else rank
    if not 1 <= rank <= min(m, k):
        raise ValueError(
            f"rank {rank} is outside [1, {min(m, k)}] for a weight of shape {tuple(weight.shape)}"
        )
    weight = weight.double()
    gram, factor, shaped = _whitened_gram(
        weight, second_moment, gradient_moment, ridge, gradient_ridge
    )
    # Eigenvectors of the smaller Gram matrix: much faster than an SVD, and at full rank the
    # projection is exact.
    values, vectors = torch.linalg.eigh(gram)
    basis = vectors.flip(1)[:, :rank]
    if m <= k:  # U [M, r]
        first = basis.T @ shaped  # U^T R^T W
        second = basis if factor is None else _solve(factor, basis)  # R^-T U
    else:  # V [K, r]
        second = shaped @ basis  # W L V
        first = (basis if factor is None else _solve(factor, basis)).T  # V^T L^-1
    first, second = _balance(first, second)
    return Factors(first, second, values.flip(0).clamp_min(0).sqrt())


def whitened_spectrum(
    weight: Tensor,
    second_moment: Shown | None = None,
    gradient_moment: Shown | None = None,
    *,
    ridge: float = INPUT_RIDGE,
    gradient_ridge: float = GRADIENT_RIDGE,
) -> Tensor:
    """The `spectrum` of `whitened_svd` alone."""
    gram, *_ = _whitened_gram(
        weight.double(), second_moment, gradient_moment, ridge, gradient_ridge
    )
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt()


def _whitened_gram(
    weight: Tensor,
    second_moment: Shown | None,
    gradient_moment: Shown | None,
    ridge: float,
    gradient_ridge: float,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gram matrix of R^T W L on its smaller side, the Cholesky factor of that side (None where it
    has no moment), and the weight times that factor.

    The moment of the larger side, whose factorization would cost most, only multiplies.
    """
    flat = len(weight) <= weight.shape[1]
    near: tuple[Any, float] = (gradient_moment, gradient_ridge)
    far: tuple[Any, float] = (second_moment, ridge)
    if not flat:
        near, far = far, near
    rows = weight if flat else weight.T
    factor = None
    if near[0] is not None:
        factor = cholesky(whole(near[0]), near[1])
    left = rows if factor is None else factor.T @ rows  # R^T W, or (W L)^T
    shaped = left if flat else left.T
    if not isinstance(far[0], Projected):
        return times(left, *far) @ left.T, factor, shaped
    gram = _between(rows, *far)
    if factor is not None:
        gram = factor.T @ gram @ factor
    return gram, factor, shaped


def _between(rows: Tensor, moment: Projected, ridge: float) -> Tensor:
    """rows [N, K] times moment [K, K] + ridge * mean(diagonal) * 1, times rows^T."""
    _check_finite(moment.seen)
    tiny = torch.finfo(torch.float64).tiny
    return moment.between(rows, ridge * (moment.power if moment.power > tiny else 1.0))


def times(rows: Tensor, moment: Moment | None, ridge: float) -> Tensor:
    """rows [N, K] times moment [K, K] + ridge * mean(diagonal) * 1; the rows where none."""
    if moment is None:
        return rows
    if isinstance(moment, Outer):
        _check_finite(moment.rows)
        return moment.times(rows, float(ridge * moment.power))
    _check_finite(moment)
    return torch.addmm(rows, rows, moment.double(), beta=float(ridge * _scale(moment)))


def _solve(factor: Tensor, basis: Tensor) -> Tensor:
    """factor^-T basis, for a lower triangular factor."""
    return torch.linalg.solve_triangular(factor.T, basis, upper=True)


def _check_finite(moment: Tensor) -> None:
    if not is_finite(moment):
        raise ValueError(f"second moment of shape {tuple(moment.shape)} is not finite")


def _balance(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Same product, with equal norms of row i of first and column i of second."""
    a, b = first.norm(dim=1), second.norm(dim=0)
    scale = torch.where((a > 0) & (b > 0), (b / a.clamp_min(1e-300)).sqrt(), 1.0)
    return first * scale[:, None], second / scale


# Ranks.


def candidate_ranks(m: int, k: int) -> range:
    """At which two factors of an [m, k] matrix hold fewer numbers than the matrix."""
    return range(1, (m * k - 1) // (m + k) + 1)


class Choice(NamedTuple):
    """One way to store a layer: `rank` None is the layer as it is."""

    parameters: int
    loss: float
    rank: int | None


def choices(spectrum: Tensor, shape: tuple[int, int], ranks: Sequence[int]) -> list[Choice]:
    """The ways to store a layer of `shape` at these ranks, and as it is, by rising size, with what
    each loses.
    """
    m, k = shape
    squares = spectrum.double() ** 2
    tail = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
    return [Choice(r * (m + k), tail[r].item(), r) for r in sorted(ranks)] + [
        Choice(m * k, 0.0, None)
    ]


def allocate(layers: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, int | None]:
    """The choice per layer that loses least in sum within `budget` parameters.

    Greedy on loss per parameter over the lower convex hull of each layer's choices, the optimum up
    to one step; what is left then goes where it still saves most. Layers start at their smallest
    choice; the result is above the budget only if those already are.
    """
    chosen, steps = {}, []
    for name, options in layers.items():
        hull = _lower_hull(options)
        chosen[name] = hull[0]
        for a, b in pairwise(hull):
            steps.append(((a.loss - b.loss) / (b.parameters - a.parameters), len(steps), name, b))
    left = budget - sum(choice.parameters for choice in chosen.values())
    stopped = set()
    for _, _, name, choice in sorted(steps, key=lambda step: (-step[0], step[1])):
        more = choice.parameters - chosen[name].parameters
        if name in stopped or more > left:
            stopped.add(
                name
            )  # its later steps build on this one; smaller steps of others may still fit
            continue
        left -= more
        chosen[name] = choice
    while True:
        better = []
        for name, options in layers.items():
            now = chosen[name]
            for choice in options:
                fits = 0 < choice.parameters - now.parameters <= left
                if fits and choice.loss < now.loss:
                    better.append((now.loss - choice.loss, name, choice))
        if not better:
            return {name: choice.rank for name, choice in chosen.items()}
        _, name, choice = max(better, key=lambda option: option[0])
        left -= choice.parameters - chosen[name].parameters
        chosen[name] = choice


def _lower_hull(options: Sequence[Choice]) -> list[Choice]:
    """The options, by rising size, that no mix of two others beats."""
    hull: list[Choice] = []
    for c in options:
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            if (a.loss - b.loss) * (c.parameters - b.parameters) > (b.loss - c.loss) * (
                b.parameters - a.parameters
            ):
                break
            hull.pop()
        hull.append(c)
    return hull


def weighted_error(
    error: Tensor, second_moment: Moment | None, gradient_moment: Tensor | None
) -> float:
    """||R^T error L||_F^2 for error [M, K]: the loss that `whitened_svd` minimises."""
    error = error.double()
    by_input = times(error, second_moment, INPUT_RIDGE)
    by_output = times(error.T, gradient_moment, GRADIENT_RIDGE).T
    return (by_input * by_output).sum().item()
