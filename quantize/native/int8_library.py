"""int8.cpp as a library: its struct, its functions, and the instruction set that it is compiled
for.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantize.native import build, isa, packs

# About how many products a core makes in a cycle, by level.
_PRODUCTS = {"generic": 2, "avx2": 16, "avx512": 32, "vnni": 64, "amx": 512}

PANEL, _STEP = 16, 64  # outputs and inputs that a packed weight is filled up to
_SOURCE = Path(__file__).with_name("int8.cpp")
HEADERS = (
    *(_SOURCE.with_name(name) for name in ("elementary.h", "gemm.h", "integers.h", "rows.h")),
    build.NUMBERS,
)

# Of the outputs, by name: as in elementary.h.
ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 2, "silu": 3}


class Layer(ctypes.Structure):
    """As in int8.cpp."""

    _fields_ = [
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("packed", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("factor", ctypes.c_void_p),
        ("outliers", ctypes.c_int64),
        ("channels", ctypes.c_void_p),
        ("kept", ctypes.c_void_p),
        ("activation", ctypes.c_int64),
        ("tails", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class Functions:
    """What int8.cpp exports."""

    open_library: Callable[[], int]
    pack: Callable[..., None]
    linear: Callable[..., int]
    linear_with: Callable[..., int]
    linears: Callable[..., int]
    products: int = 1  # about how many a core makes in a cycle


def read(library: ctypes.CDLL) -> Functions:
    """The functions of a compiled int8.cpp. Raises OSError for a library that isn't one of this
    version.
    """
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    names = "open_library", "pack", "linear", "linear_with", "linears"
    sizes = {"layer_bytes": ctypes.sizeof(Layer)}
    functions = Functions(*packs.symbols(library, names, sizes))
    functions.pack.argtypes = [pointer, number, number, pointer, pointer]
    functions.pack.restype = None
    functions.linear.argtypes = [pointer, number, pointer, pointer]
    functions.linear_with.argtypes = [pointer, number, pointer, pointer, number, pointer]
    functions.linears.argtypes = [pointer, number, number, pointer, pointer]
    return functions


def code(level: str) -> build.Code:
    """int8.cpp for a level of `isa`."""
    return packs.code(level, "int8", HEADERS, read)


@functools.cache
def functions() -> Functions:
    """The kernels for the best instruction set that this process may use. Compiles at the first
    call.

    Raises: OSError: there are none; the message says why. ValueError: QUANTIZE_ISA names no level.
    """
    for level in reversed(isa.levels()):
        library = build.library(code(level))
        if library is not None and library.functions.open_library() == 0:
            return dataclasses.replace(library.functions, products=_PRODUCTS[level])
    raise OSError("this process may not use the instruction sets that the CPU has")


def packed_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """int8 rows [outputs, inputs] in the kernels' layout (integers.h), filled up with zeros, and
    the sum of the weights of each output.
    """
    outputs, inputs = rows.shape
    filled = -(-outputs // PANEL) * PANEL
    size = filled * (-(-inputs // _STEP) * _STEP)
    packed = torch.empty(size, dtype=torch.int8, device="cpu")
    sums = torch.empty(filled, dtype=torch.int32, device="cpu")
    plain = rows.contiguous()
    functions().pack(plain.data_ptr(), outputs, inputs, packed.data_ptr(), sums.data_ptr())
    return packed, sums
