"""step.cpp, compiled and kept as `quantize.native.build` does it."""

from __future__ import annotations

import platform
from pathlib import Path

from quantize.native import NUMBERS, Code, Library
from quantize.native import library as native_library
from quantize.run.decoding.structs import read

SOURCE = Path(__file__).with_name("step.cpp")
_OWN = (
    "structs.h",
    "int4.h",
    "inputs.h",
    "products.h",
    "int8_attention.h",
    "attention.h",
    "contexts.h",
)
_SHARED = ("integers.h", "rows.h")
HEADERS = (
    *map(SOURCE.with_name, _OWN),
    *map(NUMBERS.with_name, _SHARED),
    NUMBERS,
)
# Contraction is off: rows would round differently where the compiler fuses other operations.
# Compilers use half of AVX-512's width unless they are told to: it once slowed down the clock.
_WIDE = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
FLAGS = ("-march=native", "-ffp-contract=off", "-Wno-psabi", *_WIDE)
STEP = Code("step", SOURCE, HEADERS, FLAGS, read)


def library(*, compile_now: bool = True) -> Library | None:
    """The compiled step.cpp; its functions are `structs.Functions`. Arguments and errors:
    see `quantize.native.library`.
    """
    return native_library(STEP, compile_now=compile_now)


def built() -> Library:
    """`library()`, compiled now if need be."""
    found = library()
    if found is None:
        raise OSError("step.cpp was neither found nor compiled")
    return found
