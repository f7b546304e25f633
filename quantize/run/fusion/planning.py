"""`plan` and `fold`: run the passes, build the result in a few ways, keep the fastest that is equal
to the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from quantize import surgery
from quantize.calibration import Pace, untouched
from quantize.nn.int8_conv import Int8Conv
from quantize.nn.int8_images import whole_in_graphs
from quantize.run.fusion import integers, kernels, passes, torchscript
from quantize.run.fusion.edit import calls
from quantize.run.fusion.equality import Checker, in_floats, integer_products, race
from quantize.run.fusion.export import capture
from quantize.run.fusion.folded import Folded
from quantize.run.fusion.graph import CaptureError, Program, check_inputs, lines_of
from quantize.run.fusion.memory import reuse_memory, separate_outputs
from quantize.run.fusion.state import answers, refuse_values
from quantize.saying import Say, silent

EXPORTED, SIMPLE, KERNELS, INTEGERS, FLOATS = (
    "as exported",
    "simplified",
    "kernels",
    "int8 kernels",
    "int8 layers in float",
)
ITSELF = "the model itself"
_MOST_SLOW = 1 << 24  # products of bytes in a call where oneDNN has no fast kernels for them
_LOSS = 1.1  # times its time, from which a way is called slower


@dataclass
class Plan:
    """What the passes make of a model."""

    fused: nn.Module  # the fastest way, built and checked
    way: str  # its name
    program: Program  # and its graph
    before: Counter[str]  # operators per call by kind, as exported
    notes: list[str]  # what was done, for people
    distance: float  # from the model on the example inputs: norm of the difference over norm

    @property
    def after(self) -> Counter[str]:
        """Operators per call by kind, as fused."""
        return self.program.operators()


def ways_of(program: Program) -> dict[str, Program]:
    """The programs to choose from, by name, from least to most rewritten.

    A program that writes into memory as it runs (its state, its inputs) stays as it was exported.
    One with whole int8 convolutions, which no file can hold, has one way.
    """
    simple, whole = program.copy(), calls(program, {integers.CONVOLUTION})
    simplified = passes.simplify(simple, at_load=True)
    if whole and not simplified:
        raise CaptureError("it writes into memory as it runs")
    if whole:
        integers.use_integers(simple)
        kernels.use_kernels(simple)
        reuse_memory(simple)
        integers.add_in_place(simple)
        separate_outputs(simple, program)
        return {INTEGERS: simple}
    if not simplified:
        program.notes.append("it writes into memory as it runs: its operators stay as they are")
        return {EXPORTED: program}
    ways = {EXPORTED: program, SIMPLE: simple}
    if kernels.available():
        ways[KERNELS] = simple.copy()
        kernels.use_kernels(ways[KERNELS])
        reuse_memory(ways[KERNELS])
    for way in ways.values():
        separate_outputs(way, program)
    return ways


def plan(
    model: nn.Module,
    example_inputs: Any,
    *,
    build: Callable[[Program], nn.Module] = torchscript.compile,
    progress: Say | None = None,
) -> Plan:
    """Build every way, check each against the model, let those that agree race. Raises ValueError
    if none agrees.

    progress: called with a line for people before each stage.
    """
    say = progress or silent
    say("running the model")
    seen = answers(model, example_inputs)
    refuse_values(model, seen)
    checker = Checker(model, example_inputs, seen)
    if not checker.noise or build is not torchscript.compile:
        return _planned(checker, model, build, say)
    plans, reasons = list[Plan](), list[str]()
    for way in (FLOATS, INTEGERS):
        if plans and _is_slow_in_integers(checker):
            reasons.append(f"left out: {way}: this CPU takes far longer for them than in float")
            break
        try:
            plans.append(_of_int8(checker, way, say))
        except (ValueError, RuntimeError) as error:
            reasons.append(f"left out: {way}: {lines_of(error)[0]}")
    if not plans:
        plans = [_planned(checker, model, build, say)]
    best = _fastest(plans, example_inputs)
    best.notes += reasons
    return best


def _is_slow_in_integers(checker: Checker) -> bool:
    """Would integers lose beyond doubt? A call may take minutes then: without VNNI stock products
    of bytes take 2 to 30 times as long as those of floats.
    """
    return not integers.available() and integer_products(checker.model, checker.seen) > _MOST_SLOW


def _of_int8(checker: Checker, way: str, say: Say) -> Plan:
    """The plan of a model with int8 layers: these in float, as their weights read, or in int8,
    convolutions in oneDNN's kernels. Raises ValueError where there are no such kernels, or they
    aren't equal.
    """
    if way == FLOATS:
        # compared with what it must equal to the last bits, at all sizes, and then with the model
        twin = in_floats(checker.model)
        seen = answers(twin, checker.example_inputs)
        own = Checker(twin, checker.example_inputs, seen)
        made = _planned(own, twin, torchscript.compile, say)
        made.way, made.distance = FLOATS, checker.first(made.fused, made.program.rewind)
        return made
    if not any(isinstance(module, Int8Conv) for module in checker.model.modules()):
        return _planned(checker, checker.model, torchscript.compile, say)
    if not integers.available():
        raise ValueError("this CPU has none that are exact")
    with whole_in_graphs():
        return _planned(checker, checker.model, torchscript.compile, say)


def _fastest(plans: list[Plan], example_inputs: Any) -> Plan:
    """The one that takes least time on the example inputs."""
    best, *others = plans
    if others:
        times = race({one.way: one.fused for one in plans}, example_inputs)
        for one in plans:
            one.program.rewind()
        best = min(plans, key=lambda one: times[one.way])
        best.notes.append("timed: " + ", ".join(f"{n} {t:.3f} ms" for n, t in times.items()))
    return best


def _planned(
    checker: Checker, model: nn.Module, build: Callable[[Program], nn.Module], say: Say
) -> Plan:
    say("exporting the model to a graph")
    program = capture(model, checker.example_inputs, checker.seen.changed)
    say(f"rewriting a graph of {program.operators().total()} operators")
    checker.settle(program, Folded(program))
    ways = ways_of(program)
    built: dict[str, nn.Module] = {}
    problems: dict[str, Exception] = {}
    distances: dict[str, float] = {}
    pace = Pace(max(len(ways) - 1, 1))
    rewritten = [name for name in ways if name != EXPORTED]
    times: list[dict[str, float]] = []
    for name in [*rewritten, *(ways.keys() - rewritten)]:
        if name == EXPORTED and built:
            say("timing")
            times = _times(built, checker)
            if not _loses(times):
                break  # only where the passes change the numbers too much, or make it slower
        try:
            say(pace.next(f"building: {name}"))
            candidate = build(ways[name])
            say(f"comparing with the model: {name}")
            checker(candidate, program.rewind)
            distances[name] = checker.distance
            built[name] = candidate
        except (ValueError, RuntimeError) as error:
            problems[name] = error
    if not built:
        raise list(problems.values())[-1]
    if EXPORTED in built and len(built) > 1:
        times = _times(built, checker)
    best = _best(times) if times else next(iter(built))
    notes = list(ways[best].notes)
    for found in times:
        notes.append("timed: " + ", ".join(f"{n} {t:.3f} ms" for n, t in found.items()))
    notes += [f"left out: {name}: {lines_of(error)[0]}" for name, error in problems.items()]
    return Plan(built[best], best, ways[best], program.operators(), notes, distances[best])


def _times(built: dict[str, nn.Module], checker: Checker) -> list[dict[str, float]]:
    """Milliseconds per call of the model and of each way, on the example inputs and, where all take
    one, on a batch of one: there a kernel that wins on many may lose.
    """
    found = []
    for inputs in checker.timed():
        try:
            with untouched(checker.model):
                found.append(race({ITSELF: checker.model, **built}, inputs))
        except Exception:  # one refuses another size, in whatever way it likes
            continue
    return found


def _best(times: list[dict[str, float]]) -> str:
    """The way that takes the least part of the model's time."""
    ways = [name for name in times[0] if name != ITSELF]
    return min(ways, key=lambda name: sum(found[name] / found[ITSELF] for found in times))


