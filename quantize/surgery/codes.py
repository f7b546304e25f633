"""The code that methods and functions are made of."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from types import CodeType, FunctionType, MethodType
from typing import Any

_CACHED = type(lru_cache(int))
CALLABLES = (FunctionType, MethodType, partial, _CACHED)  # whose functions are known


def functions_of(value: Any) -> Iterator[FunctionType]:
    """Those that a value is made of: of a property the one that reads it, of a wrapper also what
    it wraps.
    """
    if isinstance(value, property):
        value = value.fget
    value = getattr(value, "__func__", value)
    if isinstance(value, partial):
        yield from functions_of(value.func)
    if isinstance(value, FunctionType):
        yield value
    if isinstance(value, (FunctionType, _CACHED)):
        yield from functions_of(getattr(value, "__wrapped__", None))


def codes_of(code: CodeType) -> Iterator[CodeType]:
    """A piece of code, and those inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_of(constant)
