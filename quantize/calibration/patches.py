"""The rows that a layer's weight multiplies, from the input of one call, and products of rows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)  # whose patches `rows` gives


def rows(layer: nn.Module, x: Tensor, *, every: int = 1) -> Tensor:
    """The vectors that `layer`'s weight multiplies, as [N, K].

    Linear: [..., K] flattened. Conv1d, Conv2d of one group: patches of [B, C, (H,) W], K = C *
        kernel height * kernel width; with `every`, only those at every so many outputs along
        each spatial axis.
    """
    if isinstance(layer, CONVOLUTIONS):
        x = x if x.ndim == 2 + len(layer.kernel_size) else x[None]  # an image alone
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            x = F.pad(
                x, layer._reversed_padding_repeated_twice, mode=_PAD_MODES[layer.padding_mode]
            )
            padding: Any = (0,) * len(layer.kernel_size)
        else:
            padding = layer.padding
        stride = tuple(step * every for step in layer.stride)
        window = (layer.kernel_size, layer.dilation, padding, stride)
        if isinstance(layer, nn.Conv1d):
            x, window = (
                x.unsqueeze(-2),
                tuple((f, *w) for f, w in zip((1, 1, 0, 1), window, strict=True)),
            )
        patches = F.unfold(x, *window)  # [B, K, L]
        return patches.transpose(1, 2).reshape(-1, patches.shape[1])
    return x.reshape(-1, x.shape[-1])


def channel_rows(layer: Any, x: Tensor) -> Tensor:
    """The channels of a convolution's input at each position, as [N, C]."""
    x = x if x.ndim == 2 + len(layer.kernel_size) else x[None]
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def upper_gram(x: Tensor) -> list[Tensor]:
    """x^T x of rows x [N, K], on and above the diagonal: in strips of at most `STRIP` rows, each
    from its place on the diagonal to the right, [S, K - start].
    """
    starts = range(0, x.shape[1], STRIP)
    return [x[:, start : start + STRIP].T @ x[:, start:] for start in starts]


def symmetric(strips: list[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """The symmetric matrix [K, K] of which `upper_gram` gave the strips."""
    width = strips[0].shape[1]
    whole = strips[0].new_empty(width, width, dtype=dtype)
    start = 0
    for strip in strips:
        size = len(strip)
        stop = start + size
        corner, beside = strip[:, :size], strip[:, size:]
        whole[start:stop, start:stop] = corner.triu() + corner.triu(1).T
        whole[start:stop, stop:] = beside
        whole[stop:, start:stop] = beside.T
        start = stop
    return whole


def gram_bytes(width: int) -> int:
    """Of the strips of a product in float32, or of the rows that wait where they stay rows."""
    if width**2 > MOST_NUMBERS:
        return 4 * MOST_NUMBERS
    whole = width // STRIP
    rest = width - whole * STRIP
    numbers = STRIP * (whole * width - STRIP * whole * (whole - 1) // 2) + rest**2
    return 4 * numbers


def added(total: Tensor | float, part: Tensor, times: float = 1.0) -> Tensor:
    """`total` plus `times` the part, in the memory of `total`; the first total is a number."""
    if not isinstance(total, Tensor):
        return part * times + total
    if total.dtype != part.dtype:
        return total + part * times
    return total.add_(part, alpha=times)


STRIP = 256  # columns of one product
# Patches of a convolution's input lie close together and say much the same. Those of one call that
# are summed: so many for each column of their second moment, and never fewer than the second.
PATCHES_PER_COLUMN = 2
FEWEST_PATCHES = 1024
MOST_NUMBERS = 1 << 25  # of the rows of one layer that are kept at a time
_LARGE = 1e15  # squares of more, summed, leave the range of float32
# private to torch: without it, copies are made at once
_lazy_clone = getattr(torch, "_lazy_clone", torch.clone)
_PAD_MODES = {
    "zeros": "constant",
    "reflect": "reflect",
    "replicate": "replicate",
    "circular": "circular",
}


def sample(layer: nn.Conv1d | nn.Conv2d, x: Tensor) -> tuple[Tensor, int]:
    """Patches of a convolution [N, K] from a grid over its outputs, and how many outputs it has."""
    spatial = len(layer.kernel_size)
    images = math.prod(x.shape[: -spatial - 1])
    padding = layer._reversed_padding_repeated_twice[::-1]
    count = images
    for axis, size in enumerate(x.shape[-spatial:]):
        padded = size + padding[2 * axis] + padding[2 * axis + 1]
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        count *= (padded - reach - 1) // layer.stride[axis] + 1
    columns = layer.weight[0].numel()
    most = max(FEWEST_PATCHES, PATCHES_PER_COLUMN * columns)
    most = max(1, min(most, MOST_NUMBERS // columns))
    every = math.ceil((count / most) ** (1 / spatial))
    return rows(layer, x, every=max(1, every)), count


def exact(x: Tensor, largest: Tensor | None = None) -> Tensor:
    """float32, or float64 where squares of x could leave the range of float32 or x is float64
    already.

    largest: of |x|, in parts of x; None: looked for where it decides.
    """
    x = x.detach()
    if x.dtype == torch.float64:
        return x
    if x.dtype == torch.float16 or not x.numel():
        return x.float()
    ends = x.aminmax() if largest is None else (largest.max(),)
    return x.double() if max(ends, key=abs) > _LARGE else x.float()


def snapshot(tensor: Tensor) -> Tensor:
    """The values of a tensor: a copy that shares memory with it until either is written to."""
    tensor = tensor.detach()
    if type(tensor) is Tensor and tensor.layout == torch.strided:
        try:
            return _lazy_clone(tensor)
        except RuntimeError:  # its memory isn't torch's own
            pass
    return tensor.clone()


def storage_of(tensor: Tensor) -> int:
    """What tensors that share memory, other than until they are written to, have in common."""
    return tensor.untyped_storage()._cdata


def is_finite(x: Tensor) -> bool:
    """Is every number in a tensor finite? Many times as fast as `torch.isfinite(x).all()`."""
    if not x.numel() or not (x.is_floating_point() and x.layout == torch.strided):
        return bool(torch.isfinite(x).all())
    return all(math.isfinite(end) for end in x.detach().aminmax())
