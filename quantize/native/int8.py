"""The dynamic int8 linear layer in one native call (int8.cpp).

What it computes, and what stock operations compute in its place, is said in
`quantize.nn.int8_kernels`; both give the same bits. The packed copy of a weight lies outside of the
modules, so that no copy, move or file carries a stale one along.
"""

from __future__ import annotations

import ctypes
import functools
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantize.native import build, isa

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as in int8.cpp
MOST_INPUTS = 1 << 16  # products of 255 and 127 fit 32 bits that often
_PANEL, _STEP = 16, 64
_WORTH_A_THREAD = 1 << 19  # products; fewer are done before another thread wakes up

_SOURCE = Path(__file__).with_name("int8.cpp")
HEADERS = (
    *(_SOURCE.with_name(name) for name in ("gemm.h", "integers.h", "rows.h")),
    build.NUMBERS,
)


class Layer(ctypes.Structure):
    """As in int8.cpp."""

    _fields_ = [
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("packed", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class Functions:
    """What int8.cpp exports."""

    open_library: Callable[[], int]
    pack: Callable[..., None]
    linear: Callable[..., int]


def read(library: ctypes.CDLL) -> Functions:
    """The functions of a compiled int8.cpp. Raises OSError for a library that isn't one of this
    version.
    """
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    try:
        size = ctypes.c_int64.in_dll(library, "layer_bytes").value
        functions = Functions(library.open_library, library.pack, library.linear)
    except (AttributeError, ValueError) as error:
        raise OSError(f"the compiled library lacks a symbol: {error}") from None
    if size != ctypes.sizeof(Layer):
        raise OSError(
            f"the compiled library has a struct of {size} bytes, this version of "
            f"{ctypes.sizeof(Layer)}"
        )
    functions.pack.argtypes = [pointer, number, number, pointer, pointer]
    functions.pack.restype = None
    functions.linear.argtypes = [pointer, number, number, number, *[pointer] * 4]
    return functions


def code(level: str) -> build.Code:
    """int8.cpp for a level of `isa`. Contraction is off: it would round differently where the CPU
    multiplies and adds in one step.
    """
    flags = (*isa.FLAGS[level], "-ffp-contract=off", "-Wno-psabi")
    return build.Code(f"int8-{level}", _SOURCE, HEADERS, flags, read)


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


# ------------------------------------------------------------------------------------------------
# weights


class Packed:
    """A weight in the kernel's layout.

    Attributes: layer: the struct. address: of it. sums: int32, of each output's weights.
    """

    def __init__(self, weight: Tensor, owner: weakref.ref[Tensor]) -> None:
        self.owner, self.version, self.pointer = owner, weight._version, weight.data_ptr()
        self.outputs, self.inputs = weight.shape
        self.products = self.outputs * self.inputs
        self.preferred = 0  # bit i: this kernel is the fastest for 2^(i - 1) rows and more
        self.held: tuple[Tensor | None, ...] = ()  # scale and bias that were checked,
        self.vectors: tuple[int, ...] = ()  # and their identities
        panels = -(-self.outputs // _PANEL)
        padded = -(-self.inputs // _STEP) * _STEP
        self.packed = torch.empty(panels * _PANEL * padded, dtype=torch.int8, device="cpu")
        self.sums = torch.empty(panels * _PANEL, dtype=torch.int32, device="cpu")
        pointers = self.packed.data_ptr(), self.sums.data_ptr()
        plain = weight.contiguous()
        functions().pack(plain.data_ptr(), self.outputs, self.inputs, *pointers)
        self.layer = Layer(self.inputs, self.outputs, *pointers)
        self.address = ctypes.addressof(self.layer)

    def is_of(self, weight: Tensor) -> bool:
        """Was it made of this weight, as it is now?"""
        return (
            self.owner() is weight
            and self.version == weight._version
            and self.pointer == weight.data_ptr()
        )


_packs: dict[int, Packed] = {}  # by the identity of a weight, until it dies or changes


def packed(weight: Tensor) -> Packed:
    """`weight`, int8 [outputs, inputs], in the kernel's layout."""
    key = id(weight)
    found = _packs.get(key)
    if found is None or not found.is_of(weight):
        found = Packed(weight, weakref.ref(weight, functools.partial(_forget, key)))
        _packs[key] = found
    return found


def _forget(key: int, owner: weakref.ref[Tensor]) -> None:
    found = _packs.get(key)
    if found is not None and found.owner is owner:
        del _packs[key]


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
    """May the kernel read x? Not where a mode watches operations, nor for tensors that are no plain
    ones on the CPU.
    """
    return (
        torch._C._dispatch_keys(x).raw_repr() in _plain_keys()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
    )


def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """y = x W^T * scale + bias, with each row of x in 8 bits.

    Args:
        x: [..., inputs], float32, float16 or bfloat16, one that `takes` takes.
        weight: int8 [outputs, inputs], no inference tensor; inputs up to MOST_INPUTS, none empty.
        scale: [outputs] of any float dtype.
        bias: [outputs] of any float dtype, or None.

    Returns: [..., outputs], in x's dtype.

    Raises: OSError: there is no native code here (see `functions`). ValueError: a scale or bias of
        another size.
    """
    found = packed(weight)
    for vector in (scale,) if bias is None else (scale, bias):
        if vector.shape != (found.outputs,):
            raise ValueError(f"scale and bias must be [{found.outputs}], got {list(vector.shape)}")
    scale = scale.float().contiguous()
    bias = None if bias is None else bias.float().contiguous()
    return _call(found, x.contiguous(), scale, bias)


def _call(found: Packed, x: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    y = x.new_empty((*x.shape[:-1], found.outputs))
    rows = y.numel() // found.outputs
    products = rows * found.products
    failed = functions().linear(
        found.address,
        rows,
        KINDS[x.dtype],
        1 if products < 2 * _WORTH_A_THREAD else threads(products),
        scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
    )
    if failed:
        raise MemoryError(f"no memory for {rows} rows of {found.inputs} bytes")
    return y


def again(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor | None:
    """`linear` for tensors that `prefer` has seen and a number of rows that it was told, with few
    checks: None for whatever needs more of them. Narrow layers take as long as their checks.
    """
    found = _packs.get(id(weight))
    if found is None or found.vectors != (id(scale), id(bias)) or not found.is_of(weight):
        return None
    fits = (
        found.preferred >> (x.numel() // found.inputs).bit_length() & 1
        and x.dtype in KINDS
        and x.shape[-1] == found.inputs
        and x.is_contiguous()
        and takes(x)
    )
    return _call(found, x, scale, bias) if fits else None


def prefer(weight: Tensor, scale: Tensor, bias: Tensor | None, rows: int) -> None:
    """Let `again` compute so many rows, and up to the next power of two, with these tensors."""
    found = _packs.get(id(weight))
    if found is None or not all(_is_plain(v) for v in (scale, bias) if v is not None):
        return
    found.preferred |= 1 << rows.bit_length()
    found.vectors, found.held = (id(scale), id(bias)), (scale, bias)


def _is_plain(vector: Tensor) -> bool:
    return vector.dtype is torch.float32 and vector.is_contiguous()


_forked = False


def threads(products: int) -> int:
    """Threads for that many products. OpenMP's threads don't follow a process that forks."""
    return 1 if _forked else max(1, min(torch.get_num_threads(), products // _WORTH_A_THREAD))


def forked() -> bool:
    """Is this process the child of one that may have started OpenMP's threads?"""
    return _forked


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)
