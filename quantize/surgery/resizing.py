"""Give a module other tensors and plain attributes; its class stays.

`resize` does it and records it, `resized` repeats it where a file is read: a file may change plain
values only, and only within the module's own sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantize.surgery.record import builder, edits_of, record

# An attribute from a file may be so large, or as large as what it replaces or an axis of it.
MAX_NUMBER = 2**16
MAX_LIST = 1000


def resize(
    module: nn.Module, *, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any]
) -> None:
    """Give `module` new tensors (parameters or buffers, by name) and new plain attributes
    (`out_features=96`), in place.

    A parameter stays the same object, so that whoever shares it sees the new tensor. The edit is
    recorded.
    """
    for name, tensor in tensors.items():
        _set_tensor(module, name, tensor)
    for name, value in attributes.items():
        _set_attribute(module, name, value)
    shapes = {n: list(t.shape) for n, t in tensors.items()}
    values = {n: list(v) if isinstance(v, tuple) else v for n, v in attributes.items()}
    edits = edits_of(module)
    if edits and edits[-1][0] == "resized" and not edits[-1][2]:
        # one edit for a module cut several times
        earlier = edits[-1][1]
        module.__dict__["_structure"] = edits[:-1]
        shapes, values = {**earlier["shapes"], **shapes}, {**earlier["attributes"], **values}
    record(module, "resized", shapes=shapes, attributes=values)


@builder
def resized(
    module: nn.Module, shapes: Mapping[str, Sequence[int]], attributes: Mapping[str, Any]
) -> nn.Module:
    """Repeat `resize` on a fresh module: tensors of the recorded shapes, without data (on the meta
    device).
    """
    for name, shape in shapes.items():
        old = _get_tensor(module, name)
        _set_tensor(module, name, torch.empty(list(shape), dtype=old.dtype, device="meta"))
    widest = 0
    for tensor in [*module._parameters.values(), *module._buffers.values()]:
        if tensor is not None:
            widest = max((widest, *tensor.shape))
    for name, value in attributes.items():
        if not _plausible(getattr(module, name, None), value, widest):
            raise ValueError(
                f"attribute {name!r} of {type(module).__name__} can't become {str(value)[:80]}"
            )
        _set_attribute(module, name, tuple(value) if isinstance(value, list) else value)
    return module


def _plausible(old: Any, value: Any, widest: int) -> bool:
    """May a file put `value` in the place of `old` on a module whose tensors are at most `widest`
    along an axis?
    """
    if isinstance(value, list):
        return len(value) <= MAX_LIST and _are_plausible(old, value, widest)
    if isinstance(value, str):
        return len(value) <= MAX_LIST
    if type(value) is float:
        return type(old) is not int and (math.isfinite(value) or value == old)
    if type(value) is int and type(old) is not bool:
        before = old if type(old) is int else 0
        return min(0, before) <= value <= max(widest, MAX_NUMBER, before)
    return isinstance(value, bool | None)


def _are_plausible(old: Any, values: list[Any], widest: int) -> bool:
    """`_plausible` of each value: a number may be as large as the largest one before."""
    before = old if isinstance(old, (list, tuple)) else ()
    most = max((number for number in before if type(number) is int), default=0)
    instead = [most if type(value) is int else None for value in values]
    return all(_plausible(*pair, widest) for pair in zip(instead, values, strict=True))


def _get_tensor(module: nn.Module, name: str) -> Tensor:
    tensor = module._parameters.get(name, module._buffers.get(name))
    if tensor is None:
        raise ValueError(f"{type(module).__name__} has no parameter or buffer {name!r}")
    return tensor


def _set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    old = _get_tensor(module, name)
    if name in module._buffers:
        module._buffers[name] = tensor
    elif old.device == tensor.device:
        old.data = tensor.detach()
        old.grad = None
    # `.data` can't change device; a fresh model's sharing is restored when its tensors are loaded
    else:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=old.requires_grad)


def _set_attribute(module: nn.Module, name: str, value: Any) -> None:
    """Only plain values, only over an attribute of the same kind: a file must not be able to set
    anything else.
    """
    old = getattr(module, name, module)
    if name.startswith("_") or _kind(old) is None:
        raise ValueError(f"{type(module).__name__} has no plain attribute {name!r}")
    if _kind(value) is None or (
        old is not None and value is not None and _kind(old) != _kind(value)
    ):
        raise ValueError(
            f"attribute {name!r} of {type(module).__name__} is {old!r}, it can't become {value!r}"
        )
    setattr(module, name, list(value) if isinstance(old, list) and value is not None else value)


def _kind(value: Any) -> str | None:
    """What sort of plain value this is; None for anything else."""
    kinds = {
        bool: "flag",
        int: "number",
        float: "number",
        str: "text",
        tuple: "list",
        list: "list",
        type(None): "nothing",
    }
    return next((kind for plain, kind in kinds.items() if isinstance(value, plain)), None)
