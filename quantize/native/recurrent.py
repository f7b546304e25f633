"""All steps of one direction of an int8 LSTM or GRU layer in one native call (recurrent.cpp).

What it computes, and what stock operations compute in its place, is said in
`quantize.nn.int8_steps`; both give the same bits.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from quantize.native import int8, packs
from quantize.native.build import Kernels
from quantize.native.int8_library import packed_rows
from quantize.native.packs import NUMBER, POINTER, fields

_LANES = 16


class Product(ctypes.Structure):
    """As in recurrent.cpp."""

    _fields_ = fields(
        (NUMBER, "inputs"),
        (POINTER, "packed sums scale bias"),
    )


class Layer(ctypes.Structure):
    """As in recurrent.cpp."""

    _fields_ = fields(
        (NUMBER, "gates units width"),
        (Product, "recurrent projection"),
    )


class Call(ctypes.Structure):
    """As in recurrent.cpp."""

    _fields_ = fields(
        (NUMBER, "steps rows reverse threads"),
        (POINTER, "batches x y h c full"),
    )


@dataclass(frozen=True)
class Functions:
    """What recurrent.cpp exports."""

    open_library: Callable[[], int]
    steps: Callable[..., int]


def read(library: ctypes.CDLL) -> Functions:
    """The functions of a compiled recurrent.cpp. Raises OSError for a library that isn't one of
    this version.
    """
    sizes = packs.sizes(Layer, Call)
    open_library, steps = packs.symbols(library, ("open_library", "steps"), sizes)
    steps.argtypes = [POINTER, POINTER]
    return Functions(open_library, steps)


KERNELS = Kernels(Path(__file__).with_name("recurrent.cpp"), read)


@functools.cache
def functions() -> Functions:
    """The kernels for the best instruction set; errors as of `Kernels.best`."""
    return KERNELS.best().functions


# ------------------------------------------------------------------------------------------------
# weights


class Packed(packs.Pack):
    """A weight int8 [parts * units, inputs] in the kernel's layout: blocks of 16 units, in each the
    rows of all parts (the gates) side by side.
    """

    def __init__(self, weight: Tensor, how: int, owner: weakref.ref[Tensor]) -> None:
        super().__init__(weight, how, owner)
        self.parts, self.inputs = how, weight.shape[1]
        self.packed, self.sums = packed_rows(self.blocked(weight))

    def blocked(self, tensor: Tensor) -> Tensor:
        """[parts * units, ...] as [blocks * parts * 16, ...], missing units as zeros."""
        units = tensor.shape[0] // self.parts
        blocks = -(-units // _LANES)
        trailing = tensor.shape[1:]
        pads = [0, 0] * len(trailing) + [0, blocks * _LANES - units]
        padded = F.pad(tensor.reshape(self.parts, units, *trailing), pads)
        split = padded.reshape(self.parts, blocks, _LANES, *trailing)
        return split.transpose(0, 1).reshape(-1, *trailing).contiguous()

    def product(self, scale: Tensor, bias: Tensor | None) -> Product:
        """What the kernel reads. It points into tensors that this object holds until the next
        call.
        """
        own = self.packed.data_ptr(), self.sums.data_ptr()
        return Product(self.inputs, *own, *self.pointers(scale, bias))


_packs: packs.Packs[Packed] = packs.Packs(Packed)


def packed(weight: Tensor, parts: int) -> Packed:
    """`weight`, int8 [parts * units, inputs], in the kernel's layout."""
    return _packs.of(weight, parts)


# ------------------------------------------------------------------------------------------------
# calls


@dataclass(frozen=True)
class Weights:
    """What one direction of a layer multiplies its state by.

    Args:
        gates: 4 for an LSTM, 3 for a GRU.
        weight: int8 [gates * units, width]. scale: [gates * units]. bias: the same, or None.
        projection: int8 [width, units] of an LSTM that projects its outputs, or None.
            projection_scale: [width].
    """

    gates: int
    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    projection: Tensor | None = None
    projection_scale: Tensor | None = None

    @property
    def units(self) -> int:
        """Units of a layer: the width of its cells."""
        return self.weight.shape[0] // self.gates

    @property
    def width(self) -> int:
        """The width of the state that recurs, and of an output."""
        return self.weight.shape[1]


