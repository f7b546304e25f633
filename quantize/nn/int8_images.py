"""The arithmetic of an int8 convolution, on tensors.

    low[s], high[s] = min and max of sample s of the input, and 0      found when it arrives
    step[s], zero[s], q[s, ...]    as `int8_kernels` says of a row     the sample in 8 bits
    y[s, n, p] = float32(sum_k (q[s, k of p] - zero[s]) w[n, k]) * s[n] * step[s] + b[n]

where k runs over the channels and the places that output pixel p looks at; padding is q = zero,
which stands for 0. Where the kernel is one pixel, moves by one and nothing is padded, each pixel
has a range of its own, as the rows of a linear layer: that is finer, and takes one pass less. The
sum is exact in integers, and everything else is one float32 operation at a time in this order. A
depthwise layer has a few products for each number that it reads: it computes in float32,

    y[s, n, p] = x[s, n, first of p] * (w[n, first] s[n]) + x[s, n, second of p] * ... + b[n]

place after place, each product and each sum rounded. At last comes an activation (see
`elementary`), or y is cut off at the layer's limits. So every way of computing it gives the same
bits, and a sample's result depends neither on the others of the batch nor on the CPU: compiled C++
(`quantize.native.conv`) in one call, and the stock operations here, for graphs and where there is
no compiler.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from quantize.native import conv
from quantize.native import int8 as native_int8
from quantize.native.conv import PLAIN, Convolution, Ending, Geometry
from quantize.nn import int8_kernels as kernels
from quantize.nn import int8_products as products
from quantize.nn import is_traced
from quantize.nn.elementary import ACTIVATIONS
from quantize.nn.int8_stock import IN_GRAPH
from quantize.nn.straight import derived, straight

# ------------------------------------------------------------------------------------------------
# stock operations


def stock(product: products.Product, x: Tensor, how: Convolution) -> Tensor:
    """The convolution around one of the products of `int8_products`, but for its ending. Arguments
    and result: as for `conv.convolve`.
    """
    weight, scale, bias, geometry, _ = how
    if geometry.depthwise(weight):
        y = _depthwise(x, weight, scale, geometry)
        shape = [-1, *[1] * (x.dim() - 2)]
        return y if bias is None else y + bias.float().reshape(shape)
    if geometry.pointwise(weight.shape[2:]):
        return _pointwise(product, x, weight.flatten(1), scale, bias)
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
    return y.transpose(1, 2).reshape(x.shape[0], weight.shape[0], *out)


def ended(
    y: Tensor, ending: Ending, functions: Mapping[str, Callable[[Tensor], Tensor]] = ACTIVATIONS
) -> Tensor:
    """What becomes of the results; functions: activations by name."""
    y = y if ending.activation is None else functions[ending.activation](y)
    low, high = ending[:2]
    if (low, high) == PLAIN[:2]:
        return y
    return y.relu() if (low, high) == (0, math.inf) else y.clamp(low, high)


def _pointwise(
    product: products.Product,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """A linear layer on the channels of each pixel."""
    pixels = x.movedim(1, -1)
    rows = kernels.quantize_rows(pixels.reshape(-1, x.shape[1]))
    total = product(rows.q, weight) + rows.shift * products.sum_weights(weight)
    y = torch.mul(total, scale) * rows.step
    y = y if bias is None else y + bias.float()
    return y.reshape(*pixels.shape[:-1], weight.shape[0]).movedim(-1, 1).contiguous()


def _depthwise(x: Tensor, weight: Tensor, scale: Tensor, geometry: Geometry) -> Tensor:
    """Each channel by itself, the places of the kernel one after the other."""
    kernel = weight.shape[2:]
    out = geometry.sizes(x.shape[2:], kernel)
    x = F.pad(x, pads_of(geometry))
    weights = weight.flatten(1).float() * scale.float().unsqueeze(1)  # [channels, places]
    shape = [-1, *[1] * len(kernel)]
    total = x.new_zeros(x.shape[0], x.shape[1], *out)
    for place, own in zip(_places(x, kernel, out, geometry), weights.unbind(1), strict=True):
        total = total + place * own.reshape(shape)
    return total


def pads_of(geometry: Geometry) -> list[int]:
    """The padding as F.pad takes it: pairs, the last dimension first."""
    pads: list[int] = []
    for before, after in zip(geometry.before, geometry.after, strict=True):
        pads = [before, after, *pads]
    return pads


def _padded(q: Tensor, shift: Tensor, geometry: Geometry) -> Tensor:
    """q `[N, C, *size]` of int8 with the value that stands for 0 around it."""
    pads = pads_of(geometry)
    if not any(pads):
        return q
    wide = shift.reshape(-1, *[1] * (q.dim() - 1))
    return (F.pad(q.to(torch.int32) + wide, pads) - wide).to(torch.int8)


def _gathered(q: Tensor, kernel: Sequence[int], out: Sequence[int], geometry: Geometry) -> Tensor:
    """What each output pixel looks at: `[N * pixels, C * places]`."""
    places = [part.flatten(2) for part in _places(q, kernel, out, geometry)]
    gathered = torch.stack(places, 2)  # [N, C, places, pixels]
    return gathered.flatten(1, 2).transpose(1, 2).reshape(-1, q.shape[1] * len(places))


def _places(
    x: Tensor, kernel: Sequence[int], out: Sequence[int], geometry: Geometry
) -> Iterator[Tensor]:
    """By place of the kernel, what all output pixels see there of a padded x: `[N, C, *out]`."""
    for place in itertools.product(*map(range, kernel)):
        part = x
        for d, at in enumerate(place):
            start, stride = at * geometry.dilation[d], geometry.stride[d]
            end = start + stride * (out[d] - 1) + 1
            part = part[(slice(None),) * (d + 2) + (slice(start, end, stride),)]
        yield part


# ------------------------------------------------------------------------------------------------
# the choice


def convolve(x: Tensor, how: Convolution) -> Tensor:
    """x `[N, C, *size]` of a float dtype; the result is in x's dtype and memory format."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return in_graph(x, how)
    if torch.compiler.is_compiling():
        y = _whole(x.detach(), how)
        asked = x.requires_grad and torch.is_grad_enabled()
        return derived(y, in_float(x, how)) if asked else y
    return straight(_eager, in_float, [x], how)