def _loses(times: list[dict[str, float]]) -> bool:
    """Is the best way slower than the model somewhere?"""
    return any(found[_best(times)] > _LOSS * found[ITSELF] for found in times)


def fold(model: nn.Module, example_inputs: Any, *, progress: Say | None = None) -> nn.Module:
    """An ordinary module with fewer operators, made by this package's own passes alone.

    It is equal to the model call after call, as what `quantize.fuse` returns, but runs in Python.

    Args:
        model: in eval mode, with all its submodules.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments, on
            the model's device.
        progress: called with a line for people before each stage.

    Returns:
        What is called like the model and returns what it returns. It can be copied, but not pickled
        or saved; for a file, `quantize.fuse` the model.

    Raises:
        ValueError: as `quantize.fuse`, and for a model that `torch.export` can't follow.
        TypeError: inputs or outputs that aren't made of tensors.
    """
    check_inputs(model, example_inputs)
    try:
        made = plan(model, example_inputs, build=Folded, progress=progress)
    except CaptureError as error:
        answers(model, example_inputs)  # a model that doesn't run at all says so itself
        raise CaptureError(f"{type(model).__name__} can't be folded: {error}") from error
    note(made.fused, model, "fold", made.distance, way=made.way)
    return made.fused


def note(
    fused: nn.Module, model: nn.Module, technique: str, distance: float, **settings: Any
) -> None:
    """Write the model's notes on the fused one, and the fusing after them."""
    for step in surgery.notes(model):
        where = {key: step[key] for key in ("done", "left", "distance")}
        surgery.note(fused, step["technique"], **where, **step["settings"])
    surgery.note(fused, technique, distance=distance, **settings)
