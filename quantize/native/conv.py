"""Int8 convolutions in one native call (conv.cpp): one of them, or a program of many.

What a convolution computes, and what stock operations compute in its place, is said in
`quantize.nn.int8_images`; both give the same bits.
"""

from __future__ import annotations

import ctypes
import functools
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from quantize.native import int8, packs
from quantize.native.build import Kernels
from quantize.native.int8_library import ACTIVATIONS, packed_rows
from quantize.native.packs import FLOAT, NUMBER, POINTER, fields
from quantize.native.tails import TAILS

_LANES = 16
_MOST_SHAPES = 64  # of inputs that are remembered for a weight
_MOST_BYTES = 1 << 40  # of padded images; the kernel's sizes don't overflow below

# as in steps.h
CONVOLUTION, DEPTHWISE, LARGEST, TO_LAST, TO_PLANES, MEAN = range(6)
INPUT, OUTPUT, NOWHERE = -1, -2, -3

_THREE = NUMBER * 3


class Ending(NamedTuple):
    """What becomes of results: an activation, one of int8_library.ACTIVATIONS, then what is below
    `low` becomes low, and what is above `high` becomes high.
    """

    low: float = -math.inf
    high: float = math.inf
    activation: str | None = None


PLAIN = Ending()


class Layer(ctypes.Structure):
    """As in steps.h."""

    _fields_ = fields(
        (_THREE, "kernel stride dilation before after"),
        (NUMBER, "channels outputs groups taps"),
        (POINTER, "packed sums scale bias weights"),
    )


class Step(ctypes.Structure):
    """As in steps.h."""

    _fields_ = fields(
        (POINTER, "layer"),
        (NUMBER, "kind samples"),
        (_THREE, "size out"),
        (NUMBER, "together x y other gate x_last y_last x_range y_range activation"),
        (POINTER, "tails"),
        (FLOAT, "low high last_low last_high"),
    )

    def end(self, ending: Ending) -> None:
        """Do this with the results."""
        self.low, self.high, activation = ending
        self.activation = ACTIVATIONS[activation]
        if activation in TAILS:
            self.tails = TAILS[activation].data_ptr()


class Turns(ctypes.Structure):
    """As in steps.h."""

    _fields_ = fields(
        (NUMBER, "turns threads x_apart y_apart"),
        (POINTER, "input output arena"),
    )


@dataclass(frozen=True)
class Functions:
    """What conv.cpp exports. range_bytes: of the range of a sample, as one thread sees it."""

    open_library: Callable[[], int]
    run_program: Callable[..., int]
    range_bytes: int


def read(library: ctypes.CDLL) -> Functions:
    """The functions of a compiled conv.cpp. Raises OSError for a library that isn't one of this
    version.
    """
    sizes = packs.sizes(Layer, Step, Turns)
    open_library, run_program = packs.symbols(library, ("open_library", "run_program"), sizes)
    run_program.argtypes = [POINTER, NUMBER, POINTER]
    return Functions(open_library, run_program, NUMBER.in_dll(library, "range_bytes").value)


KERNELS = Kernels(Path(__file__).with_name("conv.cpp"), read)


@functools.cache
def functions() -> Functions:
    """The kernels for the best instruction set; errors as of `Kernels.best`."""
    return KERNELS.best().functions


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

    def depthwise(self, weight: Tensor) -> bool:
        """Does each output look at one channel, and each channel go to one output? Weights:
        [outputs, channels / groups, *kernel].
        """
        return self.groups > 1 and weight.shape[:2] == (self.groups, 1)

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

    def layer(self, kernel: Sequence[int], channels: int, outputs: int, taps: int = 0) -> Layer:
        """The struct, but for what it points to."""
        zeros = [_three(v, 0) for v in (self.before, self.after)]
        ones = [_three(v, 1) for v in (kernel, self.stride, self.dilation)]
        return Layer(*ones, *zeros, channels, outputs, self.groups, taps)


STILL = Geometry((1, 1), (1, 1), (0, 0), (0, 0))


class Convolution(NamedTuple):
    """What an input is convolved with.

    Args:
        weight: int8 [outputs, channels / groups, *kernel].
        scale: float32 [outputs]. bias: [outputs], or None.
        geometry, ending: see there.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    geometry: Geometry
    ending: Ending = PLAIN


def _three(values: Sequence[int], missing: int) -> ctypes.Array[ctypes.c_int64]:
    return _THREE(*[missing] * (3 - len(values)), *values)


class Packed(packs.Pack):
    """A weight int8 [outputs, channels of a group, *kernel] in the kernel's layout.

    Attributes: layer: the struct, but for its scale and bias. kernel: of the weight. products: of
        an output number.
    """

    def __init__(self, weight: Tensor, how: Geometry, owner: weakref.ref[Tensor]) -> None:
        super().__init__(weight, how, owner)
        self.geometry, self.kernel = how, tuple(weight.shape[2:])
        self.products = weight[0].numel()
        groups, per_group = how.groups, weight.shape[1]
        self.outputs = weight.shape[0] // groups
        self.depthwise = how.depthwise(weight)
        # one block for all outputs of a depthwise layer, else one for those of each group
        self.blocks = 1 if self.depthwise else groups
        taps = -(-per_group // 4) * 4 if groups == 1 else per_group
        self.layer = how.layer(self.kernel, per_group * groups, weight.shape[0], taps)
        self.steps: dict[tuple[torch.Size, bool, Ending], Step] = {}
        if self.depthwise:
            self.integers = weight.flatten(1).float()
            return
        rows = F.pad(weight.movedim(1, -1), [0, taps - per_group])  # [outputs, *kernel, channels]
        self.packed, self.sums = packed_rows(self.blocked(rows.flatten(1)))
        pointers = self.packed.data_ptr(), self.sums.data_ptr()
        self.layer.packed, self.layer.sums = pointers

    def blocked(self, tensor: Tensor) -> Tensor:
        """[outputs, ...] with the outputs of each block filled up to whole panels."""
        trailing = tensor.shape[1:]
        grouped = tensor.reshape(self.blocks, -1, *trailing)
        missing = -grouped.shape[1] % _LANES
        pads = [0, 0] * len(trailing) + [0, missing]
        return F.pad(grouped, pads).reshape(-1, *trailing).contiguous()

    def with_vectors(self, scale: Tensor, bias: Tensor | None) -> Layer:
        """The struct with these. It points into tensors that this object holds until the next
        call.
        """
        if not self.are_held((scale, bias)):
            self.layer.scale, self.layer.bias = self.pointers(scale, bias)
            if self.depthwise:
                floats = self.integers * scale.float().unsqueeze(1)
                self.floats = self.blocked(floats).t().contiguous()  # [places, channels]
                self.layer.weights = self.floats.data_ptr()
        return self.layer


_packs: packs.Packs[Packed] = packs.Packs(Packed)


def packed(weight: Tensor, geometry: Geometry) -> Packed:
    """`weight` in the kernel's layout."""
    return _packs.of(weight, geometry)


