"""Values of arguments that are allowed: others are refused by a ValueError that names the argument,
its value, and what is allowed.
"""

from __future__ import annotations

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


def number(name: str, value: Any, interval: str) -> None:
    """A finite number in an interval."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not plain or not within(value, interval):
        bounds = {"(0, inf)": "> 0", "[0, inf)": ">= 0"}.get(interval, f"in {interval}")
        raise ValueError(f"{name} is {value!r}; allowed: a finite number {bounds}")


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """One of these."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, choices))}")
