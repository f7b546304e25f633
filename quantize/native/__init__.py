"""C++ kernels behind a plain C interface: how they are built, kept and chosen."""

from quantize.native.build import NUMBERS, Code, Library, library

__all__ = ["NUMBERS", "Code", "Library", "library"]
