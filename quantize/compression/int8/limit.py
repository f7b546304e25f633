"""Which layers go back to float so that the model's output stays within an error."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from quantize import calibration as calibrating
from quantize import surgery
from quantize.compression import smooth
from quantize.compression.int8.joining import Joining, fuse_activations
from quantize.compression.int8.layers import Choice, Plans, Report, convert
from quantize.saying import Say

_FAR = 0.05  # a relative error of the outputs above it comes with a warning
Group = tuple[str, ...]  # layers that share a weight: all of them are int8, or none


@dataclass(frozen=True)
class Result:
    """What a trial made: a model, the layers that do the work of activations in it by the names of
    these, and the relative error of its outputs.
    """

    model: nn.Module
    joined: dict[str, str]
    error: float


@dataclass(frozen=True)
class Trial:
    """Int8 copies of a model, compared with its outputs.

    Args:
        source: the float model.
        calibration: batches.
        expected: what the original gives for them.
        plans: by layer, for those that have outliers or compute in float.
        joining: as for `fuse_activations`.
        shifts: by layer, what is added to its bias in int8, [out].
    """

    source: nn.Module
    calibration: Iterable[Any]
    expected: Sequence[Tensor]
    plans: Plans
    joining: Joining
    shifts: Mapping[str, Tensor] = field(default_factory=dict)

    def error(self, model: nn.Module) -> float:
        """Relative error of a model's outputs.

        Raises: ValueError: they have other shapes (a length that follows from values, say) or
            values that are not finite.
        """
        actual = smooth.outputs(model, self.calibration)
        try:
            return calibrating.relative_error(actual, self.expected)
        except ValueError as error:
            kind = type(self.source).__name__
            raise ValueError(f"the int8 {kind} can't be compared: {error}") from error

    def made(self, groups: Sequence[Group]) -> Result:
        """The model with these layers in int8."""
        names = list(itertools.chain.from_iterable(groups))
        model = convert(surgery.clone(self.source), names, self.plans)
        for name in set(names) & set(self.shifts):
            layer: Any = model.get_submodule(name)
            layer.bias += self.shifts[name]
        joined = fuse_activations(model, *self.joining)
        return Result(model, joined, self.error(model))


def within(trial: Trial, choice: Choice, max_error: float, say: Say) -> tuple[Result, Choice]:
    """The model with as many layers in int8 as the error allows, those that cost least, and the
    choice of layers.

    Errors of layers add up in squares, about, so the number of layers is foreseen and then tried.

    Raises: ValueError: not one layer may become int8.
    """
    groups = choice.groups()
    costs: dict[Group, float] = {}
    pace = calibrating.Pace(len(groups))
    for group in groups:
        say(pace.next(f"int8 in {', '.join(group)} alone"))
        costs[group] = trial.made([group]).error
    groups.sort(key=costs.__getitem__)
    count = _foreseen([costs[group] for group in groups], max_error)
    result = trial.made(groups[:count])
    while result.error > max_error and count > 1:
        count -= 1
        result = trial.made(groups[:count])
    if result.error > max_error:
        raise ValueError(
            f"max_error={max_error:g} can't be kept: the layer that costs least, "
            f"{groups[0][0]!r}, alone changes the output by {result.error:.3g}"
        )
    while count < len(groups):
        more = trial.made(groups[: count + 1])
        if more.error > max_error:
            break
        result, count = more, count + 1
    return result, choice.without(_reasons(groups[count:], costs, max_error))


def tell_distance(small: nn.Module, model: nn.Module, batch: Any) -> None:
    """Note on an int8 model made without calibration how far its outputs are from the float
    model's on a batch, and warn where that is far.
    """
    distance = calibrating.distance(small, model, [batch])
    surgery.note_distance(small, distance)
    warn_if_far(model, distance)


def warn_if_far(model: nn.Module, distance: float) -> None:
    """A UserWarning where the outputs moved by more than 5 percent."""
    if distance > _FAR:
        warnings.warn(
            f"int8: the outputs of {type(model).__name__} moved by {distance:.0%} on calibration; "
            f"max_error={_FAR} would put layers back into float until it holds",
            stacklevel=3,
        )


def _foreseen(costs: Sequence[float], max_error: float) -> int:
    """How many of the costs, the least first, add up to the error in squares; one at least."""
    total, count = 0.0, 0
    for cost in costs:
        total += cost**2
        if math.sqrt(total) > max_error:
            break
        count += 1
    return max(1, count)


def _reasons(groups: Sequence[Group], costs: dict[Group, float], max_error: float) -> Report:
    found: Report = {}
    for group in groups:
        cost = f"in int8 it alone changes the output by {costs[group]:.3g}"
        found |= dict.fromkeys(group, f"{cost}; max_error is {max_error:g} for all layers")
    return found
