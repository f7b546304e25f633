"""What low rank did to a model: noted on it, with how far its outputs are from the original's and
how little was touched.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from quantize import calibration as calibrate
from quantize import surgery
from quantize.nn import low_rank as pairs

LITTLE = 0.25  # of a model's parameters: a result of which no more was touched comes with a warning


def write_down(
    result: nn.Module,
    model: nn.Module,
    skipped: dict[str, str],
    batches: Iterable[Any] | None,
    *,
    warn: bool,
) -> None:
    """Run the result once where there are inputs, and note what was done, what was left, and how
    far its outputs are.
    """
    away = None
    if batches is not None:
        try:
            away = calibrate.distance(result, model, calibrate.first_alone(batches))
        except ValueError as error:
            raise ValueError(
                f"the factorized {type(model).__name__} can't be used: {error}"
            ) from error
        advice = "train it on (quantize.recover), or keep more"
        calibrate.warn_if_far("low rank", model, away, advice)
    before = {name for name, layer in model.named_modules() if isinstance(layer, pairs.Pair)}
    done = {}
    for name, pair in result.named_modules():
        if isinstance(pair, pairs.Pair) and name not in before:
            done[name] = _rank_of(pair)
    skipped.update(dict.fromkeys(before, "is a low-rank pair already"))
    sizes = [surgery.parameter_count(m) for m in (model, result)]
    touched = sum(surgery.parameter_count(model.get_submodule(name)) for name in done)
    share = touched / max(1, sizes[0])
    if warn and done and share < LITTLE:
        others = ", ".join(f"{kind} ({held:.0%})" for kind, held in _largest(model, done))
        warnings.warn(
            f"low rank touched layers that hold {share:.0%} of the parameters of "
            f"{type(model).__name__}; the rest: {others}",
            stacklevel=4,
        )
    settings = {
        "parameters_before": sizes[0],
        "parameters_after": sizes[1],
        "share_touched": round(share, 4),
    }
    surgery.note(result, "low_rank", done=done, left=skipped, distance=away, **settings)


def _largest(model: nn.Module, done: Iterable[str]) -> list[tuple[str, float]]:
    """The kinds of modules that hold most of the parameters that were not touched, with their
    shares of the model.
    """
    inside: set[int] = set()
    for name in done:
        inside.update(id(module) for module in model.get_submodule(name).modules())
    held: dict[str, int] = {}
    seen: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(module) not in inside and id(parameter) not in seen:
                seen.add(id(parameter))
                kind = type(module).__name__
                held[kind] = held.get(kind, 0) + parameter.numel()
    total = surgery.parameter_count(model)
    largest = sorted(held.items(), key=lambda entry: -entry[1])[:3]
    return [(kind, size / total) for kind, size in largest]


def _rank_of(pair: Any) -> str:
    return f"rank {pair.rank} of {min(pair.weight_shape()[0], math.prod(pair.weight_shape()[1:]))}"
