"""Steps that train: a compressed model recovers, a student learns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quantize import surgery
from quantize.calibration import check_batches, warn_if_far
from quantize.compression.distillation import distill, make_student, recover
from quantize.compression.recipe import checks
from quantize.compression.recipe.value import Given, Step


@dataclass(frozen=True)
class Recover(Step):
    """`recover`: a pruned or factorized model wins back quality from the teacher.

    Args:
        steps: training steps, at least 1.
        hidden: names of modules whose outputs are compared too.
        joined: how many of the given batches make up the batch of one step.
        temperature: both models' logits are divided by it; > 0.
    """

    steps: int
    hidden: Sequence[str] = ()
    joined: int = 1
    temperature: float = 1.0
    trains = True
    part = "recovered"

    def __post_init__(self) -> None:
        checks.count(self, "steps")
        checks.count(self, "joined")
        temperature = checks.number(self, "temperature", "(0, inf)")
        self._set(hidden=checks.names(self, "hidden"), temperature=temperature)

    def __call__(self, model: nn.Module, given: Given) -> nn.Module:
        """A trained copy of `model`; raises what `recover` raises."""
        batches = _joined(_batches(self, given), self.joined)
        hidden = list(self.hidden) or None
        options = {"steps": self.steps, "temperature": self.temperature, "hidden": hidden}
        taught = _taught(recover, model, given, batches, options)
        away = surgery.notes(taught)[-1]["distance"]
        if away is not None:
            warn_if_far("recovering", model, away, "train it longer, or remove less before")
        return taught


@dataclass(frozen=True)
class Student(Step):
    """`make_student`, then `distill`: a smaller model cut out of the teacher, which it learns from.

    Args:
        steps: training steps, at least 1.
        depth: blocks that stay in each stack: a number of them, or a fraction in (0, 1).
        width: fraction in (0, 1] of channels, neurons and heads that stay.
        temperature: both models' logits are divided by it; > 0.
        skip: names and globs of layers whose channels stay.
    """

    steps: int
    depth: float | None = None
    width: float | None = None
    temperature: float = 1.0
    skip: Sequence[str] = ()
    first = True
    trains = True
    part = "student"

    def __post_init__(self) -> None:
        checks.count(self, "steps")
        temperature = checks.number(self, "temperature", "(0, inf)")
        if self.depth is None and self.width is None:
            raise ValueError("Student: give depth (blocks that stay), width (fraction), or both")
        if self.width is not None:
            checks.number(self, "width", "(0, 1]")
        if isinstance(self.depth, float):
            checks.number(self, "depth", "(0, 1)")
        elif self.depth is not None:
            checks.count(self, "depth")
        self._set(temperature=temperature, skip=checks.names(self, "skip"))

    def __call__(self, model: nn.Module, given: Given) -> nn.Module:
        """A trained smaller model; raises what `make_student` and `distill` raise."""
        batches = _batches(self, given)
        how = {"depth": self.depth, "width": self.width, "skip": self.skip}
        inputs = given.inputs_of(self)
        student = make_student(model, example_inputs=inputs, **how, **given.seen)
        options = {"steps": self.steps, "temperature": self.temperature}
        return _taught(distill, student, replace(given, teacher=model), batches, options)


def _taught(
    how: Callable[..., nn.Module],
    student: nn.Module,
    given: Given,
    batches: Any,
    options: dict[str, Any],
) -> nn.Module:
    """`student` after `how`, which is `distill` or `recover`; tells what it was worth."""
    name = given.recipe.name if given.recipe else type(student).__name__
    identity = dict(given.training.get("identity") or {})
    if given.recipe:
        identity["recipe"] = given.recipe.as_values()
    options = {**given.training, **options, "seed": given.seed, "identity": identity}
    if given.states is not None:
        options["checkpoint_path"] = given.states / f"{name}.state"
    context = given.printer(name) if given.printer else nullcontext()
    home = surgery.device_of(student)
    place = home if given.device is None else given.device
    teacher = None if given.teacher is None else surgery.at(place, given.teacher)
    student = surgery.at(place, student)
    with context as on_progress:
        taught = how(student, teacher, batches, on_progress=on_progress, **options)
    given.say(f"{name}: {surgery.notes(taught)[-1]['done']['']}")
    return taught.to(home)


def _batches(step: Step, given: Given) -> Any:
    if given.batches is None:
        raise ValueError(f"{type(step).__name__} needs batches")
    return given.batches


def _joined(batches: Any, count: int) -> Any:
    """Batches of `count` consecutive ones of `batches`, tensor by tensor along the first axis."""
    if count == 1:
        return batches
    if callable(batches) and not isinstance(batches, Iterable):
        return lambda step: _cat([batches(count * step + index) for index in range(count)])
    given = list(check_batches(batches, "batches"))
    if len(given) < count:
        raise ValueError(f"joined is {count}, and there are {len(given)} batches")
    starts = range(0, len(given) - count + 1, count)
    return [_cat(given[start : start + count]) for start in starts]


def _cat(batches: Sequence[Any]) -> Any:
    def cat(first: Any, *others: Any) -> Any:
        return torch.cat([first, *others]) if isinstance(first, Tensor) else first

    return pytree.tree_map(cat, *batches)
