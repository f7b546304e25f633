"""Modules that a model keeps outside of its tree of modules: in lists and dicts, in objects of its
own, in partial functions, bound methods and closures. A forward may call them there.

`copy.deepcopy` takes all of these along but closures, and a replaced layer must be replaced there
too, or the model goes on with the old one.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Mapping
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

_INTERNAL = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device})
_PLAIN = (torch.Tensor, type, ModuleType)


class Swap:
    """Puts other modules in the places of those that attributes keep.

    Args:
        replacements: the new module for each old one.
    """

    def __init__(self, replacements: Mapping[nn.Module, nn.Module]) -> None:
        self.replacements = replacements
        self.seen: set[int] = set()
        self.owner: nn.Module | None = None  # whose attributes are looked at

    def __call__(self, module: nn.Module) -> None:
        """In the attributes of `module`; its children are not looked at, and what it holds of
        itself (its own bound methods) stays.
        """
        self.owner = module
        for name, value in list(vars(module).items()):
            if name not in _INTERNAL and type(value) not in _ATOMS:
                module.__dict__[name] = self._swapped(value)

    def _swapped(self, value: Any) -> Any:
        """`value` with modules replaced; what can be is changed in place."""
        if isinstance(value, nn.Module):
            return value if value is self.owner else self.replacements.get(value, value)
        if type(value) in _ATOMS or isinstance(value, _PLAIN) or id(value) in self.seen:
            return value
        if isinstance(value, tuple):
            return self._tuple(value)
        if isinstance(value, MethodType):
            owner = self._swapped(value.__self__)
            return value if owner is value.__self__ else getattr(owner, value.__name__)
        if isinstance(value, functools.partial):
            return self._partial(value)
        self.seen.add(id(value))
        self._inside(value)
        return value

    def _inside(self, value: Any) -> None:
        if isinstance(value, (list, deque)):
            for i, part in enumerate(value):
                value[i] = self._swapped(part)
        elif isinstance(value, dict):
            for key, part in list(value.items()):
                value[key] = self._swapped(part)
        elif isinstance(value, FunctionType):
            for cell in value.__closure__ or ():
                self._cell(cell)
        elif hasattr(value, "__dict__"):
            for name, part in list(vars(value).items()):
                new = self._swapped(part)
                if new is not part:
                    value.__dict__[name] = new

    def _cell(self, cell: CellType) -> None:
        content = _content(cell)
        new = self._swapped(content)
        if new is not content:
            cell.cell_contents = new

    def _tuple(self, value: tuple[Any, ...]) -> tuple[Any, ...]:
        parts = [self._swapped(part) for part in value]
        if all(new is old for new, old in zip(parts, value, strict=True)):
            return value
        kind: Any = type(value)
        return kind(*parts) if hasattr(value, "_fields") else kind(parts)

    def _partial(self, value: functools.partial) -> functools.partial:
        function, *arguments = self._tuple((value.func, *value.args))
        keywords = {name: self._swapped(part) for name, part in value.keywords.items()}
        return functools.partial(function, *arguments, **keywords)


def copy_closures(copied: nn.Module, memo: Mapping[int, Any]) -> None:
    """Let the functions in attributes and hooks of a deep copy hold copies, in place.

    memo: of the deep copy: copies, by the identity of their originals.
    """
    for module in copied.modules():
        hooks = [vars(module)[kind] for kind in _HOOKS]
        for values in (vars(module), *hooks):
            for name, value in list(values.items()):
                if isinstance(value, FunctionType) and value.__closure__:
                    values[name] = _with_copies(value, value.__closure__, memo)


def _with_copies(
    function: FunctionType, closure: tuple[CellType, ...], memo: Mapping[int, Any]
) -> FunctionType:
    """`function`, or one like it that holds copies of what it held."""
    cells = tuple(_copied(cell, memo) for cell in closure)
    if all(new is old for new, old in zip(cells, closure, strict=True)):
        return function
    new = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
    )
    new.__kwdefaults__ = function.__kwdefaults__
    new.__qualname__ = function.__qualname__
    new.__dict__.update(vars(function))
    return new


def _copied(cell: CellType, memo: Mapping[int, Any]) -> CellType:
    """The cell, or one with the copy of what is in it."""
    content = _content(cell)
    if isinstance(content, MethodType) and id(content.__self__) in memo:
        return CellType(MethodType(content.__func__, memo[id(content.__self__)]))
    return CellType(memo[id(content)]) if id(content) in memo else cell


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that has no value yet
        return None
