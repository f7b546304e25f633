"""`Recipe`: steps in an order that makes sense, and `Given`: what they work with.

A step is a frozen dataclass around one public function. It holds what is written down with the
file; what belongs to the moment (inputs, batches, where to write, whom to tell) is in `Given`.
Wrong orders and values are refused when a recipe is made, before any work.

Each step takes its statistics of the model that it is given, in passes of its own:

- `Prune`: input moments of the layers that read what may go, and gradients at their outputs; then,
  layer by layer, regressions on what the pruned model gives them.
- `LowRank`: input moments and gradients of all layers; then, layer by layer, moments of the inputs
  in both models.
- `Int4`: input moments. `Int8(smooth=True)`: largest inputs, and errors. `Int8`, `Half`: none.

None are kept for the next step, which would get wrong ones: a step that removes or refits changes
gradients everywhere, and the inputs of all layers behind the first that it changed. Inputs of the
layers before that could be kept: at most 3% of the time of `Prune >> LowRank >> Int4 >> Int8` on a
BERT of four blocks, less on deeper models, while their moments would take memory.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from quantize.calibration import FarAway
from quantize.saying import Say

MOST_STEPS = 32

# Rows of the report whose names are older than the rule that joins parts with "+".
_ROW_NAMES: dict[tuple[str, ...], str] = {
    ("pruned", "recovered"): "pruned_recovered",
    ("low_rank", "recovered"): "low_rank_recovered",
    ("student", "int8"): "student_int8",
}


@dataclass(frozen=True)
class Given:
    """What the steps of a recipe work with, beside the model.

    Args:
        example_inputs: what `torch.export.export` takes: a tensor, a tuple of positional arguments
            or a dict of keyword arguments. `Prune` and `Student` need them.
        calibration: re-iterable batches like `example_inputs`. `Prune`, `LowRank`, `Int4` and
            `Student` use them where they are there, `Int8(smooth=True)` needs them.
        batches: what `Recover` and `Student` train on, as in `distill`: a re-iterable sequence, or
            a function from the number of a step to its batch.
        teacher: what `Recover` learns from; None: the model that the recipe is called with.
        seed: of the trainings.
        device: where the trainings run (None: where the model is); what comes back is where the
            model was.
        states: folder in which each training keeps its state, in a file named by the recipe up to
            there; None: nowhere.
        training: further options of `distill`: `resume`, `identity`, `bf16`, ...
        printer: gives, for the name of a training, a context whose value is its `on_progress`.
        progress: called with a line for people before each piece of work.
        recipe: the steps up to the present one; set by the recipe.
    """

    example_inputs: Any = None
    calibration: Iterable[Any] | None = None
    batches: Iterable[Any] | Callable[[int], Any] | None = None
    teacher: nn.Module | None = None
    seed: int = 0
    device: str | None = None
    states: Path | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    printer: Callable[[str], AbstractContextManager[Any]] | None = None
    progress: Say | None = None
    recipe: Recipe | None = None

    def at(self, recipe: Recipe, original: nn.Module) -> Given:
        """The same for the last step of `recipe`; the original is the teacher unless one is
        given.
        """
        teacher = original if self.teacher is None else self.teacher
        return replace(self, recipe=recipe, teacher=teacher)

    def first_batch(self) -> Any:
        """A batch to look at a result with, from calibration where there is one; or None."""
        return next(iter(self.calibration or ()), self.example_inputs)

    @property
    def seen(self) -> dict[str, Any]:
        """What techniques look at, and whom they tell."""
        return {"calibration": self.calibration, "progress": self.progress}

    def inputs_of(self, step: Step) -> Any:
        """The example inputs. Raises ValueError where a step misses them."""
        if self.example_inputs is None:
            raise ValueError(f"{type(step).__name__} needs example_inputs")
        return self.example_inputs

    def say(self, line: str) -> None:
        """Tell `progress`, if there is one."""
        if self.progress is not None:
            self.progress(line)


class Step:
    """One step of a recipe: a frozen dataclass that gives a new model and leaves its input as it
    was.

    A step of your own inherits from this class, has fields of JSON values, says its `part` of a
    recipe's name, and sets what is true of it: `removes` (afterwards there is something to
    recover), `trains` (afterwards nothing is left to recover), `rounds` (no step can follow),
    `first` (it starts from the original model).
    """

    kinds: ClassVar[dict[str, type[Step]]] = {}  # by name, for recipes in files
    removes: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    rounds: ClassVar[bool] = False
    first: ClassVar[bool] = False
    part: str

    def __init_subclass__(cls) -> None:
        known = Step.kinds.setdefault(cls.__name__, cls)
        if known.__module__ != cls.__module__:
            raise ValueError(
                f"two steps are named {cls.__name__!r}: the other is in {known.__module__}"
            )
        Step.kinds[cls.__name__] = cls

    def __call__(self, model: nn.Module, given: Given) -> nn.Module:
        """A new model."""
        raise NotImplementedError

    def __rshift__(self, other: Step | Recipe) -> Recipe:
        """This step, then the other."""
        return Recipe((self,)) >> other

    def _set(self, **values: Any) -> None:
        """Write checked values while the step is being made."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Recipe:
    """Steps that are applied one after the other: `Prune(0.5) >> Recover(160) >> Int8()`.

    Steps that remove or train work on float weights; `Half`, `Int8` and `Int4` round these, so they
    come last, `Int4` before `Int8` before `Half`, each for what is left. `Student` starts
    from the original model, so it comes first. `Recover` needs a `Prune` or `LowRank` before it
    since the last training.

    Args:
        steps: one or more steps.

    Raises:
        ValueError: no step, more than 32, or steps in an order that can't work.
        TypeError: something that is no step.
    """

    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        if isinstance(self.steps, Step) or not isinstance(self.steps, Iterable):
            raise TypeError(f"Recipe takes a sequence of steps, got {self.steps!r}")
        object.__setattr__(self, "steps", tuple(self.steps))
        for step in self.steps:
            if not isinstance(step, Step):
                raise TypeError(
                    f"a recipe consists of steps ({', '.join(Step.kinds)}), got {step!r}"
                )
        if not 0 < len(self.steps) <= MOST_STEPS:
            raise ValueError(f"a recipe has 1 to {MOST_STEPS} steps, got {len(self.steps)}")
        _check_order(self.steps)

    @property
    def name(self) -> str:
        """The parts of all steps joined with `+`: "pruned+recovered+int8"; as older rows, `_`."""
        parts = tuple(step.part for step in self.steps)
        return _ROW_NAMES.get(parts, "+".join(parts))

    @property
    def prefixes(self) -> tuple[Recipe, ...]:
        """The recipes of its first step, its first two, ..., all of them."""
        return tuple(Recipe(self.steps[:count]) for count in range(1, len(self.steps) + 1))

    def __rshift__(self, other: Step | Recipe) -> Recipe:
        """These steps, then the other."""
        if isinstance(other, Recipe):
            return Recipe((*self.steps, *other.steps))
        return Recipe((*self.steps, other))

    def __call__(self, model: nn.Module, given: Given | None = None) -> nn.Module:
        """Apply the steps to `model`, which stays as it is.

        Args:
            model: the original; `Recover` learns from it unless `given` has a teacher.
            given: what the steps work with.

        Returns:
            The compressed model.

        Raises:
            ValueError, TypeError: something that a step needs is not given, and what the steps'
                functions raise.
        """
        given = given or Given()
        result = model
        for prefix in self.prefixes:
            result = prefix.finished(result, model, given, is_mended=self.mends(prefix))
        return result

    def mends(self, prefix: Recipe) -> bool:
        """Whether one of the steps that follow those of `prefix` trains."""
        return any(step.trains for step in self.steps[len(prefix.steps) :])

    def finished(
        self, before: nn.Module, original: nn.Module, given: Given, *, is_mended: bool
    ) -> nn.Module:
        """What the last step makes of what those before it made of `original`.

        Args:
            is_mended: whether a training follows: then how far the outputs are is no news yet.
        """
        with warnings.catch_warnings() if is_mended else nullcontext():
            if is_mended:
                warnings.simplefilter("ignore", FarAway)
            return self.steps[-1](before, given.at(self, original))

    def as_values(self) -> list[dict[str, Any]]:
        """The recipe as JSON values, for the metadata of a file: a dict per step with all fields.

        Raises:
            ValueError: a step with a field that JSON doesn't have.
        """
        return json.loads(self.to_json())

    def to_json(self) -> str:
        """The recipe as JSON text, which `from_json` reads back to an equal recipe.

        Raises:
            ValueError: a step with a field that JSON doesn't have.
        """
        values = []
        for step in self.steps:
            fields = dataclasses.fields(step)  # type: ignore[arg-type]  # every step is a dataclass
            arguments = {each.name: _finite(getattr(step, each.name)) for each in fields}
            values.append({"step": type(step).__name__, **arguments})
        try:
            return json.dumps(values, allow_nan=False)
        except TypeError as error:
            raise ValueError(f"{self.name} can't be written as JSON: {error}") from None

    @classmethod
    def from_json(cls, source: str | Sequence[Mapping[str, Any]]) -> Recipe:
        """The recipe that `to_json` wrote.

        Args:
            source: the text, or the values in it as `read_metadata` gives them.

        Returns:
            A recipe equal to the one that was written.

        Raises:
            ValueError: no JSON, a step or a field of it that isn't known or has a value out of
                range, steps in a wrong order.
        """
        try:
            values = json.loads(source) if isinstance(source, str) else source
        except ValueError as error:
            raise ValueError(f"a recipe is JSON, got {source[:100]!r}: {error}") from None
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise ValueError(f"a recipe is a list of steps, got {values!r:.100}")
        return cls(tuple(_step(value) for value in values))


