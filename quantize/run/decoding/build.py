"""step.cpp, compiled and kept as `quantize.native.build` does it."""

from __future__ import annotations

from pathlib import Path

from quantize.native import NUMBERS, Code, Library
from quantize.native import library as native_library
from quantize.run.decoding.structs import decode_function

SOURCE = Path(__file__).with_name("step.cpp")
STEP = Code("step", SOURCE, (NUMBERS,), ("-march=native",), decode_function)


def library(*, compile_now: bool = True) -> Library | None:
    """The compiled step.cpp; its functions are `decode`. Arguments and errors: see
    `quantize.native.library`.
    """
    return native_library(STEP, compile_now=compile_now)


def built() -> Library:
    """`library()`, compiled now if need be."""
    found = library()
    if found is None:
        raise OSError("step.cpp was neither found nor compiled")
    return found
