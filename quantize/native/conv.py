"""An int8 convolution in one native call (conv.cpp).

What it computes, and what stock operations compute in its place, is said in
`quantize.nn.int8_images`; both give the same bits. The packed copy of a weight lies outside of the
modules, so that no copy, move or file carries a stale one along.
"""

from __future__ import annotations

import ctypes
import functools
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from quantize.native import build, int8, isa
from quantize.native.recurrent import versions_of

_LANES, _STEP = 16, 64
_MOST_BYTES = 1 << 40  # of padded images; the kernel's sizes don't overflow below

_SOURCE = Path(__file__).with_name("conv.cpp")
_NUMBER, _POINTER = ctypes.c_int64, ctypes.c_void_p
_THREE = _NUMBER * 3


class Layer(ctypes.Structure):
    """As in conv.cpp."""

    _fields_ = [
        *((name, _THREE) for name in ("kernel", "stride", "dilation", "before", "after")),
        *((name, _NUMBER) for name in ("channels", "outputs", "groups", "taps")),
        *((name, _POINTER) for name in ("packed", "sums", "scale", "bias")),
        ("relu", _NUMBER),
    ]


class Call(ctypes.Structure):
    """As in conv.cpp."""

    _fields_ = [
        *((name, _NUMBER) for name in ("samples", "threads", "last")),
        *((name, _THREE) for name in ("size", "out")),
        *((name, _POINTER) for name in ("x", "y")),
    ]


@dataclass(frozen=True)
class Functions:
    """What conv.cpp exports."""

    open_library: Callable[[], int]
    convolve: Callable[..., int]


def read(library: ctypes.CDLL) -> Functions:
    """The functions of a compiled conv.cpp. Raises OSError for a library that isn't one of this
    version.
    """
    try:
        sizes = [_NUMBER.in_dll(library, name).value for name in ("layer_bytes", "call_bytes")]
        functions = Functions(library.open_library, library.convolve)
    except (AttributeError, ValueError) as error:
        raise OSError(f"the compiled library lacks a symbol: {error}") from None
    expected = [ctypes.sizeof(Layer), ctypes.sizeof(Call)]
    if sizes != expected:
        raise OSError(f"the compiled library has structs of {sizes} bytes, not of {expected}")
    functions.convolve.argtypes = [_POINTER, _POINTER]
    return functions


def code(level: str) -> build.Code:
    """conv.cpp for a level of `isa`. Contraction is off, as for int8.cpp."""
    flags = (*isa.FLAGS[level], "-ffp-contract=off", "-Wno-psabi")
    return build.Code(f"conv-{level}", _SOURCE, int8.HEADERS, flags, read)


@functools.cache
def functions() -> Functions:
    """The kernels for the best instruction set that this process may use. Compiles at the first
    call.

    Raises: OSError: there are none; the message says why. ValueError: QUANTIZE_ISA names no level.
    """
    for level in reversed(isa.levels()):
        library = build.library(code(level))
        if library is not None and library.functions.open_library() == 0:
            return library.functions
    raise OSError("this process may not use the instruction sets that the CPU has")