_kept_whole: ContextVar[bool] = ContextVar("kept_whole", default=False)


@contextlib.contextmanager
def whole_in_graphs() -> Iterator[None]:
    """Inside, a recorded graph holds an int8 convolution as one operator of this package, for who
    puts another one in its place; depthwise layers, and those that pad each side by another number,
    stay stock operations.
    """
    token = _kept_whole.set(True)
    try:
        yield
    finally:
        _kept_whole.reset(token)


def _whole(x: Tensor, how: Convolution) -> Tensor:
    """One operator, the ending in it."""
    weight, scale, bias, geometry, ending = how
    found: Tensor = torch.ops.quantize.int8_conv(
        x, weight, scale, bias, geometry.stride, geometry.dilation, geometry.before,
        geometry.after, geometry.groups, *ending,
    )  # fmt: skip
    return found


def in_graph(x: Tensor, how: Convolution) -> Tensor:
    """Stock operations, for a graph that is recorded. A depthwise layer is one convolution there,
    which adds its products in an order of its own.
    """
    geometry, floats = how.geometry, x.detach().float()
    if geometry.depthwise(how.weight):
        return in_float(x.detach(), how)
    if _kept_whole.get() and geometry.before == geometry.after:
        y = _whole(floats, how._replace(ending=PLAIN))
    else:
        y = stock(products.int_mm, floats, how)
    y = ended(y, how.ending, IN_GRAPH)
    return y if y.dtype == x.dtype else y.to(x.dtype)  # a cast may be a view, to the graph's reader


def in_float(x: Tensor, how: Convolution) -> Tensor:
    """A convolution and an activation of torch with the weight as it reads, for layers that store
    int8 and compute in float; x of any float dtype.
    """
    weight, scale, bias, geometry, ending = how
    function = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
    own = None if bias is None else bias.float()
    floats, padding = x.float(), geometry.before
    if geometry.before != geometry.after:
        floats, padding = F.pad(floats, pads_of(geometry)), 0
    moves = geometry.stride, padding, geometry.dilation, geometry.groups
    y = function(floats, dense(weight, scale), own, *moves)
    return ended(y, ending, IN_GRAPH).to(x.dtype)


class _Float(NamedTuple):
    """A float weight, and the stored one, its scale and their versions that it was made of."""

    owner: weakref.ref[Tensor]
    scale: Tensor
    versions: tuple[int, int]
    made: Tensor


_floats: dict[int, _Float] = {}  # by the identity of a stored weight, until it dies