def channels_last(x: Tensor) -> bool:
    """Are the channels the innermost dimension of x `[N, C, ...]` in memory? That of a batch where
    both orders are the same counts as the ordinary one, as torch has it.
    """
    if x.dim() == 3 or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=LAST[x.dim()])


LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def reads_last(x: Tensor) -> bool:
    """Can x be read with its channels as the innermost dimension? So can a transposed [N, L, C],
    whose order is no memory format of torch, so results don't have it.
    """
    turned = x.dim() == 3 and not x.is_contiguous()
    return channels_last(x) or (turned and x.transpose(1, 2).is_contiguous())


def step(kind: int, layer: Layer, shape: Sequence[int], out: Sequence[int]) -> Step:
    """A step of a program, but for where its tensors lie.

    Args:
        kind: one of those above.
        layer: must live as long as the step.
        shape: [samples, channels, *size] of the input.
        out: sizes of the output.

    Raises: MemoryError: for images that are too large.
    """
    size = list(shape[2:])
    pads = list(layer.before), list(layer.after)
    padded = map(sum, zip(_three(size, 1), *pads, strict=True))
    if shape[0] * (shape[1] + 4) * math.prod(padded) > _MOST_BYTES:
        raise MemoryError(f"no memory for {list(shape)} with padding {pads[0]}")
    made = Step(ctypes.addressof(layer), kind, shape[0], _three(size, 1), _three(out, 1), 1)
    made.other = made.gate = made.x_range = made.y_range = NOWHERE
    made.low, made.high = made.last_low, made.last_high = PLAIN[:2]
    return made


def convolve(x: Tensor, how: Convolution) -> Tensor:
    """The convolution of x, each sample of it in 8 bits.

    Args:
        x: float32 [N, channels, *size], not empty, one that `int8.takes` takes.
        how: its weight is no inference tensor.

    Returns: float32 [N, outputs, *out], in the memory format of x.

    Raises: OSError: there is no native code here (see `functions`). MemoryError: for images that
        are too large.
    """
    found = packed(how.weight, how.geometry)
    found.with_vectors(how.scale, how.bias)
    last = channels_last(x)
    x_last = last or (reads_last(x) and not found.depthwise)
    x = x if x_last else x.contiguous()
    key = x.shape, x_last, how.ending
    one = found.steps.get(key)
    if one is None:
        kind = DEPTHWISE if found.depthwise else CONVOLUTION
        out = found.geometry.sizes(x.shape[2:], found.kernel)
        one = step(kind, found.layer, x.shape, out)
        one.x, one.y, one.x_last, one.y_last = INPUT, OUTPUT, x_last, last
        one.end(how.ending)
        if len(found.steps) >= _MOST_SHAPES:
            found.steps.clear()
        found.steps[key] = one
    sizes = one.out[3 - len(found.kernel) :]
    format = LAST[x.dim()] if last else torch.contiguous_format
    shape = x.shape[0], found.layer.outputs, *sizes
    y = torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=format)
    threads = int8.threads(y.numel() * found.products)
    return _run(one, threads, x, y)


def average(x: Tensor) -> Tensor:
    """The mean of each channel of images: numbers of a line are added one after the other, then
    lines; the sum is multiplied by the rounded inverse of their count.

    Args:
        x: float32 [N, C, H, W], not empty, one that `int8.takes` takes.

    Returns: [N, C, 1, 1] in the memory format of x.

    Raises: as of `convolve`.
    """
    last = channels_last(x)
    format = torch.channels_last if last else torch.contiguous_format
    y = torch.empty(*x.shape[:2], 1, 1, dtype=torch.float32, memory_format=format)
    x = x if last else x.contiguous(memory_format=torch.channels_last)
    layer = STILL.layer((1, 1), x.shape[1], x.shape[1])
    one = step(MEAN, layer, x.shape, (1, 1))
    one.x, one.y, one.x_last, one.y_last = INPUT, OUTPUT, True, True
    return _run(one, 1, x, y)


def _run(one: Step, threads: int, x: Tensor, y: Tensor) -> Tensor:
    """A step alone, from x to y."""
    call = Turns(1, threads, 0, 0, x.data_ptr(), y.data_ptr(), None)
    if functions().run_program(ctypes.addressof(one), 1, ctypes.byref(call)):
        raise MemoryError(f"no memory for a step on {list(x.shape)}")
    return y
