"""The structs of step.cpp, field by field, and the check that the compiled code lays them out in
the same way.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

_number, _pointer = ctypes.c_int64, ctypes.c_void_p


class Linear(ctypes.Structure):
    pass


Linear._fields_ = [
    *((name, _number) for name in ("kind", "outputs", "inputs", "group")),
    *((name, _pointer) for name in ("weight", "scale", "zero", "bias")),
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


def decode_function(library: ctypes.CDLL) -> Callable[..., Any]:
    """`decode` of step.cpp, ready to be called. Raises OSError for a library that isn't one of this
    step.cpp.
    """
    try:
        function = library.decode
        sizes = list((ctypes.c_int64 * len(STRUCTS)).in_dll(library, "struct_sizes"))
    except (AttributeError, ValueError) as error:
        raise OSError(f"the compiled library lacks a symbol: {error}") from None
    expected = [ctypes.sizeof(struct) for struct in STRUCTS]
    if sizes != expected:
        raise OSError(
            f"the compiled library has structs of {sizes} bytes, this version of {expected}"
        )
    function.argtypes, function.restype = [ctypes.POINTER(Model), ctypes.POINTER(Pass)], None
    return function
