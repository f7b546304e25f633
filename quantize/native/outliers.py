"""Channels of an int8 layer's input that count in float."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MOST_OUTLIERS = 4  # channels of a layer; as in int8.cpp


class Outliers(NamedTuple):
    """Channels of a layer's input that count in float; see `quantize.nn.int8_kernels`.

    factor: float32 [inputs]. channels: int64 [C], C up to MOST_OUTLIERS. kept: float32
    [C, outputs].
    """

    factor: Tensor
    channels: Tensor
    kept: Tensor


def state_of(outliers: Outliers | None) -> tuple[tuple[int, int], ...]:
    """What changes when somebody writes into the tensors; empty where that can't be seen."""
    if outliers is None or any(tensor.is_inference() for tensor in outliers):
        return ()
    return tuple((tensor._version, tensor.data_ptr()) for tensor in outliers)


def contradiction(outliers: Outliers, inputs: int, outputs: int) -> str | None:
    """Why these can't be outliers of a layer of that size; None if they can."""
    factor, channels, kept = outliers
    count = channels.numel()
    if tuple(factor.shape) != (inputs,):
        return f"factor must be [{inputs}], got {list(factor.shape)}"
    if channels.ndim != 1 or channels.dtype != torch.int64 or count > MOST_OUTLIERS:
        return (
            f"channels must be int64 [up to {MOST_OUTLIERS}], got {channels.dtype} "
            f"{list(channels.shape)}"
        )
    if tuple(kept.shape) != (count, outputs):
        return f"kept must be [{count}, {outputs}], got {list(kept.shape)}"
    if count and not channels.is_meta and not (0 <= channels.min() and channels.max() < inputs):
        return f"channels must be in 0..{inputs - 1}, got {channels.tolist()}"
    return None
