"""Values of arguments that are allowed: others are refused by a ValueError that names the argument,
its value, and what is allowed.
"""

from __future__ import annotations

import math
from typing import Any


def is_count(value: object, least: int = 1) -> bool:
    """Is it an integer, and at least so large?"""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def count(name: str, value: Any, least: int = 1) -> None:
    """An integer of at least `least`."""
    if not is_count(value, least):
        raise ValueError(f"{name} is {value!r}; allowed: an integer >= {least}")


def number(name: str, value: Any, within: str) -> None:
    """A finite number in an interval, written as "(0, 1]" or "[0, inf)"."""
    low, high = map(float, within[1:-1].split(","))
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if good:
        above = value >= low if within[0] == "[" else value > low
        below = value <= high if within[-1] == "]" else value < high
        good = above and below
    if not good:
        sign = ">=" if within[0] == "[" else ">"
        bounds = f"{sign} {low:g}" if math.isinf(high) else f"in {within}"
        raise ValueError(f"{name} is {value!r}; allowed: a finite number {bounds}")


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """One of these."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, choices))}")