@dataclass(frozen=True)
class Geometry:
    """How a convolution of 1 to 3 dimensions moves over its input, in the order of the dimensions.

    Args:
        stride, dilation, before, after: of each dimension; before and after are the padding with
            zeros.
        groups: as in `torch.nn.Conv2d`.
    """

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    groups: int = 1

    def pointwise(self, kernel: Sequence[int]) -> bool:
        """Does each output pixel look at one input pixel, in order?"""
        still = (*kernel, *self.stride) == (1,) * (2 * len(kernel))
        return still and self.groups == 1 and not any((*self.before, *self.after))

    def sizes(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """Of the output. Raises ValueError where the padded input is smaller than the kernel."""
        found = []
        for d, (n, k) in enumerate(zip(size, kernel, strict=True)):
            reach = self.dilation[d] * (k - 1) + 1
            whole = n + self.before[d] + self.after[d]
            if whole < reach:
                raise ValueError(
                    f"the input, padded to {whole}, is smaller than the kernel, which covers "
                    f"{reach} (dimension {d + 2})"
                )
            found.append((whole - reach) // self.stride[d] + 1)
        return tuple(found)


def _three(values: Sequence[int], missing: int) -> ctypes.Array[ctypes.c_int64]:
    return _THREE(*[missing] * (3 - len(values)), *values)


class Packed:
    """A weight int8 [outputs, channels of a group, *kernel] in the kernel's layout.

    Attributes: layer: the struct, but for its scale and bias.
    """

    def __init__(self, weight: Tensor, geometry: Geometry, owner: weakref.ref[Tensor]) -> None:
        self.owner, self.version, self.pointer = owner, weight._version, weight.data_ptr()
        self.geometry = geometry
        groups, per_group = geometry.groups, weight.shape[1]
        self.outputs = weight.shape[0] // groups
        self.padded = -(-self.outputs // _LANES) * _LANES
        rows = weight.movedim(1, -1)  # [outputs, *kernel, channels]
        taps = -(-per_group // 4) * 4 if groups == 1 else per_group
        rows = F.pad(rows, [0, taps - per_group]).flatten(1)
        rows = self.blocked(rows)
        inputs = rows.shape[1]
        size = len(rows) * (-(-inputs // _STEP) * _STEP)
        self.packed = torch.empty(size, dtype=torch.int8, device="cpu")
        self.sums = torch.empty(len(rows), dtype=torch.int32, device="cpu")
        pointers = self.packed.data_ptr(), self.sums.data_ptr()
        int8.functions().pack(rows.data_ptr(), len(rows), inputs, *pointers)
        zeros = [_three(v, 0) for v in (geometry.before, geometry.after)]
        ones = [_three(v, 1) for v in (weight.shape[2:], geometry.stride, geometry.dilation)]
        counts = per_group * groups, weight.shape[0], groups, taps
        self.layer = Layer(*ones, *zeros, *counts, *pointers)
        self.vectors: tuple[Tensor | None, ...] = ()  # the scale and bias given last,
        self.versions: tuple[int | None, ...] = ()
        self.held: list[Tensor | None] = []  # and what the kernel reads of them

    def is_of(self, weight: Tensor, geometry: Geometry) -> bool:
        """Was it made of this weight, as it is now?"""
        return (
            self.owner() is weight
            and self.version == weight._version
            and self.pointer == weight.data_ptr()
            and self.geometry == geometry
        )

    def blocked(self, tensor: Tensor) -> Tensor:
        """[outputs, ...] with the outputs of each group filled up to whole panels."""
        trailing = tensor.shape[1:]
        grouped = tensor.reshape(self.geometry.groups, self.outputs, *trailing)
        pads = [0, 0] * len(trailing) + [0, self.padded - self.outputs]
        return F.pad(grouped, pads).reshape(-1, *trailing).contiguous()

    def with_vectors(self, scale: Tensor, bias: Tensor | None) -> Layer:
        """The struct with these. It points into tensors that this object holds until the next
        call.
        """
        vectors = (scale, bias)
        versions = versions_of(vectors)
        same = all(a is b for a, b in zip(vectors, self.vectors, strict=False))
        if not self.vectors or not same or versions != self.versions or None in versions:
            self.held = [None if v is None else self.blocked(v.float()) for v in vectors]
            self.vectors, self.versions = vectors, versions
            pointers = [None if v is None else v.data_ptr() for v in self.held]
            self.layer.scale, self.layer.bias = pointers
        return self.layer


_packs: dict[int, Packed] = {}  # by the identity of a weight, until it dies or changes


def packed(weight: Tensor, geometry: Geometry) -> Packed:
    """`weight` in the kernel's layout."""
    key = id(weight)
    found = _packs.get(key)
    if found is None or not found.is_of(weight, geometry):
        owner = weakref.ref(weight, functools.partial(_forget, key))
        found = _packs[key] = Packed(weight, geometry, owner)
    return found


def _forget(key: int, owner: weakref.ref[Tensor]) -> None:
    found = _packs.get(key)
    if found is not None and found.owner is owner:
        del _packs[key]


def channels_last(x: Tensor) -> bool:
    """Are the channels the innermost dimension of x `[N, C, ...]` in memory? That of a batch where
    both orders are the same counts as the ordinary one, as torch has it.
    """
    if x.dim() == 3 or x.is_contiguous():
        return False
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.is_contiguous(memory_format=formats[x.dim()])


def convolve(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, geometry: Geometry, relu: bool
) -> Tensor:
    """The convolution of x, each sample of it in 8 bits.

    Args:
        x: float32 [N, channels, *size], not empty, one that `int8.takes` takes.
        weight: int8 [outputs, channels / groups, *kernel], no inference tensor.
        scale: float32 [outputs]. bias: [outputs], or None.
        geometry: see there.
        relu: negative outputs become 0.

    Returns: float32 [N, outputs, *out], in the memory format of x.

    Raises: OSError: there is no native code here (see `functions`). MemoryError: for images that
        are too large.
    """
    found = packed(weight, geometry)
    layer = found.with_vectors(scale, bias)
    layer.relu = relu
    last = channels_last(x)
    x = x if last else x.contiguous()
    size, kernel = x.shape[2:], weight.shape[2:]
    out = geometry.sizes(size, kernel)
    shape = (x.shape[0], weight.shape[0], *out)
    format = torch.contiguous_format
    if last:
        format = torch.channels_last if len(size) == 2 else torch.channels_last_3d
    padded = map(sum, zip(size, geometry.before, geometry.after, strict=True))
    if x.shape[0] * (x.shape[1] + 4) * math.prod(padded) > _MOST_BYTES:
        raise MemoryError(f"no memory for {list(x.shape)} with padding {geometry.before}")
    y = torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=format)
    products = y.numel() * (weight.numel() // len(weight))
    threads = int8.threads(products)
    call = Call(x.shape[0], threads, last, _three(size, 1), _three(out, 1))
    call.x, call.y = x.data_ptr(), y.data_ptr()
    if functions().convolve(ctypes.byref(layer), ctypes.byref(call)):
        raise MemoryError(f"no memory for a convolution of {list(x.shape)}")
    return y
