"""Int8 layers that the tests of int8 share, and what each kernel gives of them."""

from __future__ import annotations

import torch
from helpers import linear
from pytest import MonkeyPatch
from torch import Tensor, nn

from quantize.native import build, int8_library, isa
from quantize.nn import int8_kernels as kernels
from quantize.nn import int8_products as products
from quantize.nn.int8 import Int8Linear


def _kernels() -> list[str]:
    """Native code needs a compiler; oneDNN refuses a CPU on which it would cut sums off."""
    missing = {"native": build.compiler() is None, "onednn": not products.onednn_is_exact()}
    return [name for name in kernels.KERNELS if not missing.get(name)]


KERNELS = _kernels()


def layer_of(k: int, n: int, bias: bool = True) -> Int8Linear:
    source = linear(k, n, bias)
    return Int8Linear.from_weight(source.weight, source.bias)


def assert_kernels_give(layer: nn.Module, x: Tensor, expected: Tensor) -> None:
    """Every kernel gives the same bits."""
    for name in KERNELS:
        with kernels.kernel(name):
            assert torch.equal(layer(x), expected), name


def by_reference_and_level(
    layer: nn.Module, x: Tensor, level: str, monkeypatch: MonkeyPatch
) -> tuple[Tensor, Tensor]:
    """What the reference gives, and the native kernel of an instruction set."""
    with kernels.kernel("reference"):
        expected = layer(x)
    monkeypatch.setenv(isa.SWITCH, level)
    int8_library.functions.cache_clear()
    try:
        with kernels.kernel("native" if build.compiler() else "int_mm"):
            return expected, layer(x)
    finally:
        int8_library.functions.cache_clear()
