"""An int8 layer that the tests of int8 share."""

from __future__ import annotations

from helpers import linear

from quantize.nn.int8 import Int8Linear


def layer_of(k: int, n: int, bias: bool = True) -> Int8Linear:
    source = linear(k, n, bias)
    return Int8Linear.from_weight(source.weight, source.bias)
