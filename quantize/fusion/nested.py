"""Inputs and outputs of any nesting, flattened to tensors and put back.

A `Spec` is a tree of plain values, so it can be compared, written as JSON and turned into TorchScript source. Leaves are
tensors (numbered in order) or constants (None, bool, int, float, str), which a fused model bakes in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Spec:
    """`kind` is tensor, constant, tuple, list, dict or object (a dataclass: rebuilt by `cls`)."""

    kind: str
    children: tuple[Spec, ...] = ()
    keys: tuple[str, ...] = ()
    value: Any = None  # a constant's value, or a tensor's number
    cls: type | None = None


def flatten(value: Any, where: str) -> tuple[list[torch.Tensor], Spec]:
    """Tensors of `value` in order, and its shape. Raises TypeError naming the part (`where`) that isn't made of tensors."""
    tensors: list[torch.Tensor] = []

    def walk(part: Any, name: str) -> Spec:
        if isinstance(part, torch.Tensor):
            tensors.append(part)
            return Spec("tensor", value=len(tensors) - 1)
        if part is None or isinstance(part, (bool, int, float, str)):
            return Spec("constant", value=part)
        if isinstance(part, Mapping):
            keys = tuple(part)
            if not all(isinstance(k, str) for k in keys):
                raise TypeError(f"{name} is a dict whose keys are not all strings")
            children = tuple(walk(part[k], f"{name}[{k!r}]") for k in keys)
            return Spec("dict" if type(part) is dict else "object", children, keys, cls=type(part))
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            keys = tuple(f.name for f in dataclasses.fields(part) if f.init)
            return Spec("object", tuple(walk(getattr(part, k), f"{name}.{k}") for k in keys), keys, cls=type(part))
        if isinstance(part, (tuple, list)):
            children = tuple(walk(p, f"{name}[{i}]") for i, p in enumerate(part))
            if isinstance(part, list):
                return Spec("list", children)
            named = hasattr(part, "_fields")
            return Spec("tuple", children, cls=type(part) if named else None)
        hint = "; pass use_cache=False with the example inputs" if "Cache" in type(part).__name__ else ""
        raise TypeError(f"{name} is a {type(part).__name__}, which is not made of tensors and can't be fused{hint}")

    return tensors, walk(value, where)


def unflatten(spec: Spec, tensors: Sequence[Any]) -> Any:
    """The value that `flatten` took apart, with these tensors in it."""
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
    return spec.cls(**dict(zip(spec.keys, children, strict=True)))


def plain(spec: Spec) -> Spec:
    """What a file without our classes can return: a dataclass becomes a dict without its None fields, a named tuple a tuple.

    A dict holds tensors only, so that it has one type in TorchScript: nested parts get dotted names (`hidden_states.0`).
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
                raise TypeError(f"output {name!r} is the constant {part.value!r}: a fused model returns tensors")
        else:
            keys = part.keys or [str(i) for i in range(len(part.children))]
            for key, child in zip(keys, part.children, strict=True):
                walk(child, f"{name}.{key}" if name else key)

    walk(spec, "")
    return Spec("dict", tuple(names.values()), tuple(names))


def to_json(value: Any) -> Any:
    """Inputs as JSON: of a tensor only shape and dtype."""
    if isinstance(value, torch.Tensor):
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return {"dict": {k: to_json(v) for k, v in value.items()}}
    if isinstance(value, (tuple, list)):
        return {type(value).__name__ if type(value) in (tuple, list) else "tuple": [to_json(v) for v in value]}
    return {"constant": value}


def from_json(value: Any) -> Any:
    """Inputs of zeros from `to_json`. Raises ValueError for anything else."""
    if not isinstance(value, Mapping):
        raise ValueError(f"no inputs: {value!r}")
    if "tensor" in value:
        dtype = getattr(torch, str(value.get("dtype")), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"no dtype: {value.get('dtype')!r}")
        return torch.zeros(value["tensor"], dtype=dtype)
    if "dict" in value:
        return {k: from_json(v) for k, v in value["dict"].items()}
    for kind in (tuple, list):
        if kind.__name__ in value:
            return kind(from_json(v) for v in value[kind.__name__])
    return value["constant"]