def _step(value: Any) -> Step:
    """A step from its JSON values."""
    if not isinstance(value, Mapping) or not isinstance(value.get("step"), str):
        raise ValueError(
            f'a step of a recipe is a dict with its name as "step", got {value!r:.100}'
        )
    arguments = dict(value)
    name = arguments.pop("step")
    kind = Step.kinds.get(name)
    if kind is None:
        raise ValueError(f"a recipe has the step {name!r:.100}; known: {', '.join(Step.kinds)}")
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]  # every step is a dataclass
    known = [each.name for each in fields]
    for key in arguments:
        if key not in known:
            raise ValueError(f"step {name} has the field {key!r:.100}; known: {', '.join(known)}")
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ValueError(f"step {name} of a recipe: {error}") from None


def _finite(value: Any) -> Any:
    """Infinity as text, which JSON has; the checks of numbers read it back."""
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _rounds_the_rest(before: Step, step: Step) -> bool:
    """Does the step store what the integers before it left in float, in more bits than they?"""
    bits = {"int4": 4, "int8": 8, "fp16": 16, "bf16": 16}
    first, then = bits.get(before.part, 16), bits.get(step.part, 0)
    return first < then


def _check_order(steps: Sequence[Step]) -> None:
    """Raises ValueError for an order that can't work, naming the step and what it follows."""
    lost = False  # is there something to recover?
    for index, step in enumerate(steps):
        name = type(step).__name__
        before = type(steps[index - 1]).__name__
        if index and steps[index - 1].rounds and not _rounds_the_rest(steps[index - 1], step):
            raise ValueError(
                f"{name} can't follow {before}, which rounds the weights: put {before} last"
            )
        if index and step.first:
            raise ValueError(
                f"{name} can't follow {before}: it starts from the original model, put it first"
            )
        if step.trains and not step.first and not lost:
            after = f" after {before}" if index else ""
            raise ValueError(
                f"{name} has nothing to recover{after}: put Prune or LowRank before it"
            )
        lost = (lost or step.removes) and not step.trains
