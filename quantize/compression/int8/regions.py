"""Which modules of int8 convolutions run in one native call."""

from __future__ import annotations

from torch import nn

from quantize import surgery
from quantize.nn.int8_conv import Int8Conv
from quantize.nn.int8_program import trace
from quantize.nn.int8_region import int8_region, may_be_region

_FEWEST = 2  # operations of a region


def make_regions(model: nn.Module) -> list[str]:
    """Make the largest modules that are nothing but int8 convolutions and what lies between them
    regions (`quantize.nn.int8_region`), in place; the model itself stays what it is. Returns their
    names.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{region}.") for region in found)
        if name and not inside and _is_region(module):
            int8_region(module)
            surgery.record(module, "int8_region")
            found.append(name)
    return found


def _is_region(module: nn.Module) -> bool:
    convolutions = any(isinstance(m, Int8Conv) for m in module.modules())
    ops = trace(module) if convolutions and may_be_region(module) else None
    return ops is not None and len(ops) >= _FEWEST
