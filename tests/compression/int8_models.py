"""What the tests of int8 share: layers, what each kernel gives of them, and stopwatches."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from helpers import linear
from pytest import MonkeyPatch
from torch import Tensor, nn

from quantize.compression.int8 import speed
from quantize.native import build, int8_library, isa
from quantize.nn import int8_kernels as kernels
from quantize.nn import int8_products as products
from quantize.nn import timing
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


def timings(monkeypatch: MonkeyPatch) -> list[tuple[int, ...]]:
    """Let int8 cost 9 us more than float and 4 times less per weight; returns the shapes that are
    timed.
    """
    shapes = []

    def timed(plain: nn.Module, make_small: object, x: Tensor, *, kind: object) -> timing.Timing:
        numbers = plain.weight.numel()
        shapes.append(tuple(x.shape))
        return timing.Timing(tuple(x.shape), numbers * 1e-9 + 1e-6, numbers / 4e9 + 1e-5)

    monkeypatch.setattr(speed, "time_layers", timed)
    return shapes


def races(monkeypatch: MonkeyPatch, *seconds: list[float]) -> list[dict[str, float]]:
    """Let calls of whole models take these seconds, float and int8, race after race; returns the
    options of the races.
    """
    results, options = iter(seconds), []

    def race(calls: list, **given: float) -> list[float]:
        options.append(given)
        for call in calls:
            call()
        return next(results)

    monkeypatch.setattr(speed, "clock", SimpleNamespace(race=race))
    return options
