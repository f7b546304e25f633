"""Integer weights in the layouts that step.cpp multiplies, kept until the weight dies or changes.

They lie outside of the modules, so that no copy, move or file carries a stale one along.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from quantize.native import int8
from quantize.nn.int4 import Int4Linear
from quantize.nn.int8 import Int8Linear
from quantize.run.decoding.build import built


@dataclass(frozen=True)
class Panels:
    """A weight as structs.h describes it, with the tensors that own the memory."""

    weight: Tensor
    sums: Tensor | None = None
    source: Tensor | None = None


State = tuple[tuple[int, int], ...]
_panels: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of 4-bit weights
_lock = threading.Lock()


def int8_panels(layer: Int8Linear) -> Panels:
    """The panels of integers.h, shared with the layer's own forward."""
    weight = layer.packed.detach()
    if layer.packed.is_inference():
        with torch.inference_mode(False):
            weight = torch.empty_like(weight).copy_(weight)
        found = int8.packed(weight)
        return Panels(found.packed, found.sums, weight)
    found = int8.packed(layer.packed)
    return Panels(found.packed, found.sums)


def int4_panels(layer: Int4Linear) -> Panels:
    """The panels of int4.h."""
    tensors = (layer.packed, layer.scale, layer.zero)
    if any(tensor.is_inference() for tensor in tensors):  # nobody counts their changes
        return Panels(_pack_int4(layer))
    state: State = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
    with _lock:
        found = _panels.get(layer.packed)
        if found is None or found[0] != state:
            found = _panels[layer.packed] = (state, _pack_int4(layer))
    return Panels(found[1])


def _pack_int4(layer: Int4Linear) -> Tensor:
    packed, scale, zero = (t.contiguous() for t in (layer.packed, layer.scale, layer.zero))
    sizes = layer.out_features, layer.in_features, layer.group_size
    functions = built().functions
    panels = torch.empty(functions.int4_bytes(*sizes), dtype=torch.uint8, device="cpu")
    sources = packed.data_ptr(), scale.data_ptr(), zero.data_ptr()
    functions.pack_int4(*sources, *sizes, panels.data_ptr())
    return panels
