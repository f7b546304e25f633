"""The compiled step.cpp: its functions, and the structs of structs.h that they take."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quantize.native import Kernels
from quantize.native.packs import symbols

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


_STRUCTS = {
    "linear_bytes": Linear,
    "layer_bytes": Layer,
    "model_bytes": Model,
    "held_bytes": Held,
    "pass_bytes": Pass,
}


@dataclass(frozen=True)
class Functions:
    """What step.cpp exports."""

    open_library: Callable[[], int]
    decode: Callable[..., None]
    int4_bytes: Callable[[int, int, int], int]
    pack_int4: Callable[..., None]
    fetch_lines: Callable[[int, int], None]


def read(library: ctypes.CDLL) -> Functions:
    """The functions of a compiled step.cpp. Raises OSError for a library that isn't one of this
    step.cpp.
    """
    sizes = {name: ctypes.sizeof(struct) for name, struct in _STRUCTS.items()}
    names = "open_library", "decode", "int4_bytes", "pack_int4", "fetch_lines"
    found = Functions(*symbols(library, names, sizes))
    library.decode.argtypes = [ctypes.POINTER(Model), ctypes.POINTER(Pass)]
    library.int4_bytes.argtypes, library.int4_bytes.restype = [_number] * 3, _number
    library.pack_int4.argtypes = [*[_pointer] * 3, *[_number] * 3, _pointer]
    library.fetch_lines.argtypes = [_pointer, _number]
    for function in (library.decode, library.pack_int4, library.fetch_lines):
        function.restype = None
    return found


KERNELS = Kernels(Path(__file__).with_name("step.cpp"), read)
