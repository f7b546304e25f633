"""Which modules run as one: in a native call, or as calls of torch alone."""

from __future__ import annotations

from torch import nn

from quantize import surgery
from quantize.nn import CompressedLayer, PackedLayer
from quantize.nn.int8 import Int8Linear
from quantize.nn.int8_conv import Int8Conv
from quantize.nn.int8_program import trace
from quantize.nn.int8_region import int8_region, may_be_region
from quantize.nn.replay import KINDS

_FEWEST = 2  # operations of a region


def make_regions(model: nn.Module) -> list[str]:
    """Make regions (`quantize.nn.int8_region`), in place: the largest modules that are nothing but
    int8 convolutions and what lies between them, but not the model itself, and all modules around
    several int8 linear layers. Returns their names.
    """
    asked = surgery.asked_classes(model)
    found: list[str] = []
    for name, module in model.named_modules():
        if module in asked or not may_be_region(module):
            continue
        inside = not name or any(name.startswith(f"{region}.") for region in found)
        if _may_be_recorded(module) or (not inside and _is_program(module)):
            int8_region(module)
            surgery.record(module, "int8_region")
            found.append(name)
    return found


def _is_program(module: nn.Module) -> bool:
    convolutions = any(isinstance(m, Int8Conv) for m in module.modules())
    ops = trace(module) if convolutions else None
    return ops is not None and len(ops) >= _FEWEST


def _may_be_recorded(module: nn.Module) -> bool:
    """Has it a forward of its own around int8 linear layers?"""
    if type(module).forward is nn.Module.forward or isinstance(module, CompressedLayer):
        return False
    packed = [inside for inside in module.modules() if isinstance(inside, PackedLayer)]
    linears = sum(isinstance(layer, Int8Linear) for layer in packed)
    return linears >= _FEWEST and all(isinstance(layer, KINDS) for layer in packed)
