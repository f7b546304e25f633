"""Predictions of a whole model from those of its parts, corrected by what was measured.

A latency is the original's less what the kinds save and what the sizes save, a loss is what
rounding and what removal lose, each times a factor, fitted to the measured points, the ones with
the smallest values as exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from quantize.compression.search.units import Option

_PRIOR = 0.1  # weight of the first guess against a measured point
_LEAST = 0.05  # of the first guess: a factor is no smaller


@dataclass(frozen=True)
class Parts:
    """Sums over the options of all units, see `units.Option`."""

    kind_s: float
    size_s: float
    rounding: float
    removal: float
    bytes: float

    @classmethod
    def of(cls, options: Iterable[Option]) -> Parts:
        chosen = list(options)
        names = [field.name for field in fields(cls)]
        return cls(*(sum(getattr(option, name) for option in chosen) for name in names))


@dataclass(frozen=True)
class Seen:
    """A measured point.

    Args:
        parts: what was chosen.
        saved_s: seconds of a call less than the original.
        loss: of the metric, its noise at least.
        bytes: of the file.
    """

    parts: Parts
    saved_s: float
    loss: float
    bytes: float


@dataclass(frozen=True)
class Factors:
    """What the sums of parts are multiplied by, and the bytes that no unit has."""

    kind: float = 1.0
    size: float = 1.0
    rounding: float = 1.0
    removal: float = 1.0
    rest: float = 0.0

    def saved_s(self, parts: Parts | Option) -> float:
        return self.kind * parts.kind_s + self.size * parts.size_s

    def loss(self, parts: Parts | Option) -> float:
        return self.rounding * parts.rounding + self.removal * parts.removal


def fitted(points: Sequence[Seen], seconds: float, rest: float) -> Factors:
    """The factors that fit the measured points.

    Args:
        points: in the order in which they were measured.
        seconds: of a call of the original.
        rest: bytes of the original that no unit has.
    """
    if not points:
        return Factors(rest=rest)
    times = [((p.parts.kind_s, p.parts.size_s), p.saved_s, seconds) for p in points]
    kind, size = _factors(times)
    losses = [((p.parts.rounding, p.parts.removal), p.loss, p.loss) for p in points]
    rounding, removal = _factors(losses)
    return Factors(kind, size, rounding, removal, points[-1].bytes - points[-1].parts.bytes)


def _factors(
    rows: Sequence[tuple[tuple[float, float], float, float]],
) -> tuple[float, float]:
    """Least squares of (two sums, their total, its unit), both drawn towards the median of total
    over sum: a factor that no point tells apart is that of the other.
    """
    ratios = [total / sum(parts) for parts, total, _ in rows if sum(parts) > 0 and total > 0]
    guess = float(np.median(ratios)) if ratios else 1.0
    left = [[guess * part / unit for part in parts] for parts, _, unit in rows if unit > 0]
    right = [total / unit for _, total, unit in rows if unit > 0]
    left += (np.eye(2) * _PRIOR).tolist()
    right += [_PRIOR, _PRIOR]
    found = np.linalg.lstsq(np.array(left), np.array(right), rcond=None)[0]
    first, second = (guess * max(_LEAST, float(factor)) for factor in found)
    return first, second
