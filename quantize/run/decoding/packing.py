"""Integer weights in the layouts that step.cpp multiplies, kept until the weight dies or changes.

They lie outside of the modules, so that no copy, move or file carries a stale one along. A layer
doesn't hold its integers beside them, unless somebody else has them too (see `lazy`). Nor does one
of float16 hold its weight in float32 beside the 16 bits that step.cpp reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from quantize.native import int8
from quantize.nn.half import HalfLinear
from quantize.nn.int4 import Int4Linear
from quantize.nn.int8 import Int8Linear
from quantize.run.decoding import lazy
from quantize.run.decoding.structs import KERNELS

PANEL = 16  # outputs
STEP = 64  # inputs of an int8 panel are filled up to a multiple of it
BLOCK, BLOCK_BYTES, SCALE_BYTES = 32, 256, 64  # as in int4.h
ROWS = 1024  # of a float16 weight that are compared at a time


@dataclass(frozen=True)
class Panels:
    """A weight as structs.h describes it, with the tensors that own the memory."""

    weight: Tensor
    sums: Tensor | None = None
    source: Tensor | None = None


State = tuple[tuple[int, int], ...]
_panels: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of 4-bit weights


def panels_of(layer: Int8Linear | Int4Linear) -> Panels:
    """A layer's integers in panels, which the layer gives up where it alone holds them."""
    with lazy.LOCK:
        panels = lazy.panels_of(layer)
        if panels is not None:
            return panels
        is_int8 = isinstance(layer, Int8Linear)
        panels = _int8_panels(layer) if is_int8 else _int4_panels(layer)
        if all(lazy.holds_alone(layer._buffers, name) for name in list(layer._buffers)):
            unpack = int8_rows if is_int8 else int4_rows
            names = ("packed",) if is_int8 else ("packed", "scale", "zero")
            sizes = layer.out_features, layer.in_features
            group = () if is_int8 else (layer.group_size,)
            lazy.LazyBuffers(layer, panels, names, partial(unpack, panels.weight, *sizes, *group))
        return panels


def float16_of(layer: HalfLinear) -> Tensor | None:
    """The weight in float16 [outputs, inputs], which the layer holds alone if it alone had it.

    None where those 16 bits aren't all of it.
    """
    with lazy.LOCK:
        if layer._half[0] is not torch.float16:
            return None
        alone = lazy.holds_alone(layer._parameters, "weight")
        parameter: Any = layer._parameters["weight"]
        weight = parameter.detach()
        if weight.dtype is torch.float16:
            return weight
        narrow = weight.half()
        pairs = zip(narrow.split(ROWS), weight.split(ROWS), strict=True)
        if not all(torch.equal(part.float(), whole) for part, whole in pairs):
            return None
        if alone:
            layer.hold_stored(narrow)
        return narrow


def _int8_panels(layer: Int8Linear) -> Panels:
    """The panels of integers.h, shared with the layer's own forward."""
    if layer.packed.is_inference():
        with torch.inference_mode(False):
            weight = torch.empty_like(layer.packed).copy_(layer.packed)
        found = int8.packed(weight)
        return Panels(found.packed, found.sums, weight)
    found = int8.packed(layer.packed)
    return Panels(found.packed, found.sums)


def int8_rows(panels: Tensor, outputs: int, inputs: int) -> tuple[Tensor]:
    """The int8 weight [outputs, inputs] of panels of integers.h."""
    padded = -(-inputs // STEP) * STEP
    quads = panels.view(-1, padded // 4, PANEL, 4)  # four inputs of each output side by side
    rows = quads.transpose(1, 2).reshape(-1, padded)
    return (rows[:outputs, :inputs].clone(memory_format=torch.contiguous_format),)


def _int4_panels(layer: Int4Linear) -> Panels:
    """The panels of int4.h."""
    tensors = (layer.packed, layer.scale, layer.zero)
    if any(tensor.is_inference() for tensor in tensors):  # nobody counts their changes
        return Panels(_pack_int4(layer))
    state: State = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
    found = _panels.get(layer.packed)
    if found is None or found[0] != state:
        found = _panels[layer.packed] = (state, _pack_int4(layer))
    return Panels(found[1])


def _pack_int4(layer: Int4Linear) -> Tensor:
    packed, scale, zero = (t.contiguous() for t in (layer.packed, layer.scale, layer.zero))
    sizes = layer.out_features, layer.in_features, layer.group_size
    functions = KERNELS.best().functions
    panels = torch.empty(functions.int4_bytes(*sizes), dtype=torch.uint8, device="cpu")
    sources = packed.data_ptr(), scale.data_ptr(), zero.data_ptr()
    functions.pack_int4(*sources, *sizes, panels.data_ptr())
    return panels


def int4_rows(
    panels: Tensor, outputs: int, inputs: int, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The 4-bit weight, uint8 [outputs, inputs / 2], of panels of int4.h, and its scales and zeros,
    bfloat16 [outputs, inputs / group].
    """
    groups, code_bytes = inputs // group, group // BLOCK * BLOCK_BYTES
    codes, ends = panels.view(-1, groups, code_bytes + SCALE_BYTES).tensor_split((code_bytes,), -1)
    quads = codes.unflatten(-1, (-1, PANEL, 4))  # [panels, groups, group / 8, 16, 4]
    values = torch.stack((quads & 15, quads >> 4), dim=-2)  # inputs 0..3 of eight, then 4..7
    rows = values.permute(0, 3, 1, 2, 4, 5).reshape(-1, inputs)[:outputs]
    pairs = ends.contiguous().view(torch.bfloat16).unflatten(-1, (2, PANEL))
    scale, zero = pairs.permute(2, 0, 3, 1).reshape(2, -1, groups)[:, :outputs].contiguous()
    return rows[:, ::2] | rows[:, 1::2] << 4, scale.clone(), zero.clone()
