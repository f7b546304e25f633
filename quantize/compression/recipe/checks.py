"""Checks of the values that a step is made with; each names the step, the value and what is
allowed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from quantize import check


def number(step: Any, name: str, interval: str) -> float:
    """The field as a float. Raises TypeError for no number, ValueError for one out of range."""
    where, value = _field(step, name)
    value = math.inf if value == "inf" else value  # of a recipe in a file
    return check.as_float(where, value, interval)


def _field(step: Any, name: str) -> tuple[str, Any]:
    """What a message calls the field, and its value."""
    return f"{type(step).__name__}.{name}", getattr(step, name)


def shares(step: Any, name: str, interval: str) -> float | dict[str, float]:
    """The field as a float, or as a dict of them by name of a layer."""
    return check.shares(*_field(step, name), interval)


def count(step: Any, name: str) -> None:
    """Raises ValueError for a field that is no integer of at least 1."""
    check.count(*_field(step, name))


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
    check.one_of(*_field(step, name), allowed)
