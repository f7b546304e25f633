"""The dynamic int8 linear layer in one native call (int8.cpp).

What it computes, and what stock operations compute in its place, is said in
`quantize.nn.int8_kernels`; both give the same bits.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import weakref
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from quantize.native import packs
from quantize.native.int8_library import ACTIVATIONS, PANEL, Layer, functions, packed_rows
from quantize.native.outliers import Outliers, contradiction, state_of
from quantize.native.tails import TAILS

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as in int8.cpp
MOST_INPUTS = 1 << 16  # products of 255 and 127 fit 32 bits that often
_KIND, _THREADS = 40, 48  # where they stand in an argument, as in int8.cpp
_ONE = 1 << _THREADS  # thread
_PRODUCTS_A_THREAD = 1 << 19
_MOST_SHAPES = 512  # of inputs that are remembered for a weight

_PRODUCTS_OF_FEW_ROWS = 64  # in a cycle: they wait for the weights
_FEW_ROWS = 8
_NUMBERS = 3  # that are quantized or scaled in a cycle
_WORTH_A_THREAD = 1 << 14  # cycles; fewer are done before another thread wakes up

# ------------------------------------------------------------------------------------------------
# weights


class Shape(NamedTuple):
    """What a call with inputs of one shape and dtype needs.

    what: rows and kind, as int8.cpp takes them. result: like the output, without memory.
    """

    what: int
    threads: int
    result: Tensor


class Packed(packs.Copy):
    """A weight in the kernel's layout, and what it was last called with.

    Attributes: packed, sums: as in int8.cpp. bound: with scale, bias and outliers. shapes: of the
        inputs that `again` may compute with them. usual: about how many rows these had, as bits,
        and their dtypes.
    """

    def __init__(self, weight: Tensor, how: None, owner: weakref.ref[Tensor]) -> None:
        super().__init__(weight, how, owner)
        self.outputs, self.inputs = weight.shape
        self.packed, self.sums = packed_rows(weight)
        self.bound: Bound | None = None
        self.shapes: dict[tuple[torch.Size, torch.dtype], Shape] = {}
        self.usual: set[tuple[int, torch.dtype]] = set()

    def note(self, x: Tensor) -> Shape:
        """Let `again` compute inputs of this shape, and others of about as many rows."""
        if len(self.shapes) >= _MOST_SHAPES:
            self.shapes.clear()
        found = self.shapes[x.shape, x.dtype] = self.shape(x)
        self.usual.add((self._bits(x), x.dtype))
        return found

    def like(self, x: Tensor) -> Shape | None:
        """The shape of x, if `again` may compute it since it computed about as many rows."""
        fits = x.shape[-1:] == (self.inputs,) and (self._bits(x), x.dtype) in self.usual
        return self.note(x) if fits else None

    def _bits(self, x: Tensor) -> int:
        return (x.numel() // self.inputs).bit_length()

    def shape(self, x: Tensor) -> Shape:
        """What a call with x `[..., inputs]` needs."""
        rows = x.numel() // self.inputs
        result = torch.empty((), dtype=x.dtype, device="cpu")  # one number, read in all places
        result = result.expand(*x.shape[:-1], self.outputs)
        if not torch.empty_like(result).is_contiguous():
            result = result.contiguous()
        return Shape(rows + (KINDS[x.dtype] << _KIND), self._threads(rows), result)

    def _threads(self, rows: int) -> int:
        """How many threads so many rows are worth; 1 at least."""
        return max(1, int(self.cycles(rows) / _WORTH_A_THREAD))

    def cycles(self, rows: int) -> float:
        """About how many a core needs for so many rows."""
        few = _PRODUCTS_OF_FEW_ROWS if rows < _FEW_ROWS else math.inf
        rate = min(functions().products, few)
        products = rows * self.outputs * self.inputs / rate
        return products + rows * (self.outputs + self.inputs) / _NUMBERS


class Bound:
    """A packed weight with all else of a layer, as the struct that the kernel takes.

    Attributes: scale, bias: the tensors, and where their numbers lay. outliers: as they were given,
        with what tells whether they changed. activation: its name, or None. compute: int8.cpp's
        `linear`. address: of the struct, its first argument. held: what else must live as long as
        this. The packed weight holds this, not the other way round.

    Raises: ValueError: outliers that don't fit the weight.
    """

    def __init__(
        self,
        found: Packed,
        scale: Tensor,
        bias: Tensor | None,
        outliers: Outliers | None = None,
        activation: str | None = None,
    ) -> None:
        self.scale, self.scale_pointer = scale, scale.data_ptr()
        self.bias, self.bias_pointer = bias, None if bias is None else bias.data_ptr()
        self.compute = functions().linear
        self.layer = Layer(found.inputs, found.outputs)
        self.layer.packed, self.layer.sums = found.packed.data_ptr(), found.sums.data_ptr()
        self.layer.scale, self.layer.bias = self.scale_pointer, self.bias_pointer
        self.layer.activation = ACTIVATIONS[activation]
        if activation in TAILS:
            self.layer.tails = TAILS[activation].data_ptr()
        self.activation = activation
        self.held: tuple[Tensor, ...] = ()
        self.outliers, self.state = outliers, state_of(outliers)
        if outliers is not None:
            self._set_outliers(outliers)
        self.address = ctypes.addressof(self.layer)

    def _set_outliers(self, outliers: Outliers) -> None:
        """Write the channels into the struct, as copies that the kernel can read."""
        inputs, outputs = self.layer.inputs, self.layer.outputs
        problem = contradiction(outliers, inputs, outputs)
        if problem is not None:
            raise ValueError(problem)
        factor = outliers.factor.float().contiguous()
        channels = outliers.channels.contiguous().clone()
        width = -(-outputs // PANEL) * PANEL
        kept = torch.zeros(len(channels), width, dtype=torch.float32, device="cpu")
        kept[:, :outputs] = outliers.kept
        self.layer.factor, self.layer.outliers = factor.data_ptr(), len(channels)
        self.layer.channels, self.layer.kept = channels.data_ptr(), kept.data_ptr()
        self.held += factor, channels, kept

    def has(self, outliers: Outliers | None) -> bool:
        """Was it made of these outliers, as they are now?"""
        if outliers is None or self.outliers is None:
            return outliers is self.outliers
        same = all(a is b for a, b in zip(outliers, self.outliers, strict=True))
        return same and self.state == state_of(outliers)


_packs: packs.Packs[Packed] = packs.Packs(Packed)
KNOWN = _packs.known


def packed(weight: Tensor) -> Packed:
    """`weight`, int8 [outputs, inputs], in the kernel's layout."""
    return _packs.of(weight)


