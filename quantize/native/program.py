"""Norms, attention, sums and int8 linear layers as steps of one native call (int8.cpp).

A `Work` says what one step reads and computes. It is made for tensors of some shapes and strides;
what it is run on may be others of the same. Where steps have rows or batches apart, a program may
run for one slice of them after the other, whose numbers stay in the cache.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantize.native import int8
from quantize.native.int8_library import (
    ACTIVATIONS,
    Attention,
    Each,
    Layer,
    Linears,
    Norm,
    Step,
    functions,
)
from quantize.native.tails import TAILS

LINEARS, NORM, ATTENTION, EACH = range(4)  # as in int8.cpp
ALONE, SUM, PRODUCT, DIFFERENCE = range(4)  # as in floats.h
_UNMASKED, _ADDED, _SEEN = range(3)  # as in attend.h
_NOWHERE, _BLOCK = -1, 40  # as in int8.cpp
NUMBER = 4  # bytes
MOST_LAYERS = 8  # of a step, as in int8.cpp
_FEWEST_QUERIES = 4  # fewer aren't worth the copy of keys and values that a step makes
_WORTH_ALL_THREADS = 1 << 12  # cycles
_PRODUCTS = 16  # of floats in a cycle


@dataclass
class Work:
    """One step.

    Args:
        kind: LINEARS, NORM, ATTENTION or EACH.
        what: the struct of that kind.
        reads: tensors, in the order of the step's places; None for one that there isn't.
        owned: tensors that `what` points to.
        units: rows, batches or lines that are computed apart from each other.
        strides: bytes from one unit to the next in what it reads and in each result; 0 for what all
            of them read.
        cycles: about how many a core needs.
        held: what else must live as long as this.
        at: of the result, where the first number is written.
    """

    kind: int
    what: ctypes.Structure
    reads: Sequence[Tensor | None]
    owned: Sequence[Tensor]
    units: int
    strides: Sequence[int]
    cycles: float
    held: Any = None
    at: int = 0

    def slice_of(self, slices: int) -> Work:
        """The first of so many slices, without what it reads."""
        what = type(self.what).from_buffer_copy(self.what)
        if isinstance(what, Each):
            what.size[_first(what.size)] //= slices
        else:
            name = "batches" if isinstance(what, Attention) else "rows"
            setattr(what, name, getattr(what, name) // slices)
        units, cycles = self.units // slices, self.cycles / slices
        return dataclasses.replace(self, what=what, units=units, cycles=cycles, reads=())


def _is_plain(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype is torch.float32 and x.numel() > 0


# ------------------------------------------------------------------------------------------------
# what steps compute


def norm(
    x: Tensor, width: int, weight: Tensor | None, bias: Tensor | None, eps: float, centered: bool
) -> Work | None:
    """Each row of `width` numbers less its mean (where `centered`), over its root mean square,
    times a weight, plus a bias; None for tensors that can't be read.
    """
    vectors = [one for one in (weight, bias) if one is not None]
    if not all(_is_plain(one) and one.is_contiguous() for one in (x, *vectors)):
        return None
    if any(one.numel() != width for one in vectors):
        return None
    rows, stride = x.numel() // width, width * NUMBER
    what = Norm(rows, width, centered, eps)
    return Work(NORM, what, [x, weight, bias], [], rows, [stride, 0, 0, stride], x.numel())


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Work | None:
    """softmax(scale q k^T + mask) v for q [B, H, T, D], k [B, K, S, D], v [B, K, S, E], H a
    multiple of K; the result lies as [B, T, H, E]. None for tensors that can't be read.
    """
    if not all(_is_plain(one) and one.dim() == 4 and one.stride(-1) == 1 for one in (q, k, v)):
        return None
    (batches, heads, queries, width), (_, groups, keys, _) = q.shape, k.shape
    fitting = k.shape[0] == v.shape[0] == batches and k.shape[3] == width
    fitting = fitting and v.shape[1:3] == (groups, keys) and heads % groups == 0
    if not fitting or queries < _FEWEST_QUERIES:
        return None
    shape = batches, heads, queries, keys
    what = Attention(batches, heads, heads // groups, queries, keys, width, v.shape[3])
    what.q[:], what.k[:], what.v[:] = (one.stride()[:3] for one in (q, k, v))
    what.scale, what.causal = scale, causal
    result = heads * queries * v.shape[3]
    strides = [*(NUMBER * one.stride(0) for one in (q, k, v)), 0, NUMBER * result]
    if mask is not None:
        kinds = {torch.float32: _ADDED, torch.bool: _SEEN}
        if mask.dtype not in kinds or mask.shape[-1] != keys or mask.stride(-1) != 1:
            return None
        what.mask[:], what.masked = mask.expand(shape).stride()[:3], kinds[mask.dtype]
        strides[3] = what.mask[0] * mask.itemsize
    cycles = math.prod(shape) * (1 + (width + v.shape[3]) / _PRODUCTS)
    return Work(ATTENTION, what, [q, k, v, mask], [], batches, strides, cycles)


def each(
    x: Tensor,
    other: Tensor | None = None,
    how: int = ALONE,
    activation: str | None = None,
    y: Sequence[int] | None = None,
    at: int = 0,
) -> Work | None:
    """An activation of each number of x, then its sum with a number of `other` (or as `how` says).
    None for tensors that can't be read.

    y: numbers from one place of a dimension of the result to the next, which lies as a contiguous
    tensor if they aren't given. at: of the first one.
    """
    if not _is_plain(x) or not 0 < x.dim() <= 4 or not (other is None or _is_plain(other)):
        return None
    shape = x.shape if other is None else torch.broadcast_tensors(x, other)[0].shape
    if len(shape) > 4:
        return None
    missing = 4 - len(shape)
    what = Each(how=how, activation=ACTIVATIONS[activation])
    what.size[:] = (1,) * missing + tuple(shape)
    what.x[missing:] = x.expand(shape).stride()
    if other is not None:
        what.other[missing:] = other.expand(shape).stride()
    if y is None:
        y = [math.prod(shape[dimension + 1 :]) for dimension in range(len(shape))]
    what.y[missing:] = y
    if activation in TAILS:
        what.tails = TAILS[activation].data_ptr()
    first = _first(what.size)
    strides = [NUMBER * one[first] for one in (what.x, what.other, what.y)]
    cycles = math.prod(shape) * (1 if activation is None else 3)
    return Work(EACH, what, [x, other], [], what.size[first], strides, cycles, at=at)


def _first(size: Sequence[int]) -> int:
    """The first dimension that has more than one place."""
    return next((dimension for dimension, count in enumerate(size) if count > 1), 0)


Operands = tuple[Tensor, Tensor, Tensor | None, str | None]  # weight, scale, bias, activation


def linears(
    x: Tensor, layers: Sequence[Operands], how: int = ALONE, other: Tensor | None = None
) -> Work | None:
    """Int8 linear layers without outliers that read the same x, rows of one distance; what becomes
    of the result of a single one and `other`, of its shape. None where `int8.again` computes none.
    """
    bounds, owned, cycles = list[int8.Bound](), list[Tensor](), 0.0
    inputs = x.shape[-1]
    if not _is_plain(x) or not (x.is_contiguous() or (x.dim() == 2 and x.stride(1) == 1)):
        return None
    apart = inputs if x.is_contiguous() else x.stride(0)
    for weight, scale, bias, activation in layers:
        found = int8.KNOWN.get(id(weight))
        vectors = [scale] if bias is None else [scale, bias]
        if found is None or not found.is_of(weight) or (x.shape, x.dtype) not in found.shapes:
            return None
        if not all(_is_plain(one) and one.is_contiguous() for one in vectors):
            return None
        bounds.append(int8.Bound(found, scale, bias, None, activation))
        owned += weight, *vectors
        cycles += found.cycles(x.numel() // inputs)
    if other is not None and not (_is_plain(other) and other.is_contiguous()):
        return None
    addresses = (ctypes.POINTER(Layer) * len(bounds))(*(ctypes.pointer(b.layer) for b in bounds))
    rows = x.numel() // inputs
    what = Linears(ctypes.addressof(addresses), len(bounds), rows, apart, how)
    packs = [int8.packed(weight) for weight, *_ in layers]
    results = [NUMBER * weight.shape[0] for weight, *_ in layers]
    strides = [NUMBER * apart, results[0], *results]
    held = addresses, bounds, packs
    return Work(LINEARS, what, [x, other], owned, rows, strides, cycles, held)


# ------------------------------------------------------------------------------------------------
# runs


def place(block: int, at: int = 0) -> int:
    """Of what lies in a block of memory, so many bytes from its start."""
    return (block << _BLOCK) + at


def _numbers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


class Program:
    """Steps that run one after the other.

    Args:
        works: what they do.
        places: for each, of what it reads, None for nothing, and of its results.
        size: bytes of a last block, for what lies between the steps of a slice; whole times 64.
        slices: of all works, one after the other.
    """

    def __init__(
        self,
        works: Sequence[Work],
        places: Sequence[Sequence[int | None]],
        size: int = 0,
        slices: int = 1,
    ) -> None:
        self.size, self.slices = size, slices
        self.works = [work.slice_of(slices) for work in works]
        self.arrays, steps = list[Any](), list[Step]()
        for work, own in zip(self.works, places, strict=True):
            where = _numbers([_NOWHERE if p is None else p for p in own])
            apart = _numbers([work.units * stride for stride in work.strides])
            self.arrays += where, apart
            shared = work.cycles > _WORTH_ALL_THREADS
            addresses = map(ctypes.addressof, (work.what, where, apart))
            steps.append(Step(work.kind, shared, *addresses))
        self.count = len(steps)
        self.steps = (Step * self.count)(*steps)
        self.address = ctypes.addressof(self.steps)
        self.is_shared = slices > 1 or any(step.shared for step in steps)
        self.compute = functions().run_program

    def run(self, blocks: Sequence[int]) -> None:
        """On blocks of memory at these addresses, and the last one. Raises MemoryError."""
        threads = torch.get_num_threads() if self.is_shared and not int8.forked() else 1
        last = len(blocks)
        addresses = (ctypes.c_void_p * last)(*blocks)
        rest = self.slices, addresses, last, self.size, threads
        if self.compute(self.address, self.count, *rest):
            raise MemoryError("no memory for what lies between the steps of a program")
