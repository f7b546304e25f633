"""Predictions of a whole model from those of its parts, corrected by what was measured.

A latency is the original's less what each kind saves and what the sizes save, a loss is what
rounding to each kind and what removal lose, each times a factor, fitted to the measured points. A
loss that is within the noise only tells that the factors are no larger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from quantize.compression.search.times import BF16, FLOAT, INT4, INT8
from quantize.compression.search.units import Option

_KINDS: tuple[str, ...] = (INT8, BF16, INT4)  # that change something
_PRIOR = 0.1  # weight of the first guess against a measured point
_LEAST = 0.05  # of the first guess: a factor is no smaller
_HIDDEN = 0.05  # of the noise: what is guessed of a loss that is no larger than it

ByKind = Mapping[str, float]


@dataclass(frozen=True)
class Parts:
    """Sums over the options of all units, see `units.Option`; of kinds, a sum for each."""

    kind_s: ByKind
    size_s: float
    rounding: ByKind
    removal: float
    bytes: float

    @classmethod
    def of(cls, options: Iterable[Option]) -> Parts:
        chosen = list(options)
        kind_s, rounding = dict.fromkeys(_KINDS, 0.0), dict.fromkeys(_KINDS, 0.0)
        for option in chosen:
            if option.kind != FLOAT:
                kind_s[option.kind] += option.kind_s
                rounding[option.kind] += option.rounding
        size_s = sum(option.size_s for option in chosen)
        removal = sum(option.removal for option in chosen)
        return cls(kind_s, size_s, rounding, removal, sum(option.bytes for option in chosen))

    @property
    def times(self) -> list[float]:
        """Seconds that each kind saves, and those that sizes save."""
        return [*(self.kind_s[kind] for kind in _KINDS), self.size_s]

    @property
    def losses(self) -> list[float]:
        """Of rounding to each kind, and of removal."""
        return [*(self.rounding[kind] for kind in _KINDS), self.removal]


@dataclass(frozen=True)
class Seen:
    """A measured point.

    Args:
        parts: what was chosen.
        saved_s: seconds of a call less than the original.
        loss: of the metric.
        noise: of the loss; 0 where nobody knows it.
        bytes: of the file.
    """

    parts: Parts
    saved_s: float
    loss: float
    noise: float
    bytes: float

    @property
    def least_loss(self) -> float:
        """The loss, or a guess where noise hides it."""
        return self.loss if self.loss > self.noise else max(_HIDDEN * self.noise, 1e-12)


@dataclass(frozen=True)
class Factors:
    """What the sums of parts are multiplied by, and the bytes that no unit has.

    Args:
        times: of `Parts.times`.
        losses: of `Parts.losses`.
        rest: bytes.
    """

    times: Sequence[float] = field(default=(1.0,) * (len(_KINDS) + 1))
    losses: Sequence[float] = field(default=(1.0,) * (len(_KINDS) + 1))
    rest: float = 0.0

    def saved_s(self, *options: Option) -> float:
        return self.saved_by(Parts.of(options))

    def loss(self, *options: Option) -> float:
        return self.loss_of(Parts.of(options))

    def saved_by(self, parts: Parts) -> float:
        return float(np.dot(self.times, parts.times))

    def loss_of(self, parts: Parts) -> float:
        return float(np.dot(self.losses, parts.losses))

    def kind(self, option: Option) -> float:
        """Of what the kind of an option saves."""
        return 1.0 if option.kind == FLOAT else self.times[_KINDS.index(option.kind)]


def fitted(points: Sequence[Seen], seconds: float, layers_s: float, rest: float) -> Factors:
    """The factors that fit the measured points.

    Args:
        points: in the order in which they were measured.
        seconds: of a call of the original.
        layers_s: of its layers one by one.
        rest: bytes of the original that no unit has.
    """
    if not points:
        return Factors(rest=rest)
    saved = np.array([point.saved_s for point in points]) / seconds
    by_time = np.array([point.parts.times for point in points]) / seconds
    times = _factors(by_time, saved, _largest(by_time, saved), np.median)
    if not by_time[:, -1].any():
        times[-1] = min(times[-1], _left(by_time, saved, layers_s / seconds))

    units = np.array([max(point.least_loss, point.noise) for point in points])
    lost = np.array([point.least_loss for point in points]) / units
    by_loss = np.array([point.parts.losses for point in points]) / units[:, None]
    losses = _factors(by_loss, lost, _largest(by_loss, np.ones(len(points))), np.min)
    return Factors(times, losses, points[-1].bytes - points[-1].parts.bytes)


def _largest(parts: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """For each column of parts [points, N] the largest factor with which it exceeds no point's
    total [points]; infinite where no point has it.
    """
    ratios = np.full(parts.shape, np.inf)
    np.divide(totals[:, None], parts, out=ratios, where=parts > 0)
    return ratios.min(0, initial=np.inf)


def _left(by_time: np.ndarray, saved: np.ndarray, layers: float) -> float:
    """The least of what points take over what is left of their layers one by one: sizes that nobody
    has measured save no more than that. Shares of the original's seconds.
    """
    left = layers - by_time.sum(1)
    ratios = [(1 - gone) / rest for gone, rest in zip(saved, left, strict=True) if rest > 0]
    return min(ratios, default=np.inf)


def _factors(
    parts: np.ndarray,
    totals: np.ndarray,
    largest: np.ndarray,
    typical: Callable[[np.ndarray], float],
) -> list[float]:
    """Least squares of parts [points, N] to totals [points], each factor drawn towards the largest
    it may be; what no point tells is `typical` of the others.
    """
    known = np.isfinite(largest)
    positive = largest[known & (largest > 0)]
    if not positive.size:
        return [1.0] * len(largest)
    guesses = np.maximum(largest[known], _LEAST * typical(positive))
    left = np.vstack([parts[:, known] * guesses, _PRIOR * np.eye(len(guesses))])
    right = np.concatenate([totals, np.full(len(guesses), _PRIOR)])
    found = np.linalg.lstsq(left, right, rcond=None)[0]
    fitting = guesses * np.maximum(found, _LEAST)
    factors = np.full(len(largest), typical(fitting))
    factors[known] = fitting
    return factors.tolist()