def dense(
    weight: Tensor, scale: Tensor, arranged: Callable[[Tensor], Tensor] = Tensor.contiguous
) -> Tensor:
    """The weight as it reads, computed when it is first asked for. arranged: puts it in order."""
    shape = -1, *[1] * (weight.dim() - 1)
    if weight.is_inference() or scale.is_inference() or is_traced():
        return arranged(weight.float() * scale.reshape(shape))
    key, versions = id(weight), (weight._version, scale._version)
    known = _floats.get(key)
    if known is not None and known.owner() is weight:
        if known.scale is scale and known.versions == versions:
            return known.made
    made = arranged(weight.detach().float() * scale.reshape(shape))
    owner = weakref.ref(weight, functools.partial(_forget, key))
    _floats[key] = _Float(owner, scale, versions, made)
    return made


def _forget(key: int, owner: weakref.ref[Tensor]) -> None:
    known = _floats.get(key)
    if known is not None and known.owner is owner:
        del _floats[key]


def _eager(x: Tensor, how: Convolution) -> Tensor:
    if not x.is_floating_point():
        raise TypeError(f"the input must be a floating point tensor, got {x.dtype}")
    dtype, weight = x.dtype, how.weight
    x = x.detach().float()
    fits = weight.numel() // len(weight) <= native_int8.MOST_INPUTS
    plain = fits and native_int8.takes(x) and not weight.is_inference()
    if plain and x.numel() and kernels.native_allowed() and is_exact():
        return conv.convolve(x, how).to(dtype)
    y = ended(stock(products.reference, x, how), how.ending)
    layout = conv.LAST[x.dim()] if conv.channels_last(x) else torch.contiguous_format
    return y.contiguous(memory_format=layout).to(dtype)


@functools.cache
def is_exact() -> bool:
    """Does this process have native code, and does it give the bits of stock operations on the
    largest sums?
    """
    generator = torch.Generator().manual_seed(0)
    moving = Geometry((1, 2), (1, 1), (1, 0), (1, 1))
    still = Geometry((1, 1), (1, 1), (0, 0), (0, 0))
    alone = Geometry((2, 1), (1, 1), (1, 0), (0, 1), 20)
    with torch.inference_mode(False), torch.no_grad():
        weight = torch.randint(-127, 128, (40, 20, 3, 2), generator=generator).to(torch.int8)
        weight[0], weight[1] = 127, -127
        scale = torch.rand(40, generator=generator, dtype=torch.float32)
        bias = torch.randn(40, generator=generator, dtype=torch.float32)
        x = torch.randn(2, 20, 6, 7, generator=generator, dtype=torch.float32)
        x[1] = 1
        own = weight[:20, :1].contiguous(), scale[:20], bias[:20], alone
        pixels = weight[:, :, 1:2, 1:].contiguous(), scale, bias, still
        cases = [
            (x, Convolution(weight, scale, bias, moving, Ending(0.0))),
            (x, Convolution(*pixels, Ending(-1.0, 6.0))),
            (x, Convolution(*own)),
            (x.contiguous(memory_format=torch.channels_last), Convolution(*own)),
        ]
        cases += [(x, Convolution(*pixels, Ending(activation=name))) for name in ACTIVATIONS]
        try:
            return all(itertools.starmap(_agrees, cases))
        except OSError:
            return False


def _agrees(x: Tensor, how: Convolution) -> bool:
    expected = ended(stock(products.reference, x, how), how.ending)
    return torch.equal(conv.convolve(x, how), expected)


# ------------------------------------------------------------------------------------------------
# an operator for graphs that torch.compile makes

_library = torch.library.Library("quantize", "FRAGMENT")
_library.define(
    "int8_conv(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int[] stride, int[] dilation, "
    "int[] before, int[] after, int groups, float low, float high, str? activation) -> Tensor"
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
    *ending: Any,
) -> Tensor:
    geometry = Geometry(tuple(stride), tuple(dilation), tuple(before), tuple(after), groups)
    how = Convolution(weight, scale, bias, geometry, Ending(*ending))
    return _eager(x, how).contiguous()


_library.impl("int8_conv", _operator, "CPU")


@torch.library.register_fake("quantize::int8_conv")
def _fake_conv(x, weight, scale, bias, stride, dilation, before, after, groups, *_):
    geometry = Geometry(tuple(stride), tuple(dilation), tuple(before), tuple(after), groups)
    out = geometry.sizes(x.shape[2:], weight.shape[2:])
    return x.new_empty(x.shape[0], weight.shape[0], *out)
