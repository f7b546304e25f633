"""Rounding of a weight with a small error of what it gives for inputs like those that were seen.

Each column's rounding error is made up for by the columns after it, as far as the inputs are
correlated.

Source: GPTQ (Frantar et al., arXiv 2210.17323) as Babai's nearest plane (Chen et al., arXiv
2507.18553): with the second moment of the inputs as U U^T, U upper triangular, the errors so far
times U say by how much the next column has to move. So one factorization does, where inverting
takes three.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DAMPING = 0.01  # share of the mean second moment that is added to each
Rounding = Callable[[Tensor], Tensor]


def rounded(
    weight: Tensor, second_moment: Tensor, width: int, grid: Callable[[Tensor], Rounding]
) -> Tensor:
    """`weight` float32 [N, K] on a grid.

    Args:
        second_moment: [K, K], E[x x^T] of the inputs x.
        width: columns of a group, which share a grid.
        grid: given a group [N, width] as corrected so far, what rounds one of its columns [N, 1].
    """
    moment = second_moment.double().clone()
    diagonal = moment.diagonal()
    diagonal += DAMPING * diagonal.mean().clamp_min(1e-12)
    factor = torch.linalg.cholesky(moment.flip(0, 1)).flip(0, 1).float()  # U
    result = torch.empty_like(weight)
    left = torch.zeros_like(weight)  # what rounding took from each column so far
    for start in range(0, weight.shape[1], width):
        group = slice(start, start + width)
        inverse = torch.linalg.inv(factor[group, group].double()).float()
        weight_now = weight[:, group] + left[:, :start] @ factor[:start, group] @ inverse
        to_grid = grid(weight_now)
        for i in range(weight_now.shape[1]):
            column = weight_now[:, i : i + 1]
            result[:, start + i : start + i + 1] = values = to_grid(column)
            error = (column - values) / inverse[i, i]
            weight_now[:, i:] -= error * inverse[i, i:]
        left[:, group] = weight[:, group] - result[:, group]
    return result
