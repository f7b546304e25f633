"""The structs of structs.h and the functions of step.cpp, and the check that the compiled code has
the same structs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

_number, _pointer = ctypes.c_int64, ctypes.c_void_p


class Linear(ctypes.Structure):
    pass


Linear._fields_ = [
    *((name, _number) for name in ("kind", "outputs", "inputs", "group", "outliers")),
    *((name, _pointer) for name in ("weight", "scale", "sums", "bias")),
    *((name, _pointer) for name in ("factor", "channels", "kept")),
    ("first", ctypes.POINTER(Linear)),
]
NORMS = ("attention_norm", "ffn_norm", "q_norm", "k_norm")
LINEARS = ("q", "k", "v", "out", "gate", "up", "down")


class Layer(ctypes.Structure):
    _fields_ = [*((name, _pointer) for name in NORMS), *((name, Linear) for name in LINEARS)]


class Model(ctypes.Structure):
    _fields_ = [
        *((name, _number) for name in ("layers", "width", "head_dim")),
        *((name, ctypes.c_float) for name in ("norm_eps", "rope_scale")),
        *((name, _pointer) for name in ("frequencies", "norm", "layer")),
        ("head", Linear),
    ]


class Held(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in ("k", "v", "k_scale", "v_scale")),
        *((name, _number) for name in ("capacity", "first", "window")),
    ]


class Pass(ctypes.Structure):
    _fields_ = [
        *((name, _number) for name in ("batch", "tokens", "length", "keep", "kind", "threads")),
        *((name, _pointer) for name in ("pad", "lengths", "held", "x", "logits")),
    ]


STRUCTS = (Linear, Layer, Model, Held, Pass)  # in the order of `struct_sizes` in step.cpp


@dataclass(frozen=True)
class Functions:
    """What step.cpp exports."""

    decode: Callable[..., None]
    int4_bytes: Callable[[int, int, int], int]
    pack_int4: Callable[..., None]


def read(library: ctypes.CDLL) -> Functions:
    """The functions of a compiled step.cpp. Raises OSError for a library that isn't one of this
    step.cpp.
    """
    try:
        found = Functions(library.decode, library.int4_bytes, library.pack_int4)
        sizes = list((ctypes.c_int64 * len(STRUCTS)).in_dll(library, "struct_sizes"))
    except (AttributeError, ValueError) as error:
        raise OSError(f"the compiled library lacks a symbol: {error}") from None
    expected = [ctypes.sizeof(struct) for struct in STRUCTS]
    if sizes != expected:
        raise OSError(
            f"the compiled library has structs of {sizes} bytes, this version of {expected}"
        )
    library.decode.argtypes = [ctypes.POINTER(Model), ctypes.POINTER(Pass)]
    library.int4_bytes.argtypes, library.int4_bytes.restype = [_number] * 3, _number
    library.pack_int4.argtypes = [*[_pointer] * 3, *[_number] * 3, _pointer]
    for function in (library.decode, library.pack_int4):
        function.restype = None
    return found
