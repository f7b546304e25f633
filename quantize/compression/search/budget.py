"""What a compressed model must reach."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TARGETS = ("speedup", "latency_ms", "bytes", "memory_mb")
_LIMIT = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*(%|noise)\s*")


@dataclass(frozen=True)
class Budget:
    """Targets and the largest loss; None where nothing is asked.

    Args:
        speedup: over the original, in turns with it; at least.
        latency_ms: median of a call; at most.
        bytes: of the file; at most.
        memory_mb: peak of the resident memory of a process that loads and runs it; at most.
        loss: largest change of the metric for the worse.
        loss_unit: "" for an absolute loss, "%" of the original's value, "noise" for multiples of
            the metric's own noise.
    """

    speedup: float | None = None
    latency_ms: float | None = None
    bytes: float | None = None
    memory_mb: float | None = None
    loss: float | None = None
    loss_unit: str = ""

    @classmethod
    def of(cls, budget: Mapping[str, Any]) -> Budget:
        """From the argument of `compress`.

        Raises:
            TypeError: no mapping.
            ValueError: empty, an unknown name, a value out of range.
        """
        known = (*TARGETS, "max_loss")
        if not isinstance(budget, Mapping):
            raise TypeError(f"budget must be a dict with any of {known}, got {budget!r:.100}")
        if not budget or not set(budget) <= set(known):
            raise ValueError(f"budget has {sorted(map(str, budget))}; allowed: any of {known}")
        targets = {}
        for name in TARGETS:
            value = budget.get(name)
            if value is not None and not _positive(value):
                raise ValueError(f"budget[{name!r}] is {value!r}; allowed: a finite number > 0")
            targets[name] = None if value is None else float(value)
        loss, unit = _limit(budget.get("max_loss"))
        return cls(**targets, loss=loss, loss_unit=unit)

    @property
    def has_targets(self) -> bool:
        """Whether anything beside the loss is asked for."""
        return any(getattr(self, name) is not None for name in TARGETS)

    def allowed_loss(self, scale: float, noise: float) -> float:
        """The largest loss, in the metric's units; infinite where none is given.

        Args:
            scale: what a loss in percent is a share of: the original's value.
            noise: of the metric.
        """
        if self.loss is None:
            return math.inf
        factors = {"": 1.0, "%": abs(scale) / 100, "noise": noise}
        return self.loss * factors[self.loss_unit]

    def misses(self, row: Mapping[str, Any]) -> list[str]:
        """Which targets a measured row misses, in words; empty where it reaches all."""
        found = []
        for name, value, limit in self._measured(row):
            if value is None or _excess(name, value, limit) > 0:
                shown = "not measured" if value is None else f"{value:.4g}"
                found.append(f"{name} is {shown}, asked for {limit:.4g}")
        return found

    def excess(self, row: Mapping[str, Any], noise: float = 0.0) -> float:
        """The share by which a row misses the target that it misses most; below 0 where it reaches
        all with something to spare, infinite where one wasn't measured.

        Args:
            row: of a point.
            noise: share by which what a clock or a process tells is taken to be worse; bytes are
                counted.
        """
        shares = [-math.inf]
        for name, value, limit in self._measured(row):
            share = math.inf if value is None else _excess(name, value, limit)
            shares.append(share if name == "bytes" else share + noise)
        return max(shares)

    def _measured(self, row: Mapping[str, Any]) -> list[tuple[str, float | None, float]]:
        """Name, measured value and limit of what was asked for."""
        values = {"speedup": row["speedup"], "latency_ms": row["latency_in_turns_ms"]}
        values |= {"bytes": row["bytes"], "memory_mb": row["peak_rss_mb"]}
        limits = {name: getattr(self, name) for name in TARGETS}
        return [(name, values[name], limits[name]) for name in TARGETS if limits[name] is not None]


def _excess(name: str, value: float, limit: float) -> float:
    """The share by which a value misses its limit; below 0 where it keeps it."""
    return limit / value - 1 if name == "speedup" else value / limit - 1


def _positive(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value < math.inf


def _limit(value: Any) -> tuple[float | None, str]:
    """The number and the unit of `max_loss`."""
    if value is None:
        return None, ""
    if isinstance(value, str):
        found = _LIMIT.fullmatch(value)
        if found:
            return float(found[1]), found[2]
    elif value == 0 or _positive(value):
        return float(value), ""
    raise ValueError(
        f'budget["max_loss"] is {value!r}; allowed: a number >= 0, "1%" of the original\'s value, '
        f'or "2 noise"'
    )
