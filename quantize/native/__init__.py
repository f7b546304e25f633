"""C++ kernels behind a plain C interface: how they are built, kept and chosen."""

from quantize.native.build import Kernels, Library

__all__ = ["Kernels", "Library"]
