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

from quantize.native import build, isa

# About how many products a core makes in a cycle, by level.
_PRODUCTS = {"generic": 2, "avx2": 16, "avx512": 32, "vnni": 64, "amx": 512}

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
    try:
        size = ctypes.c_int64.in_dll(library, "layer_bytes").value
        names = "open_library", "pack", "linear", "linear_with", "linears"
        functions = Functions(*(getattr(library, name) for name in names))
    except (AttributeError, ValueError) as error:
        raise OSError(f"the compiled library lacks a symbol: {error}") from None
    if size != ctypes.sizeof(Layer):
        raise OSError(
            f"the compiled library has a struct of {size} bytes, this version of "
            f"{ctypes.sizeof(Layer)}"
        )
    functions.pack.argtypes = [pointer, number, number, pointer, pointer]
    functions.pack.restype = None
    functions.linear.argtypes = [pointer, number, pointer, pointer]
    functions.linear_with.argtypes = [pointer, number, pointer, pointer, number, pointer]
    functions.linears.argtypes = [pointer, number, number, pointer, pointer]
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
            return dataclasses.replace(library.functions, products=_PRODUCTS[level])
    raise OSError("this process may not use the instruction sets that the CPU has")
