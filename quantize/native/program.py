"""Norms, attention, sums and int8 linear layers as steps of one native call (int8.cpp).

A `Work` says what one step reads and computes. It is made for tensors of some shapes and strides;
what it is run on may be others of the same.
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
        cycles: about how many a core needs.
        held: what else must live as long as this.
        at: of the result, where the first number is written.
    """

    kind: int
    what: ctypes.Structure
    reads: Sequence[Tensor | None]
    owned: Sequence[Tensor]
    cycles: float
    held: Any = None
    at: int = 0


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
    what = Norm(x.numel() // width, width, centered, eps)
    return Work(NORM, what, [x, weight, bias], [], x.numel())


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
    if mask is not None:
        kinds = {torch.float32: _ADDED, torch.bool: _SEEN}
        if mask.dtype not in kinds or mask.shape[-1] != keys or mask.stride(-1) != 1:
            return None
        what.mask[:], what.masked = mask.expand(shape).stride()[:3], kinds[mask.dtype]
    cycles = math.prod(shape) * (1 + (width + v.shape[3]) / _PRODUCTS)
    return Work(ATTENTION, what, [q, k, v, mask], [], cycles)


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
    shape = x.shape if other is None else torch.broadcast_shapes(x.shape, other.shape)
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
    reads = [x, other]
    return Work(EACH, what, reads, [], math.prod(shape) * (1 if activation is None else 3), at=at)


Operands = tuple[Tensor, Tensor, Tensor | None, str | None]  # weight, scale, bias, activation


def linears(
    x: Tensor, layers: Sequence[Operands], how: int = ALONE, other: Tensor | None = None
) -> Work | None:
    """Int8 linear layers without outliers that read the same x; what becomes of the result of a
    single one and `other`, of its shape. None where `int8.again` wouldn't compute them.
    """
    bounds, owned, cycles = list[int8.Bound](), list[Tensor](), 0.0
    for weight, scale, bias, activation in layers:
        found = int8.KNOWN.get(id(weight))
        vectors = [scale] if bias is None else [scale, bias]
        if found is None or not found.is_of(weight) or (x.shape, x.dtype) not in found.shapes:
            return None
        if not all(_is_plain(one) and one.is_contiguous() for one in (x, *vectors)):
            return None
        bounds.append(int8.Bound(found, scale, bias, None, activation))
        owned += weight, *vectors
        cycles += found.cycles(x.numel() // found.inputs)
    if other is not None and not (_is_plain(other) and other.is_contiguous()):
        return None
    addresses = (ctypes.POINTER(Layer) * len(bounds))(*(ctypes.pointer(b.layer) for b in bounds))
    rows = x.numel() // x.shape[-1]
    what = Linears(ctypes.addressof(addresses), len(bounds), rows, how)
    packs = [int8.packed(weight) for weight, *_ in layers]
    return Work(LINEARS, what, [x, other], owned, cycles, (addresses, bounds, packs))


# ------------------------------------------------------------------------------------------------
# runs


def place(block: int, at: int = 0) -> int:
    """Of what lies in a block of memory, so many bytes from its start."""
    return (block << _BLOCK) + at


class Program:
    """Steps that run one after the other.

    Args:
        works: what they do.
        places: for each, of what it reads, None for nothing, and of its results.
        size: bytes of a last block, for what lies between the steps; whole times 64.
    """

    def __init__(
        self, works: Sequence[Work], places: Sequence[Sequence[int | None]], size: int = 0
    ) -> None:
        self.size = size
        self.works = [dataclasses.replace(work, reads=()) for work in works]
        self.arrays, steps = list[Any](), list[Step]()
        for work, own in zip(works, places, strict=True):
            array = (ctypes.c_int64 * len(own))(*(_NOWHERE if p is None else p for p in own))
            self.arrays.append(array)
            shared = work.cycles > _WORTH_ALL_THREADS
            what = ctypes.addressof(work.what)
            steps.append(Step(work.kind, shared, what, ctypes.addressof(array)))
        self.count = len(steps)
        self.steps = (Step * self.count)(*steps)
        self.address = ctypes.addressof(self.steps)
        self.is_shared = any(step.shared for step in steps)
        self.compute = functions().run_program

    def run(self, blocks: Sequence[int]) -> None:
        """On blocks of memory at these addresses, and the last one. Raises MemoryError."""
        threads = torch.get_num_threads() if self.is_shared and not int8.forked() else 1
        last = len(blocks)
        addresses = (ctypes.c_void_p * (last + 1))(*blocks)
        if self.compute(self.address, self.count, addresses, last, self.size, threads):
            raise MemoryError("no memory for what lies between the steps of a program")
