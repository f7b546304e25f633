"""int8.cpp as a library: its structs, its functions, and the instruction set that it is compiled
for.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantize.native import packs
from quantize.native.build import Kernels
from quantize.native.packs import FLOAT, NUMBER, POINTER, fields

# About how many products a core makes in a cycle, by level.
_PRODUCTS = {"generic": 2, "avx2": 22, "avx512": 32, "vnni": 64, "amx": 512, "dotprod": 32}

PANEL, _STEP = 16, 64  # outputs and inputs that a packed weight is filled up to

# Of the outputs, by name: as in elementary.h.
ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 2, "silu": 3, "sigmoid": 4}


_THREE, _FOUR = NUMBER * 3, NUMBER * 4


class Layer(ctypes.Structure):
    """As in linears.h."""

    _fields_ = fields(
        (NUMBER, "inputs outputs"),
        (POINTER, "packed sums scale bias factor"),
        (NUMBER, "outliers"),
        (POINTER, "channels kept"),
        (NUMBER, "activation"),
        (POINTER, "tails"),
    )


class Linears(ctypes.Structure):
    """As in int8.cpp."""

    _fields_ = fields(
        (POINTER, "layers"),
        (NUMBER, "count rows apart how"),
    )


class Norm(ctypes.Structure):
    """As in floats.h."""

    _fields_ = fields(
        (NUMBER, "rows width centered"),
        (FLOAT, "epsilon"),
    )


class Attention(ctypes.Structure):
    """As in attend.h."""

    _fields_ = fields(
        (NUMBER, "batches heads shared queries keys width wide"),
        (_THREE, "q k v mask"),
        (FLOAT, "scale"),
        (ctypes.c_int32, "causal"),
        (NUMBER, "masked"),
    )


class Each(ctypes.Structure):
    """As in floats.h."""

    _fields_ = fields(
        (_FOUR, "size x other y"),
        (NUMBER, "how activation"),
        (POINTER, "tails"),
    )


class Step(ctypes.Structure):
    """As in int8.cpp."""

    _fields_ = fields(
        (NUMBER, "work shared"),
        (POINTER, "what places apart"),
    )


@dataclass(frozen=True)
class Functions:
    """What int8.cpp exports."""

    open_library: Callable[[], int]
    pack: Callable[..., None]
    linear: Callable[..., int]
    run_program: Callable[..., int]
    are_held: Callable[..., int]
    products: int = 1  # about how many a core makes in a cycle


# Keeps the interpreter's lock, as calls of `ctypes.CDLL` don't.
_HELD: Any = ctypes.PYFUNCTYPE(ctypes.c_int, POINTER, NUMBER, POINTER, POINTER)


def read(library: ctypes.CDLL) -> Functions:
    """The functions of a compiled int8.cpp. Raises OSError for a library that isn't one of this
    version.
    """
    sizes = packs.sizes(Layer, Linears, Norm, Attention, Each, Step)
    names = "open_library", "pack", "linear", "run_program", "are_held"
    symbols = packs.symbols(library, names, sizes)
    symbols[-1] = _HELD(ctypes.cast(symbols[-1], POINTER).value)
    functions = Functions(*symbols)
    functions.pack.argtypes = [POINTER, NUMBER, NUMBER, POINTER, POINTER]
    functions.pack.restype = None
    functions.linear.argtypes = [POINTER, NUMBER, POINTER, POINTER]
    functions.run_program.argtypes = [POINTER, *[NUMBER] * 2, POINTER, *[NUMBER] * 3]
    return functions


KERNELS = Kernels(Path(__file__).with_name("int8.cpp"), read)


@functools.cache
def functions() -> Functions:
    """The kernels for the best instruction set; errors as of `Kernels.best`."""
    library = KERNELS.best()
    return dataclasses.replace(library.functions, products=_PRODUCTS[library.level])


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
