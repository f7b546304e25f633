"""The variables that the code of a forward names: those of Python modules, of the functions around
it, and its arguments' defaults.

Of classes the methods are looked into that have the name of an attribute in such code, and of
Python modules what has such a name, so that more is found than is read. Functions of torch, numpy
and this package aren't looked into.
"""

from __future__ import annotations

import dis
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch

from quantize.surgery.codes import codes_of, functions_of

_CLOSED = {"torch", "numpy", "quantize"}
# Methods that make, copy, change or show objects.
_OF_OBJECTS = {
    *("__init__", "__new__", "__post_init__", "__init_subclass__", "__class_getitem__", "__del__"),
    *("__copy__", "__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__"),
    *("__setattr__", "__delattr__", "__dir__", "__repr__", "__str__", "__format__"),
}
_TABLES = {"globals", "sys"}  # where code may look variables up by their names
Variables = tuple[Any, list[str]]  # what holds them, and their names there


def variables_of(
    classes: Iterable[Mapping[str, Any]], functions: Iterable[FunctionType]
) -> list[Variables]:
    """What the forwards of some classes (their attributes) name, some functions, and those that
    they call.
    """
    methods: dict[str, list[FunctionType]] = {}
    for attributes in classes:
        for name, value in attributes.items():
            methods.setdefault(name, []).extend(functions_of(value))
    found = _Found(methods)
    for name in ("forward", *filter(_is_called_unnamed, [*methods])):
        found.name(name)
    for function in functions:
        found.add(function)
    while found.waiting:
        found.look(found.waiting.popleft())
    return [*found.variables()]


class _Found:
    """Functions that were found, and names of variables by what holds them.

    Args:
        methods: of the classes, by name.
    """

    def __init__(self, methods: dict[str, list[FunctionType]]) -> None:
        self.methods = methods
        self.waiting: deque[FunctionType] = deque()
        self.known: set[FunctionType] = set()
        self.named: dict[int, tuple[dict[str, Any], set[str]]] = {}
        self.cells: list[Any] = []
        self.asked: set[str] = set()

    def name(self, name: str) -> None:
        """Code names a method, perhaps."""
        for function in self.methods.pop(name, ()):
            self.add(function)

    def add(self, value: Any) -> None:
        """The functions that a value is, or holds, wait to be looked into."""
        for function in functions_of(value):
            if function not in self.known and _changes(function.__globals__.get("__name__")):
                self.known.add(function)
                self.waiting.append(function)

    def look(self, function: FunctionType) -> None:
        """Note what a function names."""
        holder, names = function.__globals__, {*_variables(function.__code__)}
        attributes = {*_names(function.__code__)}
        for name in attributes:
            self.name(name)
        self.asked |= attributes & _Settings.names
        self._read(holder, names | attributes if names & _TABLES else names)
        for value in map(holder.get, names):
            if isinstance(value, ModuleType) and value is not sys and _is_open(value.__name__):
                self._read(vars(value), attributes)
        for cell in function.__closure__ or ():
            self._enclose(cell)

    def variables(self) -> Iterator[Variables]:
        """All that were noted."""
        for holder, names in self.named.values():
            yield holder, [*names]
        for cell in self.cells:
            yield cell, ["cell_contents"]
        if self.asked:
            yield _Settings(), [*self.asked]
        for function in self.known:
            if function.__defaults__ or function.__kwdefaults__ or function.__dict__:
                yield function, ["__defaults__", "__kwdefaults__", "__dict__"]

    def _read(self, holder: dict[str, Any], names: set[str]) -> None:
        here = names & holder.keys()
        if here:
            self.named.setdefault(id(holder), (holder, set()))[1].update(here)
        for name in here:
            self.add(holder[name])

    def _enclose(self, cell: Any) -> None:
        try:
            content = cell.cell_contents
        except ValueError:  # nothing yet
            return
        self.cells.append(cell)
        self.add(content)


def is_open(kind: type) -> bool:
    """Are attributes of a class looked into?"""
    return _changes(str(kind.__module__))


def _is_called_unnamed(method: str) -> bool:
    """May a forward call it without its name, as operators and calls do?"""
    return method.startswith("__") and method.endswith("__") and method not in _OF_OBJECTS


def _changes(module: str | None) -> bool:
    """May what a Python module defines change? Python's own doesn't."""
    return _is_open(module) and str(module).partition(".")[0] not in sys.stdlib_module_names


def _is_open(module: str | None) -> bool:
    """Are variables of a Python module looked into?"""
    return module is not None and module.partition(".")[0] not in _CLOSED


@lru_cache(maxsize=4096)  # disassembling takes long, and models share their code
def _variables(code: CodeType) -> tuple[str, ...]:
    """Names of Python modules' variables in a piece of code and in those inside it."""
    found = []
    for each in codes_of(code):
        for instruction in dis.get_instructions(each):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                found.append(instruction.argval)
    return tuple(found)


def _names(code: CodeType) -> Iterator[str]:
    """All names in a piece of code and in those inside it, those of attributes too, and strings."""
    for each in codes_of(code):
        yield from each.co_names
        yield from (one for one in each.co_consts if isinstance(one, str))


class _Settings:
    """Of torch, as attributes."""

    names = frozenset({"get_num_threads", "are_deterministic_algorithms_enabled"})

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)()