def steps(
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: Weights,
    batches: Tensor | None = None,
    *,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """All steps of one direction.

    Args:
        x: float32 [rows of all steps, gates * units], step after step: what the inputs add to the
            gates.
        h: float32 [rows, width]: the state before.
        c: float32 [rows, units]: the cells before; None for a GRU.
        weights: no inference tensors.
        batches: int64 [steps], never growing: the rows of each step; None: all have as many as h.
        reverse: begin with the last step.

    Returns:
        The outputs [rows of all steps, width], and state and cells after.

    Raises: OSError: there is no native code here (see `functions`).
    """
    _check(x, h, c, weights, batches)
    x, h = x.contiguous(), h.clone(memory_format=torch.contiguous_format)
    c = None if c is None else c.clone(memory_format=torch.contiguous_format)
    y = x.new_empty(x.shape[0], weights.width)
    projects = weights.projection is not None
    full = x.new_empty(h.shape[0], weights.units) if projects else None
    held = [packed(weights.weight, weights.gates)]
    products = [held[0].product(weights.scale, weights.bias), Product()]
    if weights.projection is not None and weights.projection_scale is not None:
        held.append(packed(weights.projection, 1))
        products[1] = held[1].product(weights.projection_scale, None)
    layer = Layer(weights.gates, weights.units, weights.width, *products)
    counts = None if batches is None else batches.contiguous()
    rows = h.shape[0]
    count = x.shape[0] // max(rows, 1) if counts is None else len(counts)
    pointers = [None if t is None else t.data_ptr() for t in (counts, x, y, h, c, full)]
    call = Call(count, rows, reverse, _threads(rows, weights), *pointers)
    if functions().steps(ctypes.byref(layer), ctypes.byref(call)):
        raise MemoryError(f"no memory for the states of {rows} rows of {weights.width} numbers")
    return y, h, c


def _check(
    x: Tensor, h: Tensor, c: Tensor | None, weights: Weights, batches: Tensor | None
) -> None:
    """The kernel reads memory as these sizes say."""
    rows = h.shape[0]
    sizes = {"x": (x, weights.gates * weights.units), "h": (h, weights.width)}
    if c is not None:
        sizes["c"] = (c, weights.units)
    for name, (tensor, width) in sizes.items():
        if tensor.shape[1:] != (width,) or tensor.dtype != torch.float32:
            raise ValueError(f"{name} must be float32 [rows, {width}], got {list(tensor.shape)}")
    if (c is None) != (weights.gates == 3) or (c is not None and c.shape[0] != rows):
        raise ValueError(f"an LSTM has cells of {rows} rows, a GRU has none")
    if weights.projection is not None and weights.projection.shape != (
        weights.width,
        weights.units,
    ):
        raise ValueError(f"the projection must be {[weights.width, weights.units]}")
    if batches is None:
        fits = rows > 0 and x.shape[0] % rows == 0
    else:
        fits = bool((batches.diff() <= 0).all()) and 0 <= int(batches[-1]) <= int(batches[0])
        fits = fits and int(batches[0]) == rows and int(batches.sum()) == x.shape[0]
    if not fits:
        raise ValueError(f"{x.shape[0]} rows are no steps of {rows}")


# Work of a step, in products; less is done before another thread wakes up. Gates of a unit cost as
# much as _CELL products.
_WORTH_THREADS, _CELL = 1 << 18, 256


def _threads(rows: int, weights: Weights) -> int:
    """Threads for a step of so many rows. OpenMP's threads don't follow a process that forks."""
    products = weights.weight.numel() + _CELL * weights.units
    if weights.projection is not None:
        products += weights.projection.numel()
    if int8.forked() or rows * products < _WORTH_THREADS:
        return 1
    return torch.get_num_threads()
