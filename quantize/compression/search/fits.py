"""Predictions of a whole model from those of its parts, corrected by what was measured.

A latency is the original's less what each kind saves and what fewer channels and lower ranks save,
a loss is what rounding to each kind and either removal lose, each times a factor, fitted to the
measured points. A loss that is within the noise only tells that the factors are no larger.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from quantize.compression.search.options import Option
from quantize.compression.search.times import BF16, FLOAT, INT4, INT8

_KINDS: tuple[str, ...] = (INT8, BF16, INT4)  # that change something
_WIDTH, _RANK = "width", "rank"
_REMOVED: tuple[str, ...] = (_WIDTH, _RANK)
_SIZES = tuple(map(" ".join, itertools.product((FLOAT, *_KINDS), _REMOVED)))
_PRIOR_TIME, _PRIOR_LOSS = 0.1, 0.05  # weight of the first guess against a measured point
_LEAST = 0.05  # of the first guess: a factor is no smaller
_HIDDEN = 0.05  # of the noise: what is guessed of a loss that is no larger than it
_SHRINKING = 0.7  # of what lies between layers: is taken to be of their sizes
_UNSURE = 0.5  # weight of such a guess beside losses that are known

ByName = Mapping[str, float]


@dataclass(frozen=True)
class Parts:
    """Sums over the options of all units: one for each kind; of removal one for fewer channels
    ("width") and one for pairs ("rank"); of sizes one for either in each kind ("int8 width").
    """

    kind_s: ByName
    size_s: ByName
    rounding: ByName
    removal: ByName
    bytes: float

    @classmethod
    def of(
        cls, options: Iterable[Option], twice: ByName | None = None, left: ByName | None = None
    ) -> Parts:
        """Of options, one for each unit.

        Args:
            options: of all units.
            twice: by size, seconds that would be saved twice.
            left: by layer, the share of its inputs that other units leave it.
        """
        chosen = list(options)
        total = 0.0
        for option in chosen:
            total += sum(size * (left or {}).get(name, 1.0) for name, size in option.bytes.items())
        kind_s, rounding = dict.fromkeys(_KINDS, 0.0), dict.fromkeys(_KINDS, 0.0)
        size_s, removal = dict.fromkeys(_SIZES, 0.0), dict.fromkeys(_REMOVED, 0.0)
        for option in chosen:
            if option.kind != FLOAT:
                kind_s[option.kind] += option.kind_s
                rounding[option.kind] += option.rounding
            size = _RANK if option.ratio < 1 else _WIDTH
            size_s[f"{option.kind} {size}"] += option.size_s
            removal[size] += option.removal
        for size, seconds in (twice or {}).items():
            size_s[size] -= seconds
        return cls(kind_s, size_s, rounding, removal, total)

    @property
    def times(self) -> list[float]:
        """Seconds that each kind saves, and those that each size saves."""
        return [*(self.kind_s[kind] for kind in _KINDS), *(self.size_s[size] for size in _SIZES)]

    @property
    def losses(self) -> list[float]:
        """Of rounding to each kind, and of either removal."""
        removed = [self.removal[size] for size in _REMOVED]
        return [*(self.rounding[kind] for kind in _KINDS), *removed]


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

    times: Sequence[float] = field(default=(1.0,) * len(_KINDS + _SIZES))
    losses: Sequence[float] = field(default=(1.0,) * len(_KINDS + _REMOVED))
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
    largest = _largest(by_time, saved)
    left = np.full(len(_SIZES), _left(by_time, saved, layers_s / seconds))
    left[: len(_REMOVED)] = seconds / layers_s  # in float
    largest[len(_KINDS) :] = _first_guess(left)
    times = np.array(_factors(by_time, saved, largest, _PRIOR_TIME, np.median))
    times[len(_KINDS) :] = np.minimum(times[len(_KINDS) :], left)  # nothing takes less than 0

    units = np.array([max(point.least_loss, point.noise) for point in points])
    lost = np.array([point.least_loss for point in points]) / units
    by_loss = np.array([point.parts.losses for point in points]) / units[:, None]
    largest = _largest(by_loss, np.ones(len(points)))
    sure = np.array([point.loss > point.noise for point in points])
    weights = np.where(sure | ~sure.any(), 1.0, _UNSURE)
    losses = _factors(by_loss * weights[:, None], lost * weights, largest, _PRIOR_LOSS, np.min)
    return Factors(times.tolist(), losses, points[-1].bytes - points[-1].parts.bytes)


def _largest(parts: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """For each column of parts [points, N] the largest factor with which it exceeds no point's
    total [points]; infinite where no point has it.
    """
    ratios = np.full(parts.shape, np.inf)
    np.divide(totals[:, None], parts, out=ratios, where=parts > 0)
    return ratios.min(0, initial=np.inf)


def _first_guess(left: np.ndarray) -> np.ndarray:
    """What sizes are taken to save, a multiple of what layers save one by one, where a call takes
    `left` times as long as they do together: some of what lies between layers gets less too.
    """
    return np.minimum(left, 1 + _SHRINKING * np.maximum(left - 1, 0.0))


def _left(by_time: np.ndarray, saved: np.ndarray, layers: float) -> float:
    """What points take over what is left of their layers one by one, in the median. Shares of the
    original's seconds.
    """
    left = layers - by_time.sum(1)
    ratios = [(1 - gone) / rest for gone, rest in zip(saved, left, strict=True) if rest > 0]
    return float(np.median(ratios)) if ratios else np.inf


def _factors(
    parts: np.ndarray,
    totals: np.ndarray,
    largest: np.ndarray,
    prior: float,
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
    left = np.vstack([parts[:, known] * guesses, prior * np.eye(len(guesses))])
    right = np.concatenate([totals, np.full(len(guesses), prior)])
    found = np.linalg.lstsq(left, right, rcond=None)[0]
    fitting = guesses * np.maximum(found, _LEAST)
    factors = np.full(len(largest), typical(fitting))
    factors[known] = fitting
    return factors.tolist()
