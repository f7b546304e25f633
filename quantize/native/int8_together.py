"""Several int8 linear layers in one native call, and one with a sum or a product after it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from quantize.native import int8
from quantize.native.int8_library import functions

ALONE, SUM, PRODUCT = range(3)  # as in int8.cpp
Operands = tuple[Tensor, Tensor, Tensor | None, str | None]  # weight, scale, bias, activation


def together(
    x: Tensor, layers: Sequence[Operands], how: int = ALONE, other: Tensor | None = None
) -> list[Tensor] | None:
    """`int8.again` for layers without outliers that read the same x, quantized once.

    Args:
        x: float32.
        layers: their tensors and activations.
        how: SUM or PRODUCT of the result of a single layer and `other`.
        other: float32, of the shape of the result, contiguous.

    Returns: The result of each layer; None where more checks are needed.
    """
    bounds, shapes = list[int8.Bound](), list[int8.Shape]()
    for weight, scale, bias, activation in layers:
        found = int8.KNOWN.get(id(weight))
        if found is None or found.bound is None or not found.is_of(weight):
            return None
        shape = found.shapes.get((x.shape, x.dtype))
        if shape is None or not _is_of(found.bound, scale, bias, activation):
            return None
        bounds.append(found.bound)
        shapes.append(shape)
    if not int8.takes(x) or not x.is_contiguous() or (other is not None and not int8.takes(other)):
        return None
    results = [torch.empty_like(shape.result) for shape in shapes]
    most = sum(shape.threads for shape in shapes)
    what, kernels = int8.what(shapes[0], most), functions()
    if other is not None:
        ends = x.data_ptr(), results[0].data_ptr()
        failed = kernels.linear_with(bounds[0].address, what, *ends, how, other.data_ptr())
    else:
        places = ctypes.c_void_p * len(layers)
        addresses = places(*(bound.address for bound in bounds))
        ends = x.data_ptr(), places(*(y.data_ptr() for y in results))
        failed = kernels.linears(addresses, len(layers), what, *ends)
    if failed:
        raise int8.no_memory(x)
    return results


def _is_of(bound: int8.Bound, scale: Tensor, bias: Tensor | None, activation: str | None) -> bool:
    """Was it made of these, as they are now, without outliers?"""
    return (
        bound.scale is scale
        and bound.bias is bias
        and bound.scale_pointer == scale.data_ptr()
        and (bias is None or bound.bias_pointer == bias.data_ptr())
        and bound.activation == activation
        and bound.outliers is None
    )
