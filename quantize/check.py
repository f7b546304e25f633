"""Values of arguments that are allowed: others are refused by a ValueError that names the argument,
its value, and what is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def is_count(value: object, least: int = 1) -> bool:
    """Is it an integer, and at least so large?"""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def count(name: str, value: Any, least: int = 1) -> None:
    """An integer of at least `least`."""
    if not is_count(value, least):
        raise ValueError(f"{name} is {value!r}; allowed: an integer >= {least}")


def within(value: float, interval: str) -> bool:
    """Is it in an interval, written as "(0, 1]" or "[0, inf)"?"""
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)


def is_number(value: object) -> bool:
    """Is it an integer or a float?"""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def number(name: str, value: Any, interval: str) -> None:
    """A number in an interval."""
    if not is_number(value) or not within(value, interval):
        raise ValueError(f"{name} is {value!r}; allowed: {interval}")


def as_float(name: str, value: Any, interval: str) -> float:
    """A number in an interval, as a float. Raises TypeError for what is no number."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}")
    number(name, value, interval)
    return float(value)


def shares(name: str, value: Any, interval: str) -> float | dict[str, float]:
    """A number in an interval, or a dict of them by the name of a layer; raises as `as_float`."""
    if not isinstance(value, Mapping):
        return as_float(name, value, interval)
    if not value:
        raise ValueError(f"{name} is an empty dict: name at least one layer")
    for layer in value:
        if not isinstance(layer, str):
            raise TypeError(f"{name} takes names of layers, got {layer!r}")
    return {k: as_float(f"{name}[{k!r}]", v, interval) for k, v in value.items()}


def one_of(name: str, value: Any, choices: Sequence[Any]) -> None:
    """One of these; 1 isn't True."""
    if not any(type(value) is type(each) and value == each for each in choices):
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, choices))}")
