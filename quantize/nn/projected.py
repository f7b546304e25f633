"""Modules of torch that multiply by weights without calling a layer: attention, recurrent cells.

A technique has nothing to replace in them. `project` puts modules in their places that compute the
same with linear layers like all others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from quantize import surgery
from quantize.nn import attention
from quantize.nn.attention import ProjectedAttention
from quantize.nn.cells import GATES, ProjectedCell

_INSTEAD: dict[type[nn.Module], Any] = {nn.MultiheadAttention: ProjectedAttention}
_INSTEAD |= dict.fromkeys(GATES, ProjectedCell)


def project(
    model: nn.Module, skipped: Callable[[str, nn.Module], bool]
) -> tuple[nn.Module, dict[str, nn.Module], dict[str, str]]:
    """Put modules with linear layers in the places of those that have none, in place.

    Returns the (possibly new) root, the modules that were replaced, and the reasons why others
    stayed.
    """
    holders, bound = surgery.holders(model), surgery.bound_layers(model)
    replaced: dict[str, nn.Module] = {}
    made: dict[nn.Module, nn.Module] = {}
    left: dict[str, str] = {}
    for name, module in list(model.named_modules()):
        kind = next((kind for kind in _INSTEAD if isinstance(module, kind)), None)
        if kind is None:
            continue
        reason = bound.get(module) or _obstacle(name, module, kind, holders, skipped)
        if reason is None:
            replaced[name] = module
            made[module] = _INSTEAD[kind].from_module(module)
        else:
            left[name] = reason
    return surgery.replace(model, made), replaced, left


def restore(
    model: nn.Module, replaced: Mapping[str, nn.Module], kinds: tuple[type[nn.Module], ...]
) -> nn.Module:
    """Put back the modules of which no layer became one of `kinds`."""
    back = {}
    for name, original in replaced.items():
        projected = model.get_submodule(name)
        if not any(isinstance(part, kinds) for part in projected.children()):
            projected.__dict__.pop("_structure", None)
            back[projected] = original
    return surgery.replace(model, back)


def _obstacle(
    name: str,
    module: nn.Module,
    kind: type[nn.Module],
    holders: Mapping[int, list[str]],
    skipped: Callable[[str, nn.Module], bool],
) -> str | None:
    parts = module.named_modules()
    if any(skipped(f"{name}.{part}".strip("."), child) for part, child in parts):
        return "it or a part of it is named by skip"
    if type(module).forward is not kind.forward or "forward" in module.__dict__:
        own = type(module).__name__
        return f"{own} is a subclass of nn.{kind.__name__} with a forward of its own"
    if isinstance(module, nn.MultiheadAttention):
        reason = attention.obstacle(module)
    else:
        computed = not {"weight_ih", "weight_hh"} <= module._parameters.keys()
        why = "its weights are computed by a hook or a parametrization: make them permanent first"
        reason = why if computed else None
    if reason is not None:
        return reason
    if any(len(holders[id(p)]) > 1 for p in module.parameters()):
        return "it shares its weights with another module"
    dtypes = {p.dtype for p in module.parameters()}
    if len(dtypes) > 1 or not all(dtype.is_floating_point for dtype in dtypes):
        return "its weights are of several dtypes or no floating numbers"
    return None
