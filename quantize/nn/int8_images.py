"""The arithmetic of an int8 convolution, on tensors.

    low[s], high[s] = min and max of sample s of the input, and 0      found when it arrives
    step[s], zero[s], q[s, ...]    as `int8_kernels` says of a row     the sample in 8 bits
    y[s, n, p] = float32(sum_k (q[s, k of p] - zero[s]) w[n, k]) * s[n] * step[s] + b[n]

where k runs over the channels and the places that output pixel p looks at; padding is q = zero,
which stands for 0. Where the kernel is one pixel, moves by one and nothing is padded, each pixel
has a range of its own, as the rows of a linear layer: that is finer, and takes one pass less. The
sum is exact in integers, and everything else is one float32 operation at a time in this order. So
every way of computing it gives the same bits, and a sample's result depends neither on the others
of the batch nor on the CPU: compiled C++ (`quantize.native.conv`) in one call, and the stock
operations here, for graphs and where there is no compiler.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quantize.native import conv
from quantize.native import int8 as native_int8
from quantize.native.conv import Geometry
from quantize.nn import int8_kernels as kernels
from quantize.nn import int8_products as products

# ------------------------------------------------------------------------------------------------
# stock operations


def stock(
    product: products.Product,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    relu: bool,
) -> Tensor:
    """The convolution around one of the products of `int8_products`. Arguments and result: as for
    `conv.convolve`.
    """
    if geometry.pointwise(weight.shape[2:]):
        return _pointwise(product, x, weight.flatten(1), scale, bias, relu)
    rows = kernels.quantize_rows(x.flatten(1))
    q = _padded(rows.q.reshape(x.shape), rows.shift, geometry)
    groups, kernel = geometry.groups, weight.shape[2:]
    out = geometry.sizes(x.shape[2:], kernel)
    weights = weight.flatten(1).chunk(groups)
    totals = []
    for part, own in zip(q.chunk(groups, 1), weights, strict=True):
        gathered = _gathered(part, kernel, out, geometry)
        totals.append(product(gathered, own.contiguous()))
    total = torch.cat(totals, 1) if groups > 1 else totals[0]
    total = total.reshape(x.shape[0], math.prod(out), weight.shape[0])
    sums = products.sum_weights(weight.flatten(1))
    y = torch.mul(total + rows.shift.unsqueeze(-1) * sums, scale) * rows.step.unsqueeze(-1)
    y = y if bias is None else y + bias.float()
    y = y.relu() if relu else y
    return y.transpose(1, 2).reshape(x.shape[0], weight.shape[0], *out)


def _pointwise(
    product: products.Product,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    relu: bool,
) -> Tensor:
    """A linear layer on the channels of each pixel."""
    pixels = x.movedim(1, -1)
    rows = kernels.quantize_rows(pixels.reshape(-1, x.shape[1]))
    total = product(rows.q, weight) + rows.shift * products.sum_weights(weight)
    y = torch.mul(total, scale) * rows.step
    y = y if bias is None else y + bias.float()
    y = y.relu() if relu else y
    return y.reshape(*pixels.shape[:-1], weight.shape[0]).movedim(-1, 1).contiguous()


def _padded(q: Tensor, shift: Tensor, geometry: Geometry) -> Tensor:
    """q `[N, C, *size]` of int8 with the value that stands for 0 around it."""
    if not any(geometry.before) and not any(geometry.after):
        return q
    pads: list[int] = []
    for before, after in zip(geometry.before, geometry.after, strict=True):
        pads = [before, after, *pads]
    wide = shift.reshape(-1, *[1] * (q.dim() - 1))
    return (F.pad(q.to(torch.int32) + wide, pads) - wide).to(torch.int8)


def _gathered(q: Tensor, kernel: Sequence[int], out: Sequence[int], geometry: Geometry) -> Tensor:
    """What each output pixel looks at: `[N * pixels, C * places]`."""
    places = []
    for place in itertools.product(*map(range, kernel)):
        part = q
        for d, at in enumerate(place):
            start, stride = at * geometry.dilation[d], geometry.stride[d]
            end = start + stride * (out[d] - 1) + 1
            part = part[(slice(None),) * (d + 2) + (slice(start, end, stride),)]
        places.append(part.flatten(2))
    gathered = torch.stack(places, 2)  # [N, C, places, pixels]
    return gathered.flatten(1, 2).transpose(1, 2).reshape(-1, q.shape[1] * len(places))


# ------------------------------------------------------------------------------------------------
# the choice


def convolve(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, geometry: Geometry, relu: bool
) -> Tensor:
    """x `[N, C, *size]` of a float dtype; the result is in x's dtype and memory format. Arguments:
    as for `conv.convolve`.
    """
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return in_graph(x, weight, scale, bias, geometry, relu)
    if torch.compiler.is_compiling():
        found = torch.ops.quantize.int8_conv(
            x.detach(), weight, scale, bias, geometry.stride, geometry.dilation, geometry.before,
            geometry.after, geometry.groups, relu,
        )  # fmt: skip
        return found
    return _eager(x, weight, scale, bias, geometry, relu)


def in_graph(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, geometry: Geometry, relu: bool
) -> Tensor:
    """Stock operations, for a graph that is recorded."""
    y = stock(products.int_mm, x.detach().float(), weight, scale, bias, geometry, relu)
    return y.to(x.dtype)


def _eager(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, geometry: Geometry, relu: bool
) -> Tensor:
    if not x.is_floating_point():
        raise TypeError(f"the input must be a floating point tensor, got {x.dtype}")
    dtype = x.dtype
    x = x.detach().float()
    fits = weight.numel() // len(weight) <= native_int8.MOST_INPUTS
    plain = fits and native_int8.takes(x) and not weight.is_inference()
    if plain and x.numel() and kernels.native_allowed() and is_exact():
        return conv.convolve(x, weight, scale, bias, geometry, relu).to(dtype)
    y = stock(products.reference, x, weight, scale, bias, geometry, relu)
    if conv.channels_last(x):
        y = y.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    return y.to(dtype)


@functools.cache
def is_exact() -> bool:
    """Does this process have native code, and does it give the bits of stock operations on the
    largest sums?
    """
    generator = torch.Generator().manual_seed(0)
    geometry = Geometry((1, 2), (1, 1), (1, 0), (1, 1))
    with torch.inference_mode(False), torch.no_grad():
        weight = torch.randint(-127, 128, (40, 20, 3, 2), generator=generator).to(torch.int8)
        weight[0], weight[1] = 127, -127
        scale = torch.rand(40, generator=generator, dtype=torch.float32)
        bias = torch.randn(40, generator=generator, dtype=torch.float32)
        x = torch.randn(2, 20, 6, 7, generator=generator, dtype=torch.float32)
        x[1] = 1
        moving = x, weight, scale, bias, geometry, True
        still = (
            x,
            weight[:, :, 1:2, 1:],
            scale,
            bias,
            Geometry((1, 1), (1, 1), (0, 0), (0, 0)),
            True,
        )
        try:
            return all(map(_agrees, (moving, still)))
        except OSError:
            return False


def _agrees(arguments: Any) -> bool:
    return torch.equal(conv.convolve(*arguments), stock(products.reference, *arguments))


# ------------------------------------------------------------------------------------------------
# an operator for graphs that torch.compile makes

_library = torch.library.Library("quantize", "FRAGMENT")
_library.define(
    "int8_conv(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int[] stride, int[] dilation, "
    "int[] before, int[] after, int groups, bool relu) -> Tensor"
)


def _operator(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
    groups: int,
    relu: bool,
) -> Tensor:
    geometry = Geometry(tuple(stride), tuple(dilation), tuple(before), tuple(after), groups)
    return _eager(x, weight, scale, bias, geometry, relu).contiguous()


_library.impl("int8_conv", _operator, "CPU")


@torch.library.register_fake("quantize::int8_conv")
def _fake_conv(x, weight, scale, bias, stride, dilation, before, after, groups, relu):
    geometry = Geometry(tuple(stride), tuple(dilation), tuple(before), tuple(after), groups)
    out = geometry.sizes(x.shape[2:], weight.shape[2:])
    return x.new_empty(x.shape[0], weight.shape[0], *out)