# ------------------------------------------------------------------------------------------------
# calls


@functools.cache
def _plain_keys() -> frozenset[int]:
    """Dispatch keys of tensors whose numbers lie in memory where `data_ptr` says."""
    with torch.inference_mode():
        inference = torch.empty(0, device="cpu")
    with torch.inference_mode(False):
        normal = torch.empty(0, device="cpu")
    return frozenset(torch._C._dispatch_keys(t).raw_repr() for t in (normal, inference))


def takes(x: Tensor) -> bool:
    """May the kernel read x? Not where a mode watches operations or a transform of functions wraps
    results, nor for tensors that are no plain ones on the CPU, or may carry derivatives forward.
    """
    return (
        torch._C._dispatch_keys(x).raw_repr() in _plain_keys()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    outliers: Outliers | None = None,
    activation: str | None = None,
) -> Tensor:
    """y = x W^T * scale + bias, with each row of x in 8 bits, or an activation of it.

    Args:
        x: [..., inputs], float32, float16 or bfloat16, one that `takes` takes.
        weight: int8 [outputs, inputs], no inference tensor; inputs up to MOST_INPUTS, none empty.
        scale: [outputs] of any float dtype.
        bias: [outputs] of any float dtype, or None.
        outliers: channels of x that count in float.
        activation: of the result, one of int8_library.ACTIVATIONS.

    Returns: [..., outputs], in x's dtype.

    Raises: OSError: there is no native code here (see `functions`). ValueError: a scale, bias or
        outliers of another size.
    """
    found = packed(weight)
    for vector in (scale,) if bias is None else (scale, bias):
        if vector.shape != (found.outputs,):
            raise ValueError(f"scale and bias must be [{found.outputs}], got {list(vector.shape)}")
    scale = scale.float().contiguous()
    bias = None if bias is None else bias.float().contiguous()
    x = x.contiguous()
    return _call(Bound(found, scale, bias, outliers, activation), x, found.shape(x))


