"""Inputs and outputs of any nesting, flattened to tensors and put back.

A `Spec` is a tree of plain values, so it can be compared, written as JSON and turned into
TorchScript source. Leaves are tensors (numbered in order) or constants (None, bool, int, float,
str), which a fused model bakes in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spec:
    """`kind` is tensor, constant, tuple, list, dict or object (a dataclass: rebuilt by `cls`)."""

    kind: str
    children: tuple[Spec, ...] = ()
    keys: tuple[str, ...] = ()
    value: Any = None  # a constant's value, or a tensor's number
    cls: type | None = None


def flatten(value: Any, where: str) -> tuple[list[Tensor], Spec]:
    """Tensors of `value` in order, and its shape. Raises TypeError naming the part (`where`) that
    isn't made of tensors.
    """
    tensors: list[Tensor] = []

    def walk(part: Any, name: str) -> Spec:
        if isinstance(part, Tensor):
            tensors.append(part)
            return Spec("tensor", value=len(tensors) - 1)
        if part is None or isinstance(part, (bool, int, float, str)):
            return Spec("constant", value=part)
        if isinstance(part, Mapping):
            keys = tuple(part)
            if not all(isinstance(k, str) for k in keys):
                raise TypeError(f"{name} is a dict whose keys are not all strings")
            children = tuple(walk(part[k], f"{name}[{k!r}]") for k in keys)
            kind = "dict" if type(part) is dict else "object"
            return Spec(kind, children, keys, cls=type(part))
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            keys = tuple(f.name for f in dataclasses.fields(part) if f.init)
            children = tuple(walk(getattr(part, k), f"{name}.{k}") for k in keys)
            return Spec("object", children, keys, cls=type(part))
        if isinstance(part, (tuple, list)):
            children = tuple(walk(p, f"{name}[{i}]") for i, p in enumerate(part))
            if isinstance(part, list):
                return Spec("list", children)
            named = hasattr(part, "_fields")
            return Spec("tuple", children, cls=type(part) if named else None)
        if isinstance(part, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise TypeError(
                f"{name} is a number that depends on the inputs; a fused model returns tensors"
            )
        kind = type(part).__name__
        hint = "; pass use_cache=False with the example inputs" if "Cache" in kind else ""
        raise TypeError(
            f"{name} is a {kind}, which is not made of tensors and can't be fused{hint}"
        )

    return tensors, walk(value, where)


def unflatten(spec: Spec, tensors: Sequence[Any] | Mapping[int, Any]) -> Any:
    """The value that `flatten` took apart, with these tensors in it, by number."""
    if spec.kind == "tensor":
        return tensors[spec.value]
    if spec.kind == "constant":
        return spec.value
    children = [unflatten(c, tensors) for c in spec.children]
    if spec.kind == "list":
        return children
    if spec.kind == "tuple":
        return spec.cls(*children) if spec.cls else tuple(children)
    if spec.kind == "dict":
        return dict(zip(spec.keys, children, strict=True))
    made: Any = spec.cls
    return made(**dict(zip(spec.keys, children, strict=True)))


def numbers(spec: Spec) -> list[int]:
    """The numbers of the tensors in `spec`, in order."""
    if spec.kind == "tensor":
        return [spec.value]
    return list(chain.from_iterable(map(numbers, spec.children)))


def plain(spec: Spec) -> Spec:
    """What a file without our classes can return: a dataclass becomes a dict without its None
    fields, a named tuple a tuple.

    A dict holds tensors only, so that it has one type in TorchScript: nested parts get dotted names
    (`hidden_states.0`).
    """
    if spec.kind in ("tensor", "constant"):
        return spec
    if spec.kind in ("tuple", "list"):
        return dataclasses.replace(spec, children=tuple(plain(c) for c in spec.children), cls=None)
    names: dict[str, Spec] = {}

    def walk(part: Spec, name: str) -> None:
        if part.kind == "tensor":
            names[name] = part
        elif part.kind == "constant":
            if part.value is not None:
                raise TypeError(
                    f"output {name!r} is the constant {part.value!r}: a fused model returns tensors"
                )
        else:
            keys = part.keys or [str(i) for i in range(len(part.children))]
            for key, child in zip(keys, part.children, strict=True):
                walk(child, f"{name}.{key}" if name else key)

    walk(spec, "")
    return Spec("dict", tuple(names.values()), tuple(names))


def duplicate(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies in the same layout: strides stay, and what shared memory shares memory."""
    if any(t.layout != torch.strided or t.is_conj() or t.is_neg() for t in tensors):
        return [t.detach().clone() for t in tensors]
    used: dict[int, tuple[int, int]] = {}  # bytes of each storage, from and to
    for tensor in tensors:
        start, end = _bytes(tensor)
        key = tensor.untyped_storage()._cdata
        first, last = used.get(key, (start, end))
        used[key] = (min(first, start), max(last, end))
    copies: dict[int, Tensor] = {}
    result = []
    for tensor in tensors:
        key, size = tensor.untyped_storage()._cdata, tensor.element_size()
        first, last = used[key]
        if key not in copies:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(
                tensor.untyped_storage()
            )
            copies[key] = whole[first:last].clone()
        usable = len(copies[key]) // size * size
        memory = copies[key][:usable].view(tensor.dtype)
        offset = tensor.storage_offset() - first // size
        result.append(memory.as_strided(tensor.shape, tensor.stride(), offset))
    return result


def _bytes(tensor: Tensor) -> tuple[int, int]:
    """The bytes of its storage that a tensor uses, from and to, in steps that suit every dtype."""
    steps = [(n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    last = tensor.storage_offset() + (sum(steps) + 1 if tensor.numel() else 0)
    end = -(-last * tensor.element_size() // 16) * 16
    start = int(tensor.storage_offset()) * tensor.element_size() // 16 * 16
    return start, min(int(end), tensor.untyped_storage().nbytes())
