"""Convolutions split in space: the mathematics, on tensors alone, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.calibration import Outer
from quantize.compression.low_rank import maths


def spatial_factors(
    weight: Tensor,
    second_moment: maths.Moment | None = None,
    gradient_moment: Tensor | None = None,
    *,
    rank: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """A kernel [M, C, kh, kw] as kh x 1 to `rank` channels, then 1 x kw.

    Returns first [r, C, kh, 1], second [M, r, 1, kw] and their product, a matrix [M, C * kh * kw]
    like the weight that multiplies `calibration.rows`; second_moment is of those rows. The columns
    are found by a whitened SVD that ignores how neighbouring columns of a patch go together (no
    closed form knows it); the second layer is then the exact least-squares fit to the weight under
    the whole moment. float64.
    """
    m, c, kh, kw = weight.shape
    weight = weight.double()
    eye = torch.eye(kw, dtype=torch.float64, device=weight.device)
    by_column = weight.permute(0, 3, 1, 2).reshape(m * kw, c * kh)
    columns = None if second_moment is None else _of_columns(second_moment, kw)
    outputs = None if gradient_moment is None else torch.kron(gradient_moment.double(), eye)
    first, second, _ = maths.whitened_svd(
        by_column, columns, outputs, rank=rank
    )  # [r, C * kh], [M * kw, r]
    second = second.reshape(m, kw, rank).transpose(1, 2).reshape(m, rank * kw)
    patches = torch.kron(
        first, eye
    )  # [r * kw, C * kh * kw]: what the second layer sees, from what the kernel sees
    if second_moment is not None:
        seen = maths.times(patches, second_moment, maths.INPUT_RIDGE)
        factor = maths.cholesky(seen @ patches.T, 1e-10)
        second = torch.cholesky_solve(seen @ weight.flatten(1).T, factor).T
    return first.reshape(rank, c, kh, 1), second.reshape(m, rank, 1, kw), second @ patches


def _of_columns(moment: maths.Moment, kw: int) -> maths.Moment:
    """The moment of the columns of patches, [C * kh, C * kh], from that of patches."""
    if isinstance(moment, Outer):
        by_column = moment.rows.unflatten(1, (-1, kw)).movedim(2, 1)  # [N, kw, C * kh]
        return Outer(by_column.flatten(0, 1) / kw**0.5, moment.floor)
    size = len(moment) // kw
    return moment.double().reshape(size, kw, size, kw).diagonal(dim1=1, dim2=3).mean(-1)
