"""Which modules run as one: in a native call, or as calls of torch alone; and which layers that are
slower in int8 by themselves gain by it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from quantize import surgery
from quantize.compression.int8.joining import Joining, fuse_activations
from quantize.compression.int8.layers import Choice, Plans, convert
from quantize.compression.int8.speed import is_slower, timed_shapes
from quantize.nn import CompressedLayer, PackedLayer
from quantize.nn.int8 import Int8Linear
from quantize.nn.int8_conv import Int8Conv
from quantize.nn.int8_program import SOURCE, Op, trace
from quantize.nn.int8_region import int8_region, may_be_region
from quantize.nn.int8_tracer import AsksForSize
from quantize.nn.replay import KINDS

Inputs = Mapping[str, set[tuple[int, ...]]]  # shapes by layer, on calibration
_FEWEST = 2  # int8 layers of a region that is recorded
_SIDE = 48  # of the images for which a forward is read that asks for sizes


def make_regions(model: nn.Module) -> list[str]:
    """Make regions (`quantize.nn.int8_region`), in place: the largest modules that are nothing but
    int8 convolutions and what lies between them, but not the model itself, and all modules around
    several int8 layers. Returns their names.
    """
    asked = surgery.asked_classes(model)
    found, programs = list[str](), list[str]()
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{program}.") for program in programs)
        if inside or module in asked or not may_be_region(module):
            continue
        is_program = bool(name) and _is_program(module)
        if is_program or _may_be_recorded(module):
            int8_region(module)
            surgery.record(module, "int8_region")
            found.append(name)
        if is_program:
            programs.append(name)
    return found


def gaining_together(
    source: nn.Module,
    choice: Choice,
    plans: Plans,
    stored: Collection[str],
    joining: Joining,
    inputs: Inputs,
) -> list[str]:
    """Those of the convolutions that are slower in int8 by themselves, but not as a part of the
    native program around them: it keeps images in its own order, and no Python runs between layers.

    Args:
        source: the float model, with norms folded.
        choice: of its layers. plans: as for `convert`.
        stored: names of the convolutions.
        joining: as for `fuse_activations`.
        inputs: on which layers are timed.
    """
    others = {name: plan for name, plan in plans.items() if name not in stored}
    model = convert(surgery.clone(source), choice.chosen, others)
    fuse_activations(model, *joining)
    found: list[str] = []
    for region in make_regions(model):
        module = model.get_submodule(region)
        inside = [name for name in stored if name.startswith(f"{region}.")]
        ops = _operations(module) if inside else None
        if ops is None:
            continue
        first = next(op.module for op in ops if op.x == SOURCE and isinstance(op.module, Int8Conv))
        named = next(name for name, own in model.named_modules() if own is first)
        if named not in choice.chosen:  # it was in int8 before
            continue
        shapes = timed_shapes(choice.chosen[named], inputs.get(named, ()))
        apart: Any = surgery.deepcopy(module)
        for name in inside:
            apart.get_submodule(name.removeprefix(f"{region}.")).floats = True
        if not is_slower(module, apart, shapes):
            found += inside
    return found


def _operations(module: nn.Module) -> list[Op] | None:
    """Of the program that a module is; None where it is none."""
    first: Any = next((m for m in module.modules() if isinstance(m, Int8Conv)), None)
    if first is None:
        return None
    try:
        return trace(module)
    except AsksForSize:
        return trace(module, (1, first.in_channels, *[_SIDE] * len(first.kernel_size)))


def _is_program(module: nn.Module) -> bool:
    return not isinstance(module, CompressedLayer) and _operations(module) is not None


def _may_be_recorded(module: nn.Module) -> bool:
    """Has it a forward of its own around int8 layers?"""
    if type(module).forward is nn.Module.forward or isinstance(module, CompressedLayer):
        return False
    packed = [inside for inside in module.modules() if isinstance(inside, PackedLayer)]
    computing = sum(isinstance(layer, (Int8Linear, Int8Conv)) for layer in packed)
    return computing >= _FEWEST and all(isinstance(layer, KINDS) for layer in packed)
