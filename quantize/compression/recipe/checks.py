"""Checks of the values that a step is made with; each names the step, the value and what is
allowed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantize import check


def number(step: Any, name: str, interval: str) -> float:
    """The field as a float. Raises TypeError for no number, ValueError for one out of range."""
    return _number(*_field(step, name), interval)


def _field(step: Any, name: str) -> tuple[str, Any]:
    """What a message calls the field, and its value."""
    return f"{type(step).__name__}.{name}", getattr(step, name)


def _number(where: str, value: Any, interval: str) -> float:
    if value == "inf":  # of a recipe in a file
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{where} must be a number, got {value!r}")
    if not check.within(value, interval):
        raise ValueError(f"{where} is {value!r}; allowed: {interval}")
    return float(value)


def shares(step: Any, name: str, interval: str) -> float | dict[str, float]:
    """The field as a float, or as a dict of them by name of a layer."""
    where, value = _field(step, name)
    if not isinstance(value, Mapping):
        return _number(where, value, interval)
    if not value:
        raise ValueError(f"{where} is an empty dict: name at least one layer")
    for layer in value:
        if not isinstance(layer, str):
            raise TypeError(f"{where} takes names of layers, got {layer!r}")
    return {k: _number(f"{where}[{k!r}]", v, interval) for k, v in value.items()}


def count(step: Any, name: str) -> int:
    """The field as an integer of at least 1."""
    where, value = _field(step, name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{where} is {value}; allowed: an integer of at least 1")
    return value


def names(step: Any, name: str) -> tuple[str, ...]:
    """The field as a tuple of names and globs: a type can't be written down."""
    where, value = _field(step, name)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{where} must be a sequence of names, got {value!r}")
    for entry in value:
        if not isinstance(entry, str):
            raise TypeError(f"{where} takes names and globs, got {entry!r}")
    return tuple(value)


def choice(step: Any, name: str, allowed: Sequence[Any]) -> None:
    """Raises ValueError for a field that is none of the allowed values."""
    where, value = _field(step, name)
    if not any(type(value) is type(each) and value == each for each in allowed):
        options = ", ".join(repr(each) for each in allowed)
        raise ValueError(f"{where} is {value!r}; allowed: {options}")
