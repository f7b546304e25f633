"""Functions of torch between int8 layers, in an arithmetic of this package (`native.program`).

torch's norms, attention and activations round in an order that depends on the CPU and the number of
threads. These give the same bits on every instruction set, for any number of threads and any batch.
They differ from torch's by rounding alone: a norm by 4e-6 of the row's largest result, attention by
4e-6 of the largest value, activations by 3e-7 of the input. torch's own are called where there is
no native code, where gradients may be asked for, for other dtypes than float32, and for fewer than
four queries. The mean of an image's channels, by `adaptive_avg_pool2d` or `mean`, is within 1e-6 of
the largest number.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quantize.native import conv, program
from quantize.native import int8 as native_int8
from quantize.native.int8_library import Attention, functions
from quantize.native.program import Program, Work, place
from quantize.nn import int8_kernels as kernels

GELUS = {"none": "gelu", "tanh": "gelu_tanh"}  # names of activations, as F.gelu has them
_MOST_FORMS = 64  # of arguments that a function remembers
_PIXELS = ({2, 3}, {-2, -1}, {2, -1}, {-2, 3})  # dimensions of images


class Own:
    """A function of torch, computed by one native step where it can be.

    Args:
        like: torch's function.
        work: takes its arguments and gives the step, or None.
        by_position: does the result lie as [B, T, H, D], of the shape [B, H, T, D]?
    """

    def __init__(
        self, like: Callable[..., Tensor], work: Callable[..., Work | None], by_position: bool
    ) -> None:
        self.like, self.work, self.by_position = like, work, by_position
        self.known: dict[Any, _Alone | None] = {}  # by their form, and which are the same

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        values = *args, *kwargs.values()
        tensors = [one for one in values if isinstance(one, Tensor)]
        if not _are_free(tensors):
            return self.like(*args, **kwargs)
        key = (*map(_form, values), *kwargs, _which_are_same(tensors))
        if key not in self.known:
            if len(self.known) >= _MOST_FORMS:
                self.known.clear()
            work = self.work(*args, **kwargs)
            self.known[key] = None if work is None else _Alone(work, tensors, self.by_position)
        found = self.known[key]
        return self.like(*args, **kwargs) if found is None else found.run(tensors)


class _Alone:
    """A program of one step for tensors of the forms of `tensors`."""

    def __init__(self, work: Work, tensors: Sequence[Tensor], by_position: bool) -> None:
        identities = [*map(id, tensors)]
        order = [None if one is None else identities.index(id(one)) for one in work.reads]
        places = [None if at is None else place(at) for at in order]
        self.program = Program([work], [[*places, place(len(tensors))]])
        what, self.by_position = work.what, by_position
        if isinstance(what, Attention):
            self.shape = what.batches, what.queries, what.heads, what.wide
        else:
            self.shape = tuple(tensors[order[0] or 0].shape)

    def run(self, tensors: Sequence[Tensor]) -> Tensor:
        y = torch.empty(self.shape, dtype=torch.float32, device="cpu")
        self.program.run([*map(Tensor.data_ptr, (*tensors, y))])
        return y.transpose(1, 2) if self.by_position else y


def _form(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    return tuple(value) if isinstance(value, list) else (type(value), value)


def _which_are_same(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """For each tensor the place of the first one that it is."""
    identities = [*map(id, tensors)]
    return tuple(map(identities.index, identities))


def _are_free(tensors: Sequence[Tensor]) -> bool:
    """May native code read these, and is no gradient asked for?"""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return kernels.native_allowed() and all(map(native_int8.takes, tensors)) and has_code()


@functools.cache
def has_code() -> bool:
    """Is there native code here?"""
    try:
        functions()
    except OSError:
        return False
    return True


def layer_norm_work(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Work | None:
    """As F.layer_norm."""
    return _norm_work(input, normalized_shape, weight, bias, eps, centered=True)


def rms_norm_work(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Work | None:
    """As F.rms_norm."""
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    return _norm_work(input, normalized_shape, weight, None, eps, centered=False)


def _norm_work(input: Tensor, sizes: Sequence[int], *how: Any, centered: bool) -> Work | None:
    """A norm over the last dimensions, if these are their sizes."""
    if tuple(sizes) != input.shape[input.dim() - len(sizes) :]:
        return None
    return program.norm(input, math.prod(sizes), *how, centered=centered)


def attention_work(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Work | None:
    """As F.scaled_dot_product_attention."""
    if dropout_p or (is_causal and attn_mask is not None) or query.dim() != 4 or key.dim() != 4:
        return None
    if query.shape[1] != key.shape[1] and not enable_gqa:
        return None
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return program.attention(query, key, value, attn_mask, is_causal, scale)


def silu_work(input: Tensor, inplace: bool = False) -> Work | None:
    """As F.silu."""
    return None if inplace or not input.is_contiguous() else program.each(input, activation="silu")


def gelu_work(input: Tensor, approximate: str = "none") -> Work | None:
    """As F.gelu."""
    name = GELUS.get(approximate)
    if name is None or not input.is_contiguous():
        return None
    return program.each(input, activation=name)


def averaged(input: Tensor, output_size: Any) -> Tensor:
    """As F.adaptive_avg_pool2d."""
    if output_size in (1, (1, 1), [1, 1]) and _is_image(input):
        return conv.average(input)
    return F.adaptive_avg_pool2d(input, output_size)


def mean(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """As torch.mean."""
    kept = pixels_kept(*args, **kwargs)
    if kept is None or not _is_image(input):
        return torch.mean(input, *args, **kwargs)
    y = conv.average(input)
    return y if kept else y.flatten(1)


def pixels_kept(dim: Any = None, keepdim: Any = False, **others: Any) -> bool | None:
    """Does torch.mean keep the dimensions of size that it goes over, of a batch of images? None
    where these arguments ask for anything but the mean of each channel.
    """
    pixels = isinstance(dim, (tuple, list)) and len(dim) == 2 and {*dim} in _PIXELS
    return keepdim if pixels and type(keepdim) is bool and not others else None


def _is_image(x: Any) -> bool:
    """May native code read the numbers of this batch of images?"""
    if not isinstance(x, Tensor) or x.dim() != 4 or not x.numel():
        return False
    return x.dtype is torch.float32 and _are_free([x])


# By torch's function.
OWN: dict[Any, Own] = {
    like: Own(like, work, like is F.scaled_dot_product_attention)
    for like, work in (
        (F.layer_norm, layer_norm_work),
        (F.rms_norm, rms_norm_work),
        (F.scaled_dot_product_attention, attention_work),
        (F.silu, silu_work),
        (F.gelu, gelu_work),
    )
}
REPLACED: dict[Any, Callable[..., Tensor]] = {
    **OWN,
    **dict.fromkeys((torch.mean, Tensor.mean), mean),
    F.adaptive_avg_pool2d: averaged,
}
