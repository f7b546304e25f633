"""The int8 model as a whole: made of its layers, timed, and what is left to do where it loses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from quantize import surgery
from quantize.compression.int8.joining import fuse_activations
from quantize.compression.int8.layers import Choice, Stored, can_be_stored, convert
from quantize.compression.int8.limit import Trial
from quantize.compression.int8.regions import make_regions
from quantize.compression.int8.speed import slower_as_a_whole
from quantize.compression.int8.telling import Made
from quantize.nn import restore
from quantize.nn.int8 import Int8Linear


def plainly(trial: Trial, choice: Choice, *, keep: bool = False) -> Made:
    """The int8 model as the trial has it, not compared with anything. keep: the trial's source is
    used again.
    """
    source = surgery.clone(trial.source) if keep else trial.source
    new = convert(source, choice.chosen, trial.plans)
    return Made(new, choice, fuse_activations(new, *trial.joining))


def within_error(trial: Trial, choice: Choice, max_error: float | None) -> Made | None:
    """The int8 model as the trial has it, compared where there is calibration; None where there are
    no layers, or the error is larger.
    """
    if not choice.chosen:
        return None
    made = plainly(trial, choice)
    if trial.expected:
        made.distance = trial.error(made.model)
    if max_error is None:
        return made
    made.settings["max_error"] = max_error
    return made if made.distance is None or made.distance <= max_error else None


def finished(made: Made, projected: dict[str, nn.Module]) -> Made:
    """The same, with regions, and with the modules back that were projected."""
    make_regions(made.model)
    made.model = restore(made.model, projected, (Int8Linear,))
    return made


def stored_alone(
    plans: dict[str, Stored], choice: Choice, why: str
) -> tuple[dict[str, Stored], Choice]:
    """What is left where int8 loses as a whole: tables become int8, and convolutions are stored so
    and compute in float.
    """
    found = {n: Stored(why) for n, fact in choice.chosen.items() if can_be_stored(fact)}
    computing = [n for n, fact in choice.chosen.items() if not fact.table]
    return found | plans, choice.without({n: why for n in computing if n not in found})


def slowness(model: nn.Module, made: Made, batches: Iterable[Any] | None) -> str | None:
    """Why the model stays in float, where int8 loses as a whole. A copy in int8 runs: a run leaves
    kernels' forms of weights behind. None without batches.
    """
    if batches is None:
        return None
    times = slower_as_a_whole(model, surgery.clone(made.model), batches)
    kind = type(model).__name__
    return None if times is None else f"{kind} as a whole is slower in int8 here, {times}"