def _call(bound: Bound, x: Tensor, shape: Shape) -> Tensor:
    y = torch.empty_like(shape.result)
    if bound.compute(bound.address, what(shape, shape.threads), x.data_ptr(), y.data_ptr()):
        raise no_memory(x)
    return y


def what(shape: Shape, most: int) -> int:
    """The kernel's second argument, with so many threads at most. OpenMP's threads don't follow a
    process that forks.
    """
    threads = 1 if _forked else min(torch.get_num_threads(), most)
    return shape.what + (threads << _THREADS)


def no_memory(x: Tensor) -> MemoryError:
    """The rows of x as bytes need some."""
    return MemoryError(f"no memory for the rows of {list(x.shape)} as bytes")


def again(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    outliers: Outliers | None = None,
    activation: str | None = None,
) -> Tensor | None:
    """`linear` for tensors that `prefer` has seen, and inputs of a shape that it has, with few
    checks: None for whatever needs more of them. Narrow layers take as long as their checks, so
    they stand here in a row, without calls.
    """
    found = KNOWN.get(id(weight))
    if found is None:
        return None
    bound = found.bound
    if (
        bound is None
        or found.owner() is not weight
        or found.version != weight._version
        or found.pointer != weight.data_ptr()
        or bound.scale is not scale
        or bound.bias is not bias
        or bound.scale_pointer != scale.data_ptr()
        or (bias is not None and bound.bias_pointer != bias.data_ptr())
        or bound.activation != activation
        or not (outliers is bound.outliers or bound.has(outliers))
        or not x.is_contiguous()
        or torch._C._dispatch_keys(x).raw_repr() not in _plain_keys()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
    ):
        return None
    shape = found.shapes.get((x.shape, x.dtype)) or found.like(x)
    if shape is None:
        return None
    y = torch.empty_like(shape.result)
    threads = shape.threads
    first = shape.what + _ONE if threads == 1 else what(shape, threads)
    if bound.compute(bound.address, first, x.data_ptr(), y.data_ptr()):
        raise no_memory(x)
    return y


def prefer(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    outliers: Outliers | None = None,
    activation: str | None = None,
) -> None:
    """Let `again` compute inputs of this shape with these tensors."""
    found = KNOWN.get(id(weight))
    if found is None or x.dtype not in KINDS or not takes(x) or not found.is_of(weight):
        return
    if not all(_is_plain(v) for v in (scale, bias) if v is not None):
        return
    if outliers is not None and not state_of(outliers):
        return  # its changes can't be seen
    found.bound = Bound(found, scale, bias, outliers, activation)
    found.note(x)


def _is_plain(vector: Tensor) -> bool:
    return vector.dtype is torch.float32 and vector.is_contiguous()


_forked = False


def threads(products: int) -> int:
    """For that many products. OpenMP's threads don't follow a process that forks."""
    return 1 if _forked else max(1, min(torch.get_num_threads(), products // _PRODUCTS_A_THREAD))


def forked() -> bool:
    """Is this process the child of one that may have started OpenMP's threads?"""
    return _forked


def allow_threads() -> None:
    """In a child process: the thread that forked it had never computed, so OpenMP's threads can
    start here.
    """
    global _forked
    _forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)
