"""The structure record: which edits turn a fresh model into this one, so that a file can repeat
them.

Each edit lies on the module it concerns, as the name of a builder and its JSON arguments, so it
follows the module through `copy.deepcopy` and pickling and needs no model-level state;
`structure(model)` reads the record off the tree, `rebuild(model, record)` applies it to a fresh
instance of the same architecture. Builders are found by name in one table: a file can name one,
never bring one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

Builder = Callable[..., nn.Module]
F = TypeVar("F", bound=Callable[..., Any])

MAX_EDITS = 64  # of one module
_SHOWN = 4  # reasons in an error

BUILDERS: dict[str, Builder] = {}


def builder(function: F) -> F:
    """Decorator: make `function(module, **arguments) -> module` known to the structure record under
    its name.

    A class is registered by its `rebuild(module, **arguments)` class method.
    """
    known = BUILDERS.setdefault(function.__name__, getattr(function, "rebuild", function))
    if known != getattr(function, "rebuild", function):
        raise ValueError(f"two builders are named {function.__name__!r}")
    return function


def record(module: nn.Module, name: str, **arguments: Any) -> None:
    """Note on `module` that builder `name` with these JSON arguments makes it from what stands
    there in a fresh model.
    """
    if name not in BUILDERS:
        raise ValueError(f"no builder is named {name!r}; known: {sorted(BUILDERS)}")
    module.__dict__["_structure"] = [*edits_of(module), (name, arguments, "")]


def amend(module: nn.Module, name: str, **arguments: Any) -> None:
    """Change arguments of the last edit on `module` itself, if that is one by builder `name`."""
    edits = list(edits_of(module))
    if edits and edits[-1][0] == name and not edits[-1][2]:
        edits[-1] = (name, {**edits[-1][1], **arguments}, "")
        module.__dict__["_structure"] = edits


def edits_of(module: nn.Module) -> Sequence[tuple[str, dict[str, Any], str]]:
    """What was recorded on `module`: builder, arguments, and the name, seen from `module`, of the
    module they apply to.
    """
    return module.__dict__.get("_structure", ())


def join(name: str, inner: str) -> str:
    return f"{name}.{inner}".strip(".")


def structure(model: nn.Module) -> list[dict[str, Any]]:
    """The edits that turn a fresh instance into `model`: `{"module", "builder", "arguments"}`,
    outer modules first.
    """
    edits: list[dict[str, Any]] = []
    for name, module in model.named_modules():
        for kind, arguments, inner in edits_of(module):
            path = join(name, inner)
            edits.append({"module": path, "builder": kind, "arguments": arguments})
    return edits


def check_count(edits: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError for a module that was edited so often that repeating it could take long."""
    counts = Counter(edit["module"] for edit in edits)
    for name, count in counts.most_common(1):
        if count > MAX_EDITS:
            raise ValueError(
                f"module {name[:200]!r} was edited {count} times; at most {MAX_EDITS} edits of "
                f"it fit a file"
            )


# Notes: what a technique did to a model and what it left.


@dataclass(frozen=True)
class Note:
    """One step: `done` maps layers to what became of them, `left` maps layers to the reason why
    they stayed.

    `distance`: of the step's result from what it was given, on inputs that were at hand; None where
        there were none.
    """

    technique: str
    done: Mapping[str, str]
    left: Mapping[str, str]
    distance: float | None
    settings: Mapping[str, Any]


def note(
    model: nn.Module,
    technique: str,
    *,
    done: Mapping[str, str] | None = None,
    left: Mapping[str, str] | None = None,
    distance: float | None = None,
    **settings: Any,
) -> None:
    """Append one step to the notes on `model`. Settings are JSON values."""
    step = {
        "technique": technique,
        "done": dict(done or {}),
        "left": dict(left or {}),
        "distance": distance,
        "settings": settings,
    }
    model.__dict__["_notes"] = [*model.__dict__.get("_notes", ()), step]


def note_distance(model: nn.Module, distance: float) -> None:
    """Add to the last step noted on `model` how far the outputs moved."""
    *before, last = model.__dict__["_notes"]
    model.__dict__["_notes"] = [*before, {**last, "distance": distance}]


def shortened(reasons: Mapping[str, str]) -> str:
    """The first reasons why layers stayed, for an error: `name: reason; ...`; "" if there are
    none.
    """
    shown = "; ".join(f"{name}: {why}" for name, why in list(reasons.items())[:_SHOWN])
    more = len(reasons) - _SHOWN
    return f"{shown}; and {more} more" if more > 0 else shown


def notes(model: nn.Module) -> list[dict[str, Any]]:
    """The steps noted on `model` as JSON values, oldest first, those on modules inside it too."""
    found = []
    for name, module in model.named_modules():
        for step in module.__dict__.get("_notes", ()):
            found.append(_prefixed(step, name) if name else step)
    return found


def _prefixed(step: dict[str, Any], name: str) -> dict[str, Any]:
    done = {join(name, layer): what for layer, what in step["done"].items()}
    left = {join(name, layer): why for layer, why in step["left"].items()}
    return {**step, "done": done, "left": left}


@dataclass(frozen=True)
class Summary:
    """What was done to a model, step by step. Printing it gives a line a layer."""

    steps: tuple[Note, ...]

    @classmethod
    def of(cls, steps: Iterable[Mapping[str, Any]]) -> Summary:
        """From steps as `notes` gives them."""
        return cls(tuple(Note(**step) for step in steps))

    @property
    def done(self) -> dict[str, str]:
        """What became of each layer that a step replaced or resized, all its steps joined with
        `+`.
        """
        found: dict[str, str] = {}
        for step in self.steps:
            for name, what in step.done.items():
                found[name] = f"{found[name]} + {what}" if name in found else what
        return found

    @property
    def left(self) -> dict[str, str]:
        """Why a layer stayed as it was, of the last step that left it: `technique: reason`."""
        found: dict[str, str] = {}
        for step in self.steps:
            found.update({name: f"{step.technique}: {why}" for name, why in step.left.items()})
        return found

    @property
    def distance(self) -> float | None:
        """Relative distance of the outputs of the last step that was compared with what it was
        given.
        """
        known = [step.distance for step in self.steps if step.distance is not None]
        return known[-1] if known else None

    def __str__(self) -> str:
        lines = []
        for step in self.steps:
            away = "" if step.distance is None else f", {step.distance:.3g} from what it was given"
            options = "".join(f", {key}={value}" for key, value in step.settings.items())
            lines.append(
                f"{step.technique}: {len(step.done)} done, {len(step.left)} left{away}{options}"
            )
            lines += [f"  {name or '(the model)'}: {what}" for name, what in step.done.items()]
            lines += [f"  {name or '(the model)'}: left, {why}" for name, why in step.left.items()]
        return "\n".join(lines) or "nothing was done to this model"
